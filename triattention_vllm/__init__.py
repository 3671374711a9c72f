"""KV-cache compression for vLLM: settings, statistics, errors, version; nothing else."""

from typing import TYPE_CHECKING

from triattention_vllm.config import Settings
from triattention_vllm.errors import (
    RoundError,
    SeamError,
    SettingsError,
    StatisticsError,
    TriAttentionError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from triattention_vllm.method.statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "RoundError",
    "SeamError",
    "Settings",
    "SettingsError",
    "Statistics",
    "StatisticsError",
    "TriAttentionError",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """``Statistics`` on first use: it needs torch, and vLLM imports this package to find the
    plugin in every process, before anything is turned on."""
    if name == "Statistics":
        from triattention_vllm.method.statistics import Statistics

        return Statistics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
