"""Attention that looks past the null head: one subclass of the platform's own backend each.

The row of a compressed request begins with null blocks and keeps its logical length. The
metadata builder shifts each row left by its leading nulls and shortens ``seq_lens`` by as many
tokens, so the kernel reads exactly the cached tokens. Slot mapping, positions and RoPE are
computed from the unshifted row and stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from triattention_vllm.engine.spec import CompressedAttentionSpec

QueryObserver = Callable[[str, torch.Tensor], None]
"""Called with a layer's name and its queries after RoPE, [n, H, D], before attention."""


@dataclass(frozen=True)
class ShiftedRows:
    """Rows without their null head.

    block_table: int32 [R, num_columns], physical block ids from the first cached token on.
    seq_lens: int32 [R], cached tokens ``C = N - E`` including the step's own.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor


def shift_rows(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int, max_seq_len: int
) -> ShiftedRows:
    """``row[r, j] <- row[r, j + e_r]``, ``seq_lens[r] <- seq_lens[r] - e_r * block_size``.

    ``e_r`` counts the leading null blocks of row r, at most ``(seq_len - 1) // block_size``:
    dummy and padded rows are all null, and entries behind a row's last block are stale.
    block_table int32 [R, >= ceil(max_seq_len / block_size)], seq_lens int32 [R]; new tensors
    are returned, the arguments stay as they are.
    """
    num_columns = -(-max_seq_len // block_size)
    rows = block_table[:, :num_columns]
    num_null = (rows == 0).to(torch.int32).cumprod(dim=1).sum(dim=1)
    num_null = torch.minimum(num_null, (seq_lens - 1).clamp(min=0) // block_size)
    columns = torch.arange(num_columns, device=rows.device) + num_null[:, None]
    shifted = rows.gather(1, columns.clamp(max=num_columns - 1))
    return ShiftedRows(shifted, (seq_lens - num_null * block_size).to(seq_lens.dtype))


class CompressedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the CPU backend's metadata from shifted rows, for compressed groups only."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """vLLM's ``build`` on rows without their null head."""
        if isinstance(self.kv_cache_spec, CompressedAttentionSpec):
            rows = shift_rows(
                common_attn_metadata.block_table_tensor,
                common_attn_metadata.seq_lens,
                self.block_size,
                common_attn_metadata.max_seq_len,
            )
            common_attn_metadata = common_attn_metadata.replace(
                block_table_tensor=rows.block_table,
                seq_lens=rows.seq_lens,
                max_seq_len=int(rows.seq_lens.max()),
            )
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class ObservedCPUImpl(CPUAttentionBackendImpl):
    """The CPU implementation; calibration may look at the queries of a plain run."""

    query_observer: QueryObserver | None = None

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's ``forward``; the observer, if any, sees the actual queries first."""
        if self.query_observer is not None and attn_metadata is not None:
            self.query_observer(layer.layer_name, query[: attn_metadata.num_actual_tokens])
        return super().forward(
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


class CompressedCPUBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with our builder and implementation; vLLM's name and everything else."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ObservedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompressedCPUMetadataBuilder


BACKENDS: dict[AttentionBackendEnum, type] = {
    AttentionBackendEnum.CPU_ATTN: CompressedCPUBackend,
}
"""Every backend that we subclass. vLLM's own choice among them is kept."""


def override_backends() -> None:
    """Put our subclass in the place of each backend, for models that are loaded from now on."""
    for member, backend in BACKENDS.items():
        register_backend(member, f"{backend.__module__}.{backend.__qualname__}")
