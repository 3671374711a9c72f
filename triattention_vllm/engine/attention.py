"""Attention that looks past the null head: what every backend subclass adds to vLLM's own.

The row of a compressed request begins with null blocks and keeps its logical length. The
metadata builder shifts each row left by its leading nulls and shortens ``seq_lens`` by as many
tokens, so the kernel reads exactly the cached tokens. Slot mapping, positions and RoPE are
computed from the unshifted row and stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from triattention_kernels import shift_rows
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from triattention_vllm.engine.null_heads import NullHeads
from triattention_vllm.engine.spec import CompressedAttentionSpec

QueryObserver = Callable[[str, torch.Tensor], None]
"""Called with a layer's name and its queries after RoPE, [n, H, D], before attention."""

RowReader = Callable[[], None]
"""Called when the batch that is about to run is known, before attention sees its queries."""

_BACKENDS = f"{__package__}.backends"
BACKENDS: dict[AttentionBackendEnum, str] = {
    AttentionBackendEnum.CPU_ATTN: f"{_BACKENDS}.cpu.CompressedCPUBackend",
    AttentionBackendEnum.FLASH_ATTN: f"{_BACKENDS}.flash_attn.CompressedFlashAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: f"{_BACKENDS}.triton_attn.CompressedTritonBackend",
    AttentionBackendEnum.FLASHINFER: f"{_BACKENDS}.flashinfer.CompressedFlashInferBackend",
    AttentionBackendEnum.ROCM_ATTN: f"{_BACKENDS}.rocm_attn.CompressedRocmBackend",
    AttentionBackendEnum.ROCM_AITER_UNIFIED_ATTN: (
        f"{_BACKENDS}.rocm_aiter_unified_attn.CompressedAiterUnifiedBackend"
    ),
    AttentionBackendEnum.ROCM_AITER_FA: f"{_BACKENDS}.rocm_aiter_fa.CompressedAiterBackend",
}
"""Every backend that we subclass, by name: a class is imported when vLLM chooses it. vLLM's own
choice among them is kept; a model that gets another one is refused by the worker."""


def override_backends() -> None:
    """Put our subclass in the place of each backend, for models that are loaded from now on."""
    for member, class_path in BACKENDS.items():
        register_backend(member, class_path)
    # An engine that this process built before has its choice remembered by class.
    _cached_get_attn_backend.cache_clear()


class ShiftedRows:
    """In front of a backend's metadata builder: it builds from rows without their null head.

    The shifted rows live in buffers of the builder, written anew by every build and never
    replaced, so captured graphs read the current step. A build of a compressed group launches
    one small kernel, and neither synchronises with the device nor branches on its data.
    """

    # vLLM would go around build() and put an unshifted table into the metadata.
    supports_update_block_table = False

    kv_cache_spec: AttentionSpec
    null_heads: NullHeads
    """What the host knows of this step's null heads; set by the worker."""

    row_reader: RowReader | None = None
    """Set by the worker where a scorer looks at queries."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.null_heads = NullHeads(kv_cache_spec.block_size)
        self._max_num_rows: int = vllm_config.scheduler_config.max_num_seqs
        self._rows: torch.Tensor | None = None
        self._seq_lens: torch.Tensor | None = None
        if isinstance(kv_cache_spec, CompressedAttentionSpec):
            # A fused draft step would advance the unshifted lengths on the device.
            self.supports_draft_decode_metadata_update = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """vLLM's ``build`` on rows without their null head."""
        if self.row_reader is not None:
            self.row_reader()
        if isinstance(self.kv_cache_spec, CompressedAttentionSpec):
            common_attn_metadata = self._shifted(common_attn_metadata)
        return super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build
        )

    def _shifted(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The same batch with shifted rows, shortened lengths and the host's view of them."""
        table, seq_lens = metadata.block_table_tensor, metadata.seq_lens
        num_rows, width = table.shape
        if self._rows is None or self._seq_lens is None:
            size = max(num_rows, self._max_num_rows)
            self._rows = torch.zeros((size, width), dtype=torch.int32, device=table.device)
            self._seq_lens = torch.zeros(size, dtype=torch.int32, device=table.device)
        block_size = self.kv_cache_spec.block_size
        shift_rows(
            table,
            seq_lens,
            block_size,
            self._rows,
            self._seq_lens,
            # Where vLLM splits the manager's blocks for the kernel, a null is several entries.
            null_below=self.null_heads.block_size // block_size,
            max_seq_len=metadata.max_seq_len,
        )
        max_seq_len, upper_bound = self.null_heads.shorten(metadata)
        return metadata.replace(
            block_table_tensor=self._rows[:num_rows],
            seq_lens=self._seq_lens[:num_rows],
            max_seq_len=max_seq_len,
            seq_lens_cpu_upper_bound=upper_bound,
            _num_computed_tokens_cache=None,
        )


def unquantised(query: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Queries [n, H, D] as the model computed them; for an fp8 KV cache vLLM may have quantised
    them before attention. scale: [] or one per KV head [H_kv] (``Attention.query_quant``)."""
    if query.itemsize > 1:
        return query
    num_heads = query.shape[1]
    per_head = scale.reshape(-1).repeat_interleave(num_heads // scale.numel())
    return query.float() * per_head[:, None]


class ObservedQueries:
    """In front of an attention implementation: calibration, and scorers that look at queries, see
    them wherever vLLM runs it outside full CUDA graphs."""

    query_observer: QueryObserver | None = None

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's ``forward``; the observer, if any, sees the actual queries first."""
        if self.query_observer is not None and attn_metadata is not None:
            seen = query[: attn_metadata.num_actual_tokens]
            self.query_observer(layer.layer_name, unquantised(seen, layer._q_scale))
        result: torch.Tensor = super().forward(  # type: ignore[misc]
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )
        return result


@contextmanager
def queries_shown(layers: Sequence[Attention], observer: QueryObserver) -> Iterator[None]:
    """``observer`` sees the queries of these layers, which have our implementations, inside the
    block and not after it."""
    try:
        for layer in layers:
            layer.impl.query_observer = observer
        yield
    finally:
        for layer in layers:
            layer.impl.query_observer = None
