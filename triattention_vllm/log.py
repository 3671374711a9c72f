"""The logger of this package: a child of vLLM's, so lines get vLLM's format and level."""

import logging
from functools import cache

logger = logging.getLogger("vllm.triattention")


@cache
def log_once(level: int, message: str) -> None:
    """Log ``message`` at ``level`` unless this process has logged it already.

    Settings are resolved each time vLLM builds an engine configuration, often more than once.
    """
    logger.log(level, message, stacklevel=2)
