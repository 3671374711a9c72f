"""What only a device can show: captured graphs, a host that never waits, launches as they ran."""

from collections.abc import Callable

import pytest
import torch
from score_oracle import random_weights
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triattention_kernels import (
    PagedKV,
    Repeats,
    RoundBatch,
    compact,
    fill_holes,
    score,
    select,
    shift_rows,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
BLOCK_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 4, 8, 2, 64

KERNELS = {
    "repack": ["statistics_and_redundancy_kernel", "compact_kernel"],
    "repack through scratch memory": ["statistics_and_redundancy_kernel", *["compact_kernel"] * 2],
    "fill_holes": ["statistics_kernel", "fill_kernel", "compact_kernel"],
}
"""Way of moving -> kernels beside those of every round; the first is the default round."""


@pytest.fixture
def uninitialised_memory_is_left_alone() -> None:
    """Filling it would be launches of its own."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_round(uninitialised_memory_is_left_alone: None) -> Callable[[str], None]:
    """A round of 32 requests, with redundancy where tokens stay in order; each way of moving has
    run once before."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (NUM_LAYERS, 32 * 10 + 1, BLOCK_SIZE, NUM_KV_HEADS, 2 * HEAD_DIM)
    blocks = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
    kv = PagedKV.from_blocks(blocks.transpose(2, 3))
    weights = [own.cuda() for own in random_weights((32, NUM_LAYERS, NUM_HEADS, HEAD_DIM), 64)]
    rows = torch.arange(1, 321).view(32, 10).pin_memory()

    def run(way: str) -> None:
        in_place, in_order = way != "repack through scratch memory", way != "fill_holes"
        source = rows.to("cuda", non_blocking=True)
        destination = (source if in_place else source.roll(1, 0))[:, :6].contiguous()
        batch = RoundBatch(source, destination, (10,) * 32, (6,) * 32, (3,) * 32, in_place)
        scores = score(kv, batch, *weights, False, HEAD_DIM)
        repeats = Repeats(kv, 0.5) if in_order else None
        kept = select(scores, batch, BLOCK_SIZE, NUM_KV_HEADS, "per_head", repeats=repeats)
        compact(kv, batch, kept if in_order else fill_holes(kept, batch, BLOCK_SIZE))

    for way in KERNELS:
        run(way)
    torch.cuda.synchronize()
    return run


@pytest.mark.parametrize("way", KERNELS)
def test_a_round_waits_for_nothing_on_the_device(
    way: str, one_round: Callable[[str], None]
) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_round(way)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", KERNELS)
def test_the_device_runs_the_kernels_of_a_round_and_reads_pinned_memory_alone(
    way: str, one_round: Callable[[str], None]
) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        one_round(way)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    ours = ["score_kernel", "ranking_kernel", "keep_kernel", *KERNELS[way]]
    known = {*ours, *(name for kernels in KERNELS.values() for name in kernels)}
    assert sorted(name for name in names if name in known) == sorted(ours)
    assert any("Memcpy HtoD" in name for name in names), names
    assert not any("Pageable" in name for name in names), names


def test_a_captured_shift_reads_the_rows_of_every_replay() -> None:
    width = 40

    def rows(num_null: int) -> tuple[Tensor, Tensor]:
        table = torch.arange(1, 3 * width + 1, dtype=torch.int32).view(3, width)
        table[:, :num_null] = 0
        return table, torch.tensor([width * 16, width * 16 - 5, 1], dtype=torch.int32)

    table, lengths = (own.cuda() for own in rows(0))
    outputs = (torch.zeros_like(table), torch.zeros_like(lengths))
    shift_rows(table, lengths, 16, *outputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shift_rows(table, lengths, 16, *outputs)
    for num_null in (0, 7, 39, 3):
        for own, new in zip((table, lengths), rows(num_null), strict=True):
            own.copy_(new)
        for output in outputs:
            output.fill_(-1)
        graph.replay()
        expected = [torch.full_like(output, -1).cpu() for output in outputs]
        shift_rows(*rows(num_null), 16, *expected)
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output.cpu(), wanted)
