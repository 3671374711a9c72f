"""What the GPU benchmarks count for a side, a step and a call is its own."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_process import run_script
from tiny_model import write_tiny_model

Json = dict[str, Any]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HAS_AVX512 = torch.cpu._is_avx512_supported()


class Device:
    """A GPU that two engines share, and the time, which nothing else moves on."""

    def __init__(self) -> None:
        self.now = self.idle_at = 0.0

    def wait(self) -> None:
        self.now = max(self.now, self.idle_at)

    def engine(self, seconds: float) -> Any:
        """One with async scheduling: a step launches a batch and waits for the one before."""
        launched = [0.0]

        def step() -> list[Any]:
            self.idle_at = max(self.now, self.idle_at) + seconds
            launched.append(self.idle_at)
            self.now = max(self.now, launched.pop(0))
            return [SimpleNamespace(request_id="a", outputs=[SimpleNamespace(token_ids=[1])])]

        return SimpleNamespace(step=step)


def test_a_side_pays_for_its_own_steps_alone(
    gpu_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the batch that was launched last was paid for by the side that came next."""
    script, device = gpu_script("side"), Device()
    engine_side = script.Side.__module__
    monkeypatch.setattr(f"{engine_side}.time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)

    def side(seconds: float) -> Any:
        made = script.Side.__new__(script.Side)
        made.engine, made.on_gpu = device.engine(seconds), True
        made.pool = SimpleNamespace(num_gpu_blocks=1, get_num_free_blocks=lambda: 0)
        made.request_ids, made.generated = ["a"], {}
        return made

    fast, slow = side(1.0), side(3.0)
    for one in (fast, slow):
        one._step()
    for one, seconds in ((fast, 1.0), (slow, 3.0), (slow, 3.0), (fast, 1.0)):
        assert sum(one.decode(4)["seconds"]) == 4 * seconds


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's CPU build stores fp8 with AVX-512 only")
def test_rounds_and_tokens_are_those_of_the_batch_that_a_step_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: under async scheduling they were those of the batch that it launched; and dummy
    weights left zeros alone in an fp8 cache.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    folder = write_tiny_model(tmp_path / "model", num_layers=2, hidden_size=128, head_dim=32)
    arguments = {
        **{"load_format": "dummy", "dtype": "bfloat16", "kv_cache_dtype": "fp8"},
        **{"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 4 << 20},
        **{"max_model_len": 1024, "max_num_batched_tokens": 128, "disable_log_stats": True},
    }
    settings = {"method": "triattention", "budget": 128, "interval": 32, "window": 16}
    job = {"model": str(folder), "arguments": arguments, "settings": settings}
    found = run_script(Path(__file__).with_name("gpu_side_script.py"), job)
    assert found["async"]
    assert found["rounds"] == found["planned"]
    assert 0 < sum(found["rounds"]) < len(found["rounds"])
    served = found["served"]
    assert [tokens for tokens in served["computed"] if tokens] == found["returned"]
    for tokens, computed, requests in zip(
        served["tokens"], served["computed"], served["requests"], strict=True
    ):
        assert tokens <= requests <= computed
    assert max(served["computed"]) == 128
    assert found["stored"] > 0.8


def test_no_call_finds_in_the_cache_what_the_one_before_it_read(
    gpu_script: Callable[[str], ModuleType],
) -> None:
    """Regression: within a turn every side had the same request set, and its second time the set
    of its first.
    """
    timing, visited = gpu_script("timing"), list[int]()
    sides = dict.fromkeys(("product", "plain", "torch"), visited.append)
    times = timing.in_turns(sides, 5, 10.0, "cpu")
    assert [len(own.device) for own in times.values()] == [5, 5, 5]
    assert len(visited) == 3 * (3 + 2 * 5)
    assert all(second == first + 1 for first, second in pairwise(visited))


def test_a_tenth_of_few_values_lies_among_them(
    gpu_script: Callable[[str], ModuleType],
) -> None:
    """Regression: of two rounds of 1 and 2 ms the first tenth took 0.3."""
    timing = gpu_script("timing")
    for spread in (timing.spread_us([1e-6, 2e-6]), timing.spread([1.0, 2.0])):
        assert (spread["p10"], spread["p90"]) == pytest.approx((1.1, 1.9))


def test_a_side_that_is_too_slow_is_called_once_before_it_is_timed(
    gpu_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, device = gpu_script("timing"), Device()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.now))
    calls = {"slow": 0, "quick": 0}

    def side(name: str, seconds: float) -> Callable[[int], None]:
        def call(_: int) -> None:
            calls[name] += 1
            device.now += seconds

        return call

    timing.in_turns({"slow": side("slow", 3.0), "quick": side("quick", 0.01)}, 20, 0.5, "cpu")
    assert calls == {"slow": 1 + 2, "quick": 3 + 2 * 20}
