"""Move the kept tokens of a batch of rounds into their destination blocks."""

from torch import Tensor

from triattention_kernels import compact_torch
from triattention_kernels.checks import check_compact
from triattention_kernels.implementation import Implementation, choose
from triattention_kernels.paged import PagedKV
from triattention_kernels.round_batch import RoundBatch


def compact(
    kv: PagedKV,
    batch: RoundBatch,
    kept: Tensor,
    implementation: Implementation | None = None,
) -> None:
    """Slot j of a request's destination blocks receives its region token ``kept[r, l, h, j]``,
    keys and values and their scales, for every layer and KV head, bit-exact in any dtype.

    Writes ``kv`` in place, whole destination blocks and nothing else. Every read of the batch
    comes before its first write, so a destination may be a source of the same or of another
    request.

    kept: [R, L, H_kv, M_max * block_size] int64, region token indices as ``select`` returns
        them; entries past a request's ``num_destination_blocks * block_size`` are not read.
        Ascending, or in the order of ``fill_holes``, where ``batch.moves_forward``.
    implementation: None for the device's own (``implementation.choose``).
    Does not synchronise with the device. Moves ``2 * 2 * L * H_kv * D`` elements per kept token
    (keys and values, read and written), and as many times 4 bytes of scales where there are any.
    Raises ArgumentError.
    """
    check_compact(kv, batch, kept)
    if choose(implementation, kv.keys.device) == "triton":
        from triattention_kernels import compact_triton

        compact_triton.compact(kv, batch, kept)
    else:
        compact_torch.compact(kv, batch, kept)
