"""What every test process needs before vLLM is imported, also where pytest is run by hand."""

import os
from pathlib import Path

import hypothesis

_CACHE = Path(__file__).parent.parent / ".cache"

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CACHE_ROOT", str(_CACHE / "vllm"))
os.environ.setdefault("TRIATTENTION_CACHE", str(_CACHE / "triattention"))

# How fast the machine is, and what else it does, is no property of the code.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
