"""A cache whose layers or blocks lie further apart than 32-bit offsets reach.

The pages between them are never touched, so they cost address space only. To be called where the
kernels run: such a cache cannot be copied.
"""

import torch
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch, compact_triton, score_triton

SHAPE = (3, 3, 1, 4, 32)  # L, blocks, H_kv, block size, 2 * D
FAR = 2**30 + 16  # fits in 32 bits; twice as far does not


def far_round(content: Tensor, centres: Tensor, is_layer: bool) -> tuple[Tensor, Tensor]:
    """Scores of block 2, and the cache after block 2 was copied to block 0.

    content: fp8 of SHAPE, stored with FAR bytes between the layers, or else between the blocks.
    """
    device, near = content.device, SHAPE[3] * SHAPE[4]
    storage = torch.UntypedStorage(2 * FAR + 3 * near, device=device)
    flat = torch.tensor([], dtype=torch.uint8, device=device).set_(storage)
    strides = (FAR, near) if is_layer else (near, FAR)
    blocks = flat.as_strided(SHAPE, (*strides, near, SHAPE[4], 1))
    blocks.copy_(content.view(torch.uint8))
    source, destination = (torch.tensor([[block]], device=device) for block in (2, 0))
    batch = RoundBatch(source, destination, (1,), (1,), (0,))
    kv = PagedKV.from_blocks(blocks.view(content.dtype))
    no_norms = torch.zeros(SHAPE[0], 1, 0, device=device)
    no_turns = torch.zeros(1, SHAPE[0], 0, device=device, dtype=torch.complex64)
    scores = score_triton.score(kv, batch, centres, no_norms, no_turns, False, 0)
    kept = torch.arange(SHAPE[3], device=device).expand(1, SHAPE[0], 1, SHAPE[3])
    compact_triton.compact(kv, batch, kept)
    return scores, blocks.contiguous()
