"""Score, select and compact paged KV caches: the three operations of a round."""

from triattention_kernels.compact import compact
from triattention_kernels.errors import ArgumentError
from triattention_kernels.paged import PagedKV, RoundBatch, stack_layers
from triattention_kernels.score import score
from triattention_kernels.select import Selection, select

__all__ = [
    "ArgumentError",
    "PagedKV",
    "RoundBatch",
    "Selection",
    "compact",
    "score",
    "select",
    "stack_layers",
]
