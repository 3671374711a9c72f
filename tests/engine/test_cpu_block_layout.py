"""Blocks written by vLLM's own CPU operation, read through our views."""

import pytest
import torch
from dense_reference import fp8_e4m3, fp8_e5m2
from triattention_kernels import PagedKV

ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")

NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE = 3, 2, 32

CASES = [
    ("vec", torch.float32, 64),
    ("vec", torch.float16, 64),
    ("vec", torch.bfloat16, 64),
    ("vec16", torch.float32, 80),
    ("amx", torch.bfloat16, 64),
    ("amx", torch.bfloat16, 128),
]


@pytest.mark.parametrize(("isa", "dtype", "head_dim"), CASES)
def test_views_read_what_vllm_packed(isa, dtype, head_dim):
    if isa == "amx":
        if not torch.cpu._is_amx_tile_supported():
            pytest.skip("this processor has no AMX tiles")
        torch.cpu._init_amx()
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, num_slots, NUM_KV_HEADS, head_dim), generator=generator).to(
        dtype
    )
    slot_mapping = torch.randperm(num_slots, generator=generator)
    blocks = torch.full((NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * head_dim), torch.nan).to(dtype)
    packed_keys, packed_values = blocks.view(NUM_BLOCKS, NUM_KV_HEADS, 2 * BLOCK_SIZE, -1).chunk(
        2, dim=2
    )
    ops.cpu_attn_reshape_and_cache(keys, values, packed_keys, packed_values, slot_mapping, isa)

    kv = PagedKV.from_cpu_layout(blocks[None], isa)
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, head_dim)
    for view, tokens in ((kv.keys, keys), (kv.values, values)):
        by_slot = view[0].reshape(shape).transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_slot[slot_mapping], tokens)


@pytest.mark.parametrize(
    ("kv_dtype", "number", "stored"),
    [("fp8", torch.float8_e4m3fn, fp8_e4m3), ("fp8_e5m2", torch.float8_e5m2, fp8_e5m2)],
)
@pytest.mark.parametrize(("isa", "dtype"), [("vec", torch.float32), ("amx", torch.bfloat16)])
def test_fp8_bytes_are_read_as_the_numbers_that_vllm_stored(isa, dtype, kv_dtype, number, stored):
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX tiles")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's CPU build stores fp8 with AVX-512 only")
    num_slots, head_dim = NUM_BLOCKS * BLOCK_SIZE, 64
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, num_slots, NUM_KV_HEADS, head_dim), generator=generator)
    keys, values = (10 * keys).to(dtype), values.to(dtype)
    slot_mapping = torch.randperm(num_slots, generator=generator)
    blocks = torch.full((NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * head_dim), 0x7F).byte()
    packed = blocks.view(NUM_BLOCKS, NUM_KV_HEADS, 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *packed, slot_mapping, isa, kv_cache_dtype=kv_dtype
    )

    kv = PagedKV.from_cpu_layout(blocks[None].view(number), isa)
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, head_dim)
    for view, tokens in ((kv.keys, keys), (kv.values, values)):
        by_slot = view[0].double().reshape(shape).transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_slot[slot_mapping], stored(tokens.double()))
