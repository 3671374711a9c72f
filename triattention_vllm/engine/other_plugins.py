"""The authors' plugin beside this one: both would change the same scheduler and worker."""

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points

import vllm.envs as envs
from vllm.plugins import DEFAULT_PLUGINS_GROUP

from triattention_vllm.environment import AUTHORS_ENABLE, authors_plugin_is_on
from triattention_vllm.errors import UnsupportedError

AUTHORS_PACKAGE = "triattention"


def refuse_authors_plugin(environ: Mapping[str, str]) -> None:
    """Raise UnsupportedError where vLLM loads the authors' plugin and it is not switched off.

    It is on unless ENABLE_TRIATTENTION says otherwise, so this is what happens to whoever
    installs this package next to it.
    """
    loaded = loaded_authors_plugins(
        list(entry_points(group=DEFAULT_PLUGINS_GROUP)), envs.VLLM_PLUGINS
    )
    if loaded and authors_plugin_is_on(environ):
        raise UnsupportedError(
            f"The plugin {', '.join(loaded)} of distribution {AUTHORS_PACKAGE} also compresses "
            f"the KV cache; uninstall it, set {AUTHORS_ENABLE}=0 together with "
            "TRIATTENTION_ENABLE=1, or leave it out of VLLM_PLUGINS."
        )


def loaded_authors_plugins(
    plugins: Sequence[EntryPoint], allowed: Sequence[str] | None
) -> list[str]:
    """Names of the authors' entry points among ``plugins`` that vLLM loads; ``allowed`` is
    VLLM_PLUGINS, None where it is not set."""
    return [
        plugin.name
        for plugin in plugins
        if plugin.module.split(".")[0] == AUTHORS_PACKAGE
        and (allowed is None or plugin.name in allowed)
    ]
