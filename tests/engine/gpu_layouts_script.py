"""Tokens stored by vLLM's own Triton writers, under the interpreter, and read through our views.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process. Prints
the largest difference of each layout, relative to the token, and the sentences of the refusals.
"""

import json
from types import SimpleNamespace

import torch
import vllm.platforms

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl  # noqa: E402
from vllm.v1.attention.ops import triton_reshape_and_cache_flash as writers  # noqa: E402
from vllm.v1.attention.ops.paged_attn import PagedAttention  # noqa: E402
from vllm.v1.kv_cache_interface import get_kv_quant_mode  # noqa: E402

from triattention_vllm.engine.attention import BACKENDS  # noqa: E402
from triattention_vllm.engine.backends import rocm_aiter_fa  # noqa: E402
from triattention_vllm.engine.backends.rocm_attn import CompressedRocmBackend  # noqa: E402
from triattention_vllm.engine.backends.triton_attn import CompressedTritonBackend  # noqa: E402
from triattention_vllm.errors import UnsupportedError  # noqa: E402

# What the writers ask of a device that is not there.
torch.cuda.get_device_capability = lambda *_: (9, 0)
writers.current_platform.has_device_capability = lambda *_: True

NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 3, 2, 16, 32
CONTENT = {"int8_per_token_head": HEAD_DIM + 4, "fp8_per_token_head": HEAD_DIM + 4}
DTYPES = {"auto": torch.float32, "fp8": torch.uint8, "int8_per_token_head": torch.int8}


def differences(kv, keys, values, slots) -> list[float]:
    """Largest error over the largest element, of keys and of values."""
    one = torch.ones(kv.keys.shape[:5])
    scales = (one, one) if kv.scales is None else (kv.scales.keys, kv.scales.values)
    found = []
    for view, scale, tokens in zip((kv.keys, kv.values), scales, (keys, values), strict=True):
        numbers = view[0].float() * scale[0][..., None, None]
        by_slot = numbers.flatten(4).flatten(2, 3).transpose(1, 2).flatten(0, 1)
        error = (by_slot[slots] - tokens).abs().amax(-1) / tokens.abs().amax(-1)
        found.append(float(error.max()))
    return found


def stored(kv_dtype: str) -> list[float]:
    """Blocks as TRITON_ATTN binds them, token-major in memory (vLLM's LBNHC)."""
    dtype = DTYPES.get(kv_dtype, torch.uint8)
    content = 2 * CONTENT.get(kv_dtype, HEAD_DIM)
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, content, dtype=dtype).transpose(1, 2)
    keys, values, slots = make_tokens(scaled=kv_dtype in CONTENT)
    impl = SimpleNamespace(
        _k_scale_cache=None,
        _v_scale_cache=None,
        _kv_quant_mode=get_kv_quant_mode(kv_dtype),
        _is_per_token_head_quant=get_kv_quant_mode(kv_dtype).is_per_token_head,
        attn_type="decoder",
        head_size=HEAD_DIM,
        kv_cache_dtype=kv_dtype,
        fp8_dtype=torch.float8_e4m3fn,
    )
    for name in ("_pth_key_value_caches", "_ensure_scale_caches"):
        setattr(impl, name, getattr(TritonAttentionImpl, name).__get__(impl))
    layer = SimpleNamespace(
        _k_scale=torch.ones(()), _v_scale=torch.ones(()), kv_cache_dtype=kv_dtype
    )
    TritonAttentionImpl.do_kv_cache_update(impl, layer, keys, values, cache, slots)
    return differences(CompressedTritonBackend.paged_kv(cache[None], layer), keys, values, slots)


def stored_for_rocm() -> list[float]:
    """Blocks as ROCM_ATTN binds them, K and V outermost (LHBNC)."""
    content = NUM_HEADS * HEAD_DIM
    cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, content).transpose(0, 1)
    keys, values, slots = make_tokens()
    split = PagedAttention.split_kv_cache(cache.transpose(0, 1), NUM_HEADS, HEAD_DIM)
    one = torch.ones(())
    writers.triton_reshape_and_cache_flash(keys, values, *split, slots, "auto", one, one)
    layer = SimpleNamespace(kv_cache_dtype="auto", num_kv_heads=NUM_HEADS)
    return differences(CompressedRocmBackend.paged_kv(cache[None], layer), keys, values, slots)


def make_tokens(scaled: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers that fp8 has, the largest of them in every token, since the interpreter does not
    round to fp8 as a GPU does; scaled: times a power of two of the token and head."""
    generator = torch.Generator().manual_seed(0)
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    shape = (2, num_slots, NUM_HEADS, HEAD_DIM)
    content = (50 * torch.randn(shape, generator=generator)).to(torch.float8_e4m3fn).float()
    content[..., 5] = 448.0
    if scaled:
        content *= torch.exp2(torch.randint(-6, 7, (*shape[:3], 1), generator=generator))
    return content[0], content[1], torch.randperm(num_slots, generator=generator)


def refusal(backend, kv_dtype: str) -> str:
    """What is said of a layer with this KV dtype; empty if it is read."""
    content = 2 * NUM_HEADS * HEAD_DIM
    blocks = torch.zeros(1, NUM_BLOCKS, 1, BLOCK_SIZE, content, dtype=torch.uint8)
    layer = SimpleNamespace(kv_cache_dtype=kv_dtype, num_kv_heads=NUM_HEADS)
    try:
        backend.paged_kv(blocks, layer)
    except UnsupportedError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """fp8 of two kinds by every ROCm backend, and AITER's shuffled and interleaved blocks."""
    found = {}
    for member, path in BACKENDS.items():
        if member.name in ("ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_FA"):
            backend = resolve_obj_by_qualname(path)
            found[member.name] = refusal(backend, "fp8_e5m2")
            found[f"{member.name} fp8"] = refusal(backend, "fp8")
    packed = torch.zeros(1, NUM_BLOCKS, 2, BLOCK_SIZE, NUM_HEADS * HEAD_DIM, dtype=torch.uint8)
    layer = SimpleNamespace(kv_cache_dtype="fp8_e5m2", num_kv_heads=NUM_HEADS)
    try:
        CompressedRocmBackend.paged_kv(packed, layer)
    except UnsupportedError as error:
        found["ROCM_ATTN"] = str(error)
    shuffles = SimpleNamespace(is_shuffle_kv_cache_enabled=lambda: True)
    rocm_aiter_fa.rocm_aiter_ops, own = shuffles, rocm_aiter_fa.rocm_aiter_ops
    assert not own.is_shuffle_kv_cache_enabled()
    found["shuffled"] = refusal(rocm_aiter_fa.CompressedAiterBackend, "auto")
    implementation = CompressedRocmBackend.get_impl_cls()
    try:
        implementation.set_interleaved_v_cache(implementation.__new__(implementation))
    except UnsupportedError as error:
        found["interleaved"] = str(error)
    return found


results = {name: stored(name) for name in ("auto", "fp8", *CONTENT)}
results["rocm"] = stored_for_rocm()
print(json.dumps({"differences": results, "refusals": refusals()}))
