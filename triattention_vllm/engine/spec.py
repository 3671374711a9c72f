"""The KV-cache spec of a compressed layer: same pages as full attention, a bounded request."""

from dataclasses import dataclass
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_manager import CompressedKVCacheManager
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.policy import Policy
from triattention_vllm.request import Capacity


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """``FullAttentionSpec`` whose requests hold at most budget + interval + in-flight tokens.

    settings, max_in_flight_tokens: baked in, because vLLM hands neither to the manager that it
    builds from this spec (``get_manager_for_kv_cache_spec``).
    """

    settings: Settings
    max_in_flight_tokens: int

    @classmethod
    def from_full_attention(
        cls, spec: FullAttentionSpec, settings: Settings, max_in_flight_tokens: int
    ) -> Self:
        """Same pages as ``spec``, compressed under ``settings``."""
        return cls(**vars(spec), settings=settings, max_in_flight_tokens=max_in_flight_tokens)

    @property
    def policy(self) -> Policy:
        """When rounds are due for requests of this spec, in blocks of its size."""
        return self.settings.policy(self.block_size)

    def max_blocks_per_request(self, policy: Policy | None) -> int | None:
        """Most blocks one request under ``policy`` holds at once, or None where nothing bounds
        them: it has no rounds, or the prompt alone decides."""
        if policy is None:
            return None
        max_tokens = policy.max_cached_tokens(self.max_in_flight_tokens)
        return None if max_tokens is None else cdiv(max_tokens, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request of ``max_model_len`` needs; vLLM sizes the pool with it."""
        full = super().max_memory_usage_bytes(vllm_config)
        max_blocks = self.max_blocks_per_request(self.policy)
        return full if max_blocks is None else min(full, max_blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group of layers; all of them must be compressed the same way."""
        first = specs[0]
        # vLLM asks whether layers fit into one group by merging them, and reads AssertionError
        # as "no".
        assert all(type(spec) is cls for spec in specs), (
            "layers that are compressed and layers that are not cannot share a KV cache group"
        )
        assert all(
            (spec.settings, spec.max_in_flight_tokens)
            == (first.settings, first.max_in_flight_tokens)
            for spec in specs
        ), "all layers of one KV cache group must be compressed with the same settings"
        base = FullAttentionSpec.merge([FullAttentionSpec(**_base_fields(spec)) for spec in specs])
        return cls.from_full_attention(base, first.settings, first.max_in_flight_tokens)


def _base_fields(spec: CompressedAttentionSpec) -> dict[str, object]:
    own = {"settings", "max_in_flight_tokens"}
    return {name: value for name, value in vars(spec).items() if name not in own}


def compressed_specs(
    specs: dict[str, KVCacheSpec], settings: Settings, max_in_flight_tokens: int
) -> dict[str, KVCacheSpec]:
    """Replace every plain full-attention spec by ours; all other layers stay as they are.

    Raises UnsupportedError where windowed layers were given full-attention specs (the hybrid
    KV cache manager is off): vLLM would put them into one group with the others.
    """
    windowed = [
        name
        for name, spec in specs.items()
        if type(spec) is FullAttentionSpec and not _is_plain(spec)
    ]
    if windowed and len(windowed) < len(specs):
        raise UnsupportedError(
            f"layers {windowed} see a window but are cached as full attention, so they would "
            "share blocks with compressed layers; leave --disable-hybrid-kv-cache-manager out, "
            "or start without --kv-compression"
        )
    return {
        name: CompressedAttentionSpec.from_full_attention(spec, settings, max_in_flight_tokens)
        if type(spec) is FullAttentionSpec and _is_plain(spec)
        else spec
        for name, spec in specs.items()
    }


def _is_plain(spec: FullAttentionSpec) -> bool:
    """Full attention over all tokens: no window, no chunks, causal."""
    return spec.sliding_window is None and spec.attention_chunk_size is None and not spec.non_causal


def compressed_spec(group: KVCacheGroupSpec) -> CompressedAttentionSpec | None:
    """The spec of a compressed group on this rank, or None for any other group.

    Layers of different heads (a model and its draft model) share a group and a row of blocks but
    have a spec each; block size and settings are the same, so the first one stands for all.
    Raises UnsupportedError where only some layers of a group are compressed.
    """
    specs = _layer_specs(group.kv_cache_spec) if group.layer_names else []
    ours = [spec for spec in specs if isinstance(spec, CompressedAttentionSpec)]
    if ours and len(ours) < len(specs):
        kinds = sorted({type(spec).__name__ for spec in specs})
        raise UnsupportedError(
            f"a KV cache group mixes layers that can be compressed with others ({kinds}), and all "
            "of them share a row of blocks; start without --kv-compression"
        )
    return ours[0] if ours else None


def compressed_block_size(config: KVCacheConfig) -> int:
    """Tokens of a block in the groups that are compressed; the others may have any size.

    Raises UnsupportedError where compressed groups differ: their rounds would evict unequal
    numbers of tokens, and a request's own budget could not be counted in blocks.
    """
    sizes = {spec.block_size for spec in _compressed_specs(config)}
    if len(sizes) != 1:
        raise UnsupportedError(
            f"KV cache groups that would be compressed have blocks of {sorted(sizes)} tokens, and "
            "compression needs one size for all of them; this model cannot be compressed yet, "
            "start without --kv-compression"
        )
    (size,) = sizes
    return size


def group_capacity(vllm_config: VllmConfig, config: KVCacheConfig) -> Capacity:
    """What the pool holds of one request in each compressed group: these groups take equal parts
    of it, behind what all others need for a request of ``max_model_len``."""
    own = _compressed_specs(config)
    others = sum(
        blocks_without_compression(group.kv_cache_spec, vllm_config)
        for group in config.kv_cache_groups
        if not isinstance(_layer_specs(group.kv_cache_spec)[0], CompressedAttentionSpec)
    )
    return Capacity(
        num_blocks=(config.num_blocks - 1 - others) // len(own),
        block_size=compressed_block_size(config),
        max_model_len=vllm_config.model_config.max_model_len,
        max_in_flight_tokens=own[0].max_in_flight_tokens,
        num_lookahead_tokens=vllm_config.num_lookahead_tokens,
    )


def blocks_without_compression(spec: KVCacheSpec, vllm_config: VllmConfig) -> int:
    """Most blocks that one request holds in a group that is not compressed."""
    return cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)


def _compressed_specs(config: KVCacheConfig) -> list[CompressedAttentionSpec]:
    """One spec of each compressed group, also of groups that have no layers on this rank."""
    first = [_layer_specs(group.kv_cache_spec)[0] for group in config.kv_cache_groups]
    return [spec for spec in first if isinstance(spec, CompressedAttentionSpec)]


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    """The specs of a group's layers, or the one that all of them share."""
    return list(
        spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    )


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    CompressedAttentionSpec,
    manager_class=CompressedKVCacheManager,
    uniform_type_base_spec=FullAttentionSpec,
)
