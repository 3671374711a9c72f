"""One batch of rounds on the device: score, select, compact."""

from collections.abc import Sequence

import torch
from triattention_kernels import PagedKV, RoundBatch, Selection, compact, fill_holes, select

from triattention_vllm.config import Compaction
from triattention_vllm.method.scorer import Scorer


def run_rounds(
    kv: PagedKV,
    batch: RoundBatch,
    boundaries: Sequence[int],
    scorer: Scorer,
    selection: Selection,
    compaction: Compaction,
) -> torch.Tensor:
    """Evict the lowest-scored candidates of every request in the batch, in place.

    boundaries: ``N*`` of each request, the logical position of its next query. Modifies the
    destination blocks of ``kv``. Returns what was kept of each region, ascending region token
    indices int64 [R, L, H_kv, destination tokens]. Every step depends on the nominal boundary
    and the cached keys alone, so the same inputs give the same survivors. The operations make at
    most six launches on a GPU: holes are filled only where tokens move in place, since through
    scratch memory all of them move anyway.
    """
    scores = scorer.scores(kv, batch, boundaries)
    kept = select(scores, batch, kv.block_size, kv.num_kv_heads, selection)
    in_order = compaction == "repack" or not batch.moves_forward
    compact(kv, batch, kept if in_order else fill_holes(kept, batch, kv.block_size))
    return kept
