"""Checks of the operations' arguments; none of them reads device memory."""

import torch
from torch import Tensor

from triattention_kernels.errors import ArgumentError
from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
SCORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8_DTYPES)
SCALED_DTYPES = (torch.int8, *FP8_DTYPES)


def check_batch(batch: RoundBatch, block_size: int, device: torch.device) -> None:
    """Raise ArgumentError unless every round of ``batch`` is possible with this block size."""
    num_requests = batch.num_requests
    for name, blocks, counts in (
        ("source_blocks", batch.source_blocks, batch.num_source_blocks),
        ("destination_blocks", batch.destination_blocks, batch.num_destination_blocks),
    ):
        check_tensor(name, blocks, (num_requests, None), (torch.int64,), device)
        if len(counts) != num_requests or any(n < 1 or n > blocks.shape[1] for n in counts):
            raise ArgumentError(
                f"num_{name} is {counts}; one count per request ({num_requests}), each from 1"
                f" to the row length {blocks.shape[1]}, is needed"
            )
    for idx, (num_destination, num_source) in enumerate(
        zip(batch.num_destination_blocks, batch.num_source_blocks, strict=True)
    ):
        if num_destination > num_source:
            raise ArgumentError(
                f"request {idx} keeps {num_destination} blocks of {num_source}; at most all of"
                " its source blocks can be kept"
            )
    num_kept = [num_blocks * block_size for num_blocks in batch.num_destination_blocks]
    if len(batch.first_candidate) != num_requests or any(
        first < 0 or first >= kept
        for first, kept in zip(batch.first_candidate, num_kept, strict=True)
    ):
        raise ArgumentError(
            f"first_candidate is {batch.first_candidate}; one per request ({num_requests}), each"
            f" from 0 to less than the tokens that the request keeps {num_kept}, is needed: a"
            " round keeps its protected tokens and at least one candidate"
        )


def check_score(
    kv: PagedKV,
    batch: RoundBatch,
    centres: Tensor,
    norm_weights: Tensor,
    turns: Tensor,
    rotary_dim: int,
) -> None:
    """Raise ArgumentError unless the arguments of ``score`` fit each other."""
    device = kv.keys.device
    check_batch(batch, kv.block_size, device)
    check_stored(kv, "keys", "scored")
    if rotary_dim < 0 or rotary_dim % 2 or rotary_dim > kv.head_dim:
        raise ArgumentError(
            f"rotary_dim is {rotary_dim}; an even number from 0 to the head dim {kv.head_dim}"
            " is needed"
        )
    real = (torch.float32, torch.float64)
    num_layers, num_frequencies = kv.num_layers, rotary_dim // 2
    check_tensor("centres", centres, (num_layers, None, kv.head_dim), real, device)
    num_heads = centres.shape[1]
    check_groups(num_heads, kv.num_kv_heads)
    frequencies = (num_layers, num_heads, num_frequencies)
    check_tensor("norm_weights", norm_weights, frequencies, real, device)
    shape = (batch.num_requests, num_layers, num_frequencies)
    check_tensor("turns", turns, shape, (centres.dtype.to_complex(),), device)


def check_redundancy(kv: PagedKV, batch: RoundBatch) -> None:
    """Raise ArgumentError unless the arguments of ``redundancy`` fit each other."""
    check_batch(batch, kv.block_size, kv.values.device)
    check_stored(kv, "values", "compared")


def check_select(
    scores: Tensor,
    batch: RoundBatch,
    block_size: int,
    num_kv_heads: int,
    kv: PagedKV | None,
) -> None:
    """Raise ArgumentError unless the arguments of ``select`` fit each other. kv: whose redundancy
    is taken off."""
    check_batch(batch, block_size, scores.device)
    num_tokens = batch.source_blocks.shape[1] * block_size
    shape = (batch.num_requests, None, None, num_tokens)
    check_tensor("scores", scores, shape, (torch.float32, torch.float64), scores.device)
    check_groups(scores.shape[2], num_kv_heads)
    if kv is None:
        return
    check_redundancy(kv, batch)
    given = (scores.shape[1], num_kv_heads, block_size)
    if (kv.num_layers, kv.num_kv_heads, kv.block_size) != given:
        raise ArgumentError(
            f"the cache has (L, H_kv, block size) {kv.num_layers, kv.num_kv_heads, kv.block_size},"
            f" the scores {given}; give the cache that was scored"
        )


def check_compact(kv: PagedKV, batch: RoundBatch, kept: Tensor) -> None:
    """Raise ArgumentError unless the arguments of ``compact`` fit each other."""
    check_batch(batch, kv.block_size, kv.keys.device)
    num_kept = batch.destination_blocks.shape[1] * kv.block_size
    shape = (batch.num_requests, kv.num_layers, kv.num_kv_heads, num_kept)
    check_tensor("kept", kept, shape, (torch.int64,), kv.keys.device)


def check_stored(kv: PagedKV, what: str, done: str) -> None:
    """Raise ArgumentError unless the cache's numbers can be read; the sentence says that ``what``
    is in it cannot be ``done``."""
    allowed = SCORED_DTYPES if kv.scales is None else SCALED_DTYPES
    if kv.keys.dtype not in allowed:  # values have the same
        raise ArgumentError(
            f"{what} of dtype {_names((kv.keys.dtype,))} cannot be {done}"
            f" {'without' if kv.scales is None else 'with'} a scale for every token and head;"
            f" allowed are {_names(allowed)}: view quantised bytes as the numbers they stand for"
        )


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise ArgumentError unless every KV head serves the same number of query heads."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ArgumentError(
            f"{num_heads} query heads cannot be grouped over {num_kv_heads} KV heads; a multiple"
            " is needed"
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ArgumentError unless ``tensor`` has this shape (None: any size), dtype, device."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(
        want is not None and size != want for size, want in zip(found, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArgumentError(f"{name} has shape {list(found)}; [{wanted}] is needed")
    if tensor.dtype not in dtypes:
        raise ArgumentError(f"{name} is {_names((tensor.dtype,))}; allowed are {_names(dtypes)}")
    if tensor.device != device:
        raise ArgumentError(f"{name} is on {tensor.device}; {device} is needed")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
