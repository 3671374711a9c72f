"""What every test process needs before vLLM is imported, also where pytest is run by hand."""

import os
from pathlib import Path

import hypothesis
import pytest

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """The engine tests on the model runner of GPUs, with Triton's interpreter."""
    parser.addoption("--runner-v2", action="store_true", help="engines run vLLM's model runner V2")


def pytest_configure(config: pytest.Config) -> None:
    """Before a test is imported."""
    if config.getoption("--runner-v2"):
        import fresh_process

        fresh_process.always_on_v2 = True
