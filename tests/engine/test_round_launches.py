"""What a whole round does to the device, on tensors without memory.

Such tensors take a GPU's path, and nothing on them can be read: every operation of torch on them
is seen here, every kernel is recorded instead of run.
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import recorded
from triattention_kernels import (
    PagedKV,
    RoundBatch,
    compact_triton,
    fill_holes_triton,
    score_triton,
    select_triton,
    statistics_triton,
)

from triattention_vllm.config import Method, Settings
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.rounds import (
    MAX_BATCH_BYTES,
    DraftRounds,
    Rounds,
    TargetRounds,
    _batch,
)
from triattention_vllm.method.region import region_norms
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.score_knorm import KnormScorer
from triattention_vllm.method.score_random import RandomScorer
from triattention_vllm.method.score_streamingllm import StreamingLLMScorer
from triattention_vllm.method.score_triattention import TriAttentionScorer
from triattention_vllm.method.score_vnorm import VnormScorer
from triattention_vllm.method.scorer import Observation, Scorer
from triattention_vllm.method.scorers import OBSERVING_SCORERS
from triattention_vllm.method.statistics import Fingerprint, Statistics

MODULES = (compact_triton, fill_holes_triton, score_triton, select_triton, statistics_triton)
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 8, 2, 32, 16
MANY = 64
"""Requests of one batch, with regions of 10 blocks."""
ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


class OnDevice(TorchDispatchMode):
    """Operations with a tensor on the device: copies of host memory that the host does not wait
    for, and all others that are neither views nor allocations. And the
    bytes of the largest result, and of all on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0
        self.others: list[str] = []
        self.largest = self.allocated = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_copy = function.overloadpacket is torch.ops.aten._to_copy
        for tensor in [] if function.is_view else made:
            self.largest = max(self.largest, tensor.nbytes)
            self.allocated += tensor.nbytes if tensor.is_meta else 0
        if not any(tensor.is_meta for tensor in given + made):
            return result
        if is_copy and kwargs.get("non_blocking") and not any(tensor.is_meta for tensor in given):
            self.num_copies += 1
        elif not function.is_view and function.overloadpacket not in ALLOCATIONS:
            self.others.append(str(function))
        return result


def make_kv(scattered: bool) -> PagedKV:
    """The layers in one storage, or each in one of its own."""
    size = (1 if scattered else NUM_LAYERS, 1000, BLOCK_SIZE, NUM_KV_HEADS, 2 * HEAD_DIM)
    parts = [
        PagedKV.from_blocks(torch.empty(size, dtype=torch.bfloat16, device="meta").transpose(2, 3))
        for _ in range(NUM_LAYERS if scattered else 1)
    ]
    return PagedKV.joined(parts)


