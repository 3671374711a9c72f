"""The spec tells vLLM the truth about memory, and only plain full attention gets it."""

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool_world import PoolWorld
from vllm.v1.core.kv_cache_utils import is_kv_cache_spec_uniform
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from triattention_vllm.config import Settings
from triattention_vllm.engine.backends.cpu import CompressedCPUMetadataBuilder
from triattention_vllm.engine.kv_manager import CompressedKVCacheManager
from triattention_vllm.engine.spec import (
    CompressedAttentionSpec,
    compressed_block_size,
    compressed_specs,
    group_capacity,
)
from triattention_vllm.errors import SettingsError, UnsupportedError

SETTINGS = Settings(budget=1024)


def full_attention(**changes: Any) -> FullAttentionSpec:
    given = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    return FullAttentionSpec(**{**given, **changes})


def sliding_window() -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=128
    )


def compressed(**changes: Any) -> CompressedAttentionSpec:
    base = full_attention(**changes)
    return CompressedAttentionSpec.from_full_attention(base, SETTINGS, 512)


def engine_config(max_model_len: int) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )


def test_sliding_window_layers_keep_vllms_own_spec_and_manager() -> None:
    """Regression: sliding-window groups were compacted through their null blocks."""
    specs: dict[str, KVCacheSpec] = {
        "full": full_attention(),
        "window": sliding_window(),
    }
    ours = compressed_specs(specs, SETTINGS, 512)
    assert type(ours["full"]) is CompressedAttentionSpec
    assert KVCacheSpecRegistry.get_manager_class(ours["full"]) is CompressedKVCacheManager
    assert KVCacheSpecRegistry.get_manager_class(ours["window"]) is SlidingWindowManager
    assert {name for name in specs if ours[name] is specs[name]} == set(specs) - {"full"}

    assert not is_kv_cache_spec_uniform(dict(ours))
    assert not is_kv_cache_spec_uniform(dict(reversed(ours.items())))


@pytest.mark.parametrize(
    "other",
    [{"sliding_window": 128}, {"attention_chunk_size": 128}, {"non_causal": True}],
)
def test_windowed_layers_that_would_share_a_group_are_refused(other: dict[str, Any]) -> None:
    specs: dict[str, KVCacheSpec] = {"full": full_attention(), "other": full_attention(**other)}
    with pytest.raises(UnsupportedError, match="'other'.*see a window"):
        compressed_specs(specs, SETTINGS, 512)


def test_a_block_size_that_leaves_no_candidate_is_refused_before_serving() -> None:
    with pytest.raises(SettingsError, match="in blocks of 1056"):
        PoolWorld(Settings(), 1056, 20)


def test_rows_of_a_sliding_window_group_are_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a sliding-window row begins with nulls too, and its kernel expects them."""
    seen = []
    parent = CompressedCPUMetadataBuilder.__mro__[2]
    monkeypatch.setattr(parent, "build", lambda self, prefix, metadata, fast: seen.append(metadata))
    builder = CompressedCPUMetadataBuilder.__new__(CompressedCPUMetadataBuilder)
    builder.kv_cache_spec = sliding_window()
    metadata = object()
    builder.build(0, metadata)
    assert seen == [metadata]


def test_a_request_longer_than_the_pool_fits() -> None:
    spec = compressed()
    short, long = engine_config(800), engine_config(1_000_000)
    assert spec.max_memory_usage_bytes(short) == full_attention().max_memory_usage_bytes(short)
    blocks = spec.max_blocks_per_request(spec.policy)
    assert blocks == -(-(1024 + 128 + 512) // 16)
    assert spec.max_memory_usage_bytes(long) == blocks * spec.page_size_bytes


def test_pages_are_those_of_full_attention() -> None:
    assert compressed().page_size_bytes == full_attention().page_size_bytes
    assert compressed(page_size_padded=1 << 20).page_size_bytes == 1 << 20


def test_an_all_prompt_request_is_bounded_by_the_model_alone() -> None:
    settings = Settings(budget=1024, protect="all_prompt")
    spec = CompressedAttentionSpec.from_full_attention(full_attention(), settings, 512)
    config = engine_config(8192)
    assert spec.max_blocks_per_request(spec.policy) is None
    assert spec.max_memory_usage_bytes(config) == full_attention().max_memory_usage_bytes(config)


def test_layers_of_one_group_merge_into_our_spec() -> None:
    specs: dict[str, KVCacheSpec] = {f"layer{i}": compressed() for i in range(3)}
    assert UniformTypeKVCacheSpecs.is_uniform_type(specs)
    merged = CompressedAttentionSpec.merge([compressed() for _ in range(3)])
    assert merged == compressed()
    other = replace(compressed(), settings=Settings(budget=2048))
    with pytest.raises(AssertionError, match="same settings"):
        CompressedAttentionSpec.merge([compressed(), other])


def test_the_spec_survives_a_new_block_size_and_the_way_to_the_engine_core() -> None:
    spec = compressed().copy_with_new_block_size(64)
    assert spec.policy.block_size == 64
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is FullAttentionSpec


def groups(*specs: KVCacheSpec) -> KVCacheConfig:
    return KVCacheConfig(
        num_blocks=101,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)],
    )


def linear_state(block_size: int) -> MambaSpec:
    """A state that is one block of as many tokens."""
    return MambaSpec(block_size=block_size, shapes=((4, 4),), dtypes=(torch.float32,))


def test_groups_that_are_not_compressed_may_have_blocks_of_any_size() -> None:
    config = groups(linear_state(4096), compressed(), compressed())
    assert compressed_block_size(config) == 16
    vllm_config: Any = SimpleNamespace(
        **vars(engine_config(4096)),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        num_lookahead_tokens=0,
    )
    capacity = group_capacity(vllm_config, config)
    assert (capacity.num_blocks, capacity.block_size) == ((101 - 1 - 1) // 2, 16)
    assert capacity.max_in_flight_tokens == 512


def test_compressed_groups_with_blocks_of_different_sizes_are_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"blocks of \[16, 32\] tokens.*cannot be compressed"
    ):
        compressed_block_size(groups(compressed(), compressed(block_size=32)))
