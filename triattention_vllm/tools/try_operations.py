"""One small round on this machine's device, against torch on the CPU.

``python -m triattention_vllm.tools.try_operations REPORT`` writes the device and what differs to
the file REPORT. On a GPU this compiles the Triton kernels of a round.
"""

import sys

import torch
from triattention_kernels import PagedKV, RoundBatch, compact, score, select

from triattention_vllm.child_report import STEP, begin_report

_NUM_LAYERS, _NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM, _GROUP = 2, 12, 2, 16, 64, 4
# Scores err by the rounding of sums of 64 float32 products.
_TOLERANCE = 1e-4


def main(report_file: str) -> None:
    """Score, select and compact 10 blocks to 6."""
    report = begin_report(report_file)
    has_gpu = torch.cuda.is_available()
    report["device"] = torch.cuda.get_device_name() if has_gpu else "CPU"
    report["implementation"] = "triton" if has_gpu else "torch"
    report[STEP] = "score"
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_LAYERS, _NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, 2 * _HEAD_DIM)
    blocks = torch.randn(shape, generator=generator)
    num_heads = _NUM_KV_HEADS * _GROUP
    centres = torch.randn(_NUM_LAYERS, num_heads, _HEAD_DIM, generator=generator)
    angles = torch.rand(1, _NUM_LAYERS, _HEAD_DIM // 2, generator=generator)
    turns = torch.polar(torch.ones_like(angles), angles)
    norm = torch.rand(_NUM_LAYERS, num_heads, _HEAD_DIM // 2, generator=generator)
    device = "cuda" if has_gpu else "cpu"
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
    kept = select(scores, _batch(device), _BLOCK_SIZE, _NUM_KV_HEADS, "per_head")
    same = select(scores.cpu(), _batch("cpu"), _BLOCK_SIZE, _NUM_KV_HEADS, "per_head", "torch")
    report[STEP] = "compact"
    compact(PagedKV.from_blocks(own), _batch(device), kept)
    compact(PagedKV.from_blocks(blocks), _batch("cpu"), same, "torch")
    report["is_right"] = (
        report["score_error"] < _TOLERANCE
        and torch.equal(kept.cpu(), same)
        and torch.equal(own.cpu(), blocks)
    )
    report[STEP] = "done"


def _batch(device: str) -> RoundBatch:
    """One request: blocks 1 to 10 become 5 to 10, 4 tokens are protected."""
    return RoundBatch(
        source_blocks=torch.arange(1, 11, device=device).reshape(1, -1),
        destination_blocks=torch.arange(5, 11, device=device).reshape(1, -1),
        num_source_blocks=(10,),
        num_destination_blocks=(6,),
        first_candidate=(4,),
    )


if __name__ == "__main__":
    main(sys.argv[1])
