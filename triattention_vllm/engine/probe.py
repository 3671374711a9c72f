"""What vLLM makes of this plugin and of the flags of ``vllm serve``, without loading a model.

``python -m triattention_vllm.engine.probe REPORT [MODEL [FLAGS...]]`` writes what it found to the
file REPORT as JSON. It runs in a process of its own: vLLM reads its environment when it is
imported, and an import that fails takes the process along. An error is in the report, too.
"""

import sys
from typing import Any

from triattention_vllm.child_report import STEP, begin_report


def main(report_file: str, arguments: list[str]) -> None:
    """Fill the report step by step, so that it tells how far vLLM came."""
    report = begin_report(report_file)
    report[STEP] = "import vllm"
    import vllm
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    report |= {"vllm": vllm.__version__, "platform": current_platform.device_type}
    report[STEP] = "load plugins"
    load_general_plugins()
    from triattention_vllm.engine import cli, versions

    report["is_verified"] = versions.is_verified(vllm.__version__)
    report["is_installed"] = cli.install.cache_info().currsize == 1
    report[STEP] = "read the model's configuration and the flags"
    if arguments:
        report |= _engine(arguments)
    report[STEP] = "done"


def _engine(arguments: list[str]) -> dict[str, Any]:
    """The engine configuration that ``vllm serve`` would build from ``arguments``, with this
    package's checks: settings, versions, refusals that need no loaded layer."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from triattention_vllm.engine.attention import BACKENDS
    from triattention_vllm.engine.settings import settings_of

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    if args.model_tag is not None:
        args.model = args.model_tag
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    settings = settings_of(config)
    backend = config.attention_config.backend
    return {
        "settings": None if settings is None else settings.to_mapping(),
        "model": config.model_config.model,
        "architecture": config.model_config.architecture,
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "worker": config.parallel_config.worker_cls,
        "attention_backend": None if backend is None else backend.name,
        "supported_backends": sorted(member.name for member in BACKENDS),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
