"""One small round of the default settings on this machine's device, against torch on the CPU.

``python -m triattention_vllm.tools.try_operations REPORT`` writes the device and what differs to
the file REPORT. On a GPU this compiles the Triton kernels of a round.
"""

import sys
from typing import Any

import torch
from triattention_kernels import Implementation, PagedKV, RoundBatch, compact, score, select

from triattention_vllm.child_report import STEP, begin_report
from triattention_vllm.config import Settings
from triattention_vllm.method.ranking import Ranking

_NUM_LAYERS, _NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM, _GROUP = 2, 12, 2, 16, 64, 4
# Scores err by the rounding of sums of 64 float32 products.
_TOLERANCE = 1e-4


def main(report_file: str) -> None:
    """A round on the GPU, or on the CPU where torch can use none."""
    report = begin_report(report_file)
    has_gpu = torch.cuda.is_available()
    report["device"] = torch.cuda.get_device_name() if has_gpu else "CPU"
    report["implementation"] = "triton" if has_gpu else "torch"
    try_round(report, "cuda" if has_gpu else "cpu")
    report[STEP] = "done"


def try_round(report: dict[str, Any], device: str) -> None:
    """Score, select and compact 10 blocks to 6, in place and through scratch memory."""
    report[STEP] = "score"
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_LAYERS, _NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, 2 * _HEAD_DIM)
    blocks = torch.randn(shape, generator=generator)
    # Blocks 6 to 10 say what blocks 1 to 5 say, so that redundancy has something to find.
    blocks[:, 6:11, ..., _HEAD_DIM:] = blocks[:, 1:6, ..., _HEAD_DIM:]
    num_heads = _NUM_KV_HEADS * _GROUP
    centres = torch.randn(_NUM_LAYERS, num_heads, _HEAD_DIM, generator=generator)
    angles = torch.rand(1, _NUM_LAYERS, _HEAD_DIM // 2, generator=generator)
    turns = torch.polar(torch.ones_like(angles), angles)
    norm = torch.rand(_NUM_LAYERS, num_heads, _HEAD_DIM // 2, generator=generator)
    own, reference = blocks.to(device), blocks.double()
    scores = score(
        PagedKV.from_blocks(own),
        _batch(device),
        centres.to(device),
        norm.to(device),
        turns.to(device),
        False,
        _HEAD_DIM,
    )
    expected = score(
        PagedKV.from_blocks(reference),
        _batch("cpu"),
        centres.double(),
        norm.double(),
        turns.to(torch.complex128),
        False,
        _HEAD_DIM,
        "torch",
    )
    report["score_error"] = float((scores.cpu().double() - expected).abs().max())
    report[STEP] = "select"
    kept, same = _kept(scores, own), _kept(scores.cpu(), blocks, "torch")
    report[STEP] = "compact"
    for in_place in (True, False):
        compact(PagedKV.from_blocks(own), _batch(device, in_place), kept)
        compact(PagedKV.from_blocks(blocks), _batch("cpu", in_place), same, "torch")
    report["is_right"] = (
        report["score_error"] < _TOLERANCE
        and torch.equal(kept.cpu(), same)
        and torch.equal(own.cpu(), blocks)
    )


def _kept(
    scores: torch.Tensor, blocks: torch.Tensor, implementation: Implementation | None = None
) -> torch.Tensor:
    """What a default round keeps: with redundancy, which is a kernel of its own."""
    settings = Settings()
    repeats = Ranking(redundancy=settings.redundancy).repeats(PagedKV.from_blocks(blocks))
    batch, sizes = _batch(str(scores.device)), (_BLOCK_SIZE, _NUM_KV_HEADS)
    return select(scores, batch, *sizes, settings.selection, implementation, repeats)


def _batch(device: str, in_place: bool = True) -> RoundBatch:
    """One request: blocks 1 to 10 become 1 to 6 or 5 to 10, 4 tokens are protected."""
    destination = range(1, 7) if in_place else range(5, 11)
    return RoundBatch(
        source_blocks=torch.arange(1, 11, device=device).reshape(1, -1),
        destination_blocks=torch.tensor([destination], device=device),
        num_source_blocks=(10,),
        num_destination_blocks=(6,),
        first_candidate=(4,),
        moves_forward=in_place,
    )


if __name__ == "__main__":
    main(sys.argv[1])