def make_scorer() -> TriAttentionScorer:
    """Of layers that differ: the second does not rotate, the third has frequencies of its own."""
    dims = (HEAD_DIM, 0, HEAD_DIM, HEAD_DIM)
    layers = tuple(range(NUM_LAYERS))
    model = Fingerprint("Model", layers, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, dims, False, None, None)
    size = (NUM_LAYERS, NUM_HEADS, HEAD_DIM // 2)
    plain = torch.zeros(NUM_LAYERS, NUM_HEADS, HEAD_DIM)
    statistics = Statistics(model, *torch.zeros(2, *size), torch.ones(size), plain, {})
    inv_freq = torch.ones(NUM_LAYERS, HEAD_DIM // 2, dtype=torch.float64)
    inv_freq[1], inv_freq[2] = 0.0, 0.5
    factors = torch.ones(NUM_LAYERS, dtype=torch.float64)
    return TriAttentionScorer(statistics, Rotary(inv_freq, factors, dims, False), "meta")


def make_plans(num_requests: int, moves_forward: bool = True) -> list[RoundPlan]:
    plans = []
    for idx in range(num_requests):
        sources = tuple(range(1 + 10 * idx, 11 + 10 * idx))
        plans.append(
            RoundPlan(
                request_id=str(idx),
                group_id=0,
                nominal_boundary=1_000_000 + idx,
                source_blocks=sources,
                first_candidate=3,
                destination_blocks=sources[:6] if moves_forward else sources[3:9],
                row_start=0,
                row_blocks=(),
            )
        )
    return plans


def make_rounds(compaction: str, selection: str, scattered: bool) -> Iterator[Rounds]:
    settings = Settings(compaction=compaction, selection=selection)  # type: ignore[arg-type]
    kv = make_kv(scattered)
    yield TargetRounds(kv, BLOCK_SIZE, make_scorer(), settings)
    yield DraftRounds(kv, BLOCK_SIZE)


@pytest.mark.parametrize("compaction", ["repack", "fill_holes"])
@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head", "union"])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_round_of_many_requests_is_at_most_six_launches_and_nothing_else(
    compaction: str, selection: str, scattered: bool
) -> None:
    for rounds, most_launches, most_copies in zip(
        make_rounds(compaction, selection, scattered), (6, 1), (4, 4), strict=True
    ):
        assert MANY * 10 * BLOCK_SIZE * rounds.bytes_per_token <= MAX_BATCH_BYTES
        with recorded(*MODULES):
            rounds.run(make_plans(1))  # tables that stay are copied with the first round
        with recorded(*MODULES) as launches, OnDevice() as seen:
            rounds.run(make_plans(MANY))
        assert seen.others == []
        assert seen.num_copies <= most_copies
        assert 0 < len(launches) <= most_launches


@pytest.mark.parametrize(
    ("compaction", "statistics"),
    [("repack", "statistics_and_redundancy_kernel"), ("fill_holes", "statistics_kernel")],
)
def test_a_round_through_scratch_memory_is_at_most_six_launches_and_nothing_else(
    compaction: str, statistics: str
) -> None:
    target, _ = make_rounds(compaction, "per_head", scattered=False)
    with recorded(*MODULES):
        target.run(make_plans(1))
    with recorded(*MODULES) as launches, OnDevice() as seen:
        target.run(make_plans(1, moves_forward=False))
    assert [launch.kernel.__name__ for launch in launches] == [
        "score_kernel",
        statistics,
        "ranking_kernel",
        "keep_kernel",
        "compact_kernel",
        "compact_kernel",
    ]
    assert (seen.others, seen.num_copies) == ([], 4)


@pytest.mark.parametrize("compaction", ["repack", "fill_holes"])
def test_every_launch_of_a_round_has_been_compiled_in_the_warm_up(compaction: str) -> None:
    """Regression: moves through scratch memory waited for a compiler while requests were served."""
    for rounds in make_rounds(compaction, "per_head", scattered=False):
        with recorded(*MODULES) as warm, OnDevice() as seen:
            rounds.warm_up(0, Settings().policy(BLOCK_SIZE), num_blocks=1000)
        assert seen.allocated >= MAX_BATCH_BYTES, "a card without room for it fails at start"
        with recorded(*MODULES) as served:
            rounds.run(make_plans(3))
            rounds.run(make_plans(1, moves_forward=False))
        assert {launch.key for launch in served} <= {launch.key for launch in warm}


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head", "union"])
def test_a_batch_takes_the_scratch_memory_that_bounds_it(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the bound was one of tokens, three times as many bytes with larger models. What
    is left out is a number for each request and head."""
    rounds, _ = make_rounds("repack", selection, scattered=False)
    plans = make_plans(MANY)
    with recorded(*MODULES):
        rounds.run(make_plans(1))
    with recorded(*MODULES), OnDevice() as seen:
        rounds.run(plans)
    bound = rounds.bytes_per_token * MANY * 10 * BLOCK_SIZE
    assert bound / 2 < seen.allocated < 1.05 * bound
    monkeypatch.setattr("triattention_vllm.engine.rounds.MAX_BATCH_BYTES", bound // 2)
    with recorded(*MODULES) as launches:
        rounds.run(plans)
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("score_kernel") == 2


class ShownQueries:
    """Queries of every request for a scorer that looks at them, without a step that shows them."""

    def of(self, plan: RoundPlan) -> Observation:
        return Observation(torch.empty(NUM_LAYERS, 8, NUM_HEADS, HEAD_DIM, device="meta"), None)

    def keep(self, plans: Sequence[RoundPlan], scores: Tensor, kept: Tensor) -> None:
        assert scores.is_meta
        assert kept.is_meta


def other_rounds(method: str) -> TargetRounds:
    settings, kv = Settings(method=method), make_kv(False)  # type: ignore[arg-type]
    if method in OBSERVING_SCORERS:
        observing = OBSERVING_SCORERS[method]([1.0] * NUM_LAYERS)
        shown: Any = ShownQueries()
        return TargetRounds(kv, BLOCK_SIZE, observing, settings, shown)
    scorers: dict[str, Scorer] = {
        "streamingllm": StreamingLLMScorer(),
        "knorm": KnormScorer(),
        "vnorm": VnormScorer(),
        "random": RandomScorer(range(NUM_LAYERS)),
    }
    return TargetRounds(kv, BLOCK_SIZE, scorers[method], settings)


@pytest.mark.parametrize("method", [m for m in get_args(Method) if m != "triattention"])
def test_the_kernels_take_the_scores_of_every_method(method: str) -> None:
    """Regression: those of streamingllm were an expanded view, which the kernels refuse, and on the
    CPU torch operations took it."""
    with recorded(*MODULES) as launches:
        other_rounds(method).run(make_plans(3))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[-3:] == ["ranking_kernel", "keep_kernel", "compact_kernel"]


def test_lengths_of_a_long_region_are_taken_of_a_few_layers_at_a_time() -> None:
    """Regression: of all layers at once it took gigabytes beside a prompt that is read."""
    size = (36, 641, 16, 8, 2 * 128)
    kv = PagedKV.from_blocks(torch.empty(size, dtype=torch.bfloat16, device="meta").transpose(2, 3))
    blocks = torch.arange(1, 641, device="meta")[None]
    batch = RoundBatch(blocks, blocks[:, :128], (640,), (128,), (0,), False)
    with OnDevice() as seen:
        norms = region_norms(kv, batch, "values")
    assert norms.shape == (1, 36, 8, 10240)
    assert norms.nbytes < seen.largest <= (1 << 28) // 2


def test_a_round_compiles_the_same_for_any_number_of_requests() -> None:
    """Regression: with three heads in three layers standard deviations began at a multiple of 16
    bytes or not, as many requests as there were: a second batch waited for a compiler."""
    keys = []
    for num_requests in (1, 2, 3, 4):
        batch = _batch(make_plans(num_requests), torch.device("meta"))
        scores = torch.empty(num_requests, 3, 3, 10 * BLOCK_SIZE, device="meta")
        with recorded(statistics_triton, select_triton) as launches:
            select_triton.select(scores, batch, BLOCK_SIZE, 3, "per_head")
        keys.append([launch.key for launch in launches])
    assert keys[1:] == keys[:-1]
    assert len(keys[0]) == 3


def test_an_operation_on_the_device_would_be_seen() -> None:
    tensor = torch.empty(3, device="meta")
    with OnDevice() as seen:
        tensor.view(3, 1)[1:].mul_(2)
        tensor.to(torch.float16)
        torch.zeros(3).to("meta")
    assert seen.others == ["aten.mul_.Tensor", "aten._to_copy.default", "aten._to_copy.default"]
    assert seen.num_copies == 0
