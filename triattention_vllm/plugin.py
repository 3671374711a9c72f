"""The entry point of group ``vllm.general_plugins``; standard library only at import."""


def register() -> None:
    """Add the flags of KV compression to vLLM; nothing else changes until they are used.

    vLLM calls this in every process, before the command line is parsed, possibly more than
    once. Raises SeamError where vLLM is not what this package was verified against.
    """
    from triattention_vllm.engine.cli import install

    install()
