"""What every test process needs before vLLM is imported, also where pytest is run by hand."""

import os
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache"

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CACHE_ROOT", str(_CACHE / "vllm"))
os.environ.setdefault("TRIATTENTION_CACHE", str(_CACHE / "triattention"))
