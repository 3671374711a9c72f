"""``FLASHINFER``: vLLM's backend, its name and everything else of it, on shifted rows.

Imported only where vLLM chooses this backend, since it imports the package flashinfer.
"""

import torch
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows
from triattention_vllm.engine.stored_kv import StoredKV, fp8_by_name


class CompressedFlashInferMetadataBuilder(ShiftedRows, FlashInferMetadataBuilder):
    """Builds, and plans on the host, from rows without their null head, for compressed groups.

    Its native kernels are planned from ``seq_lens_cpu_upper_bound``, which must be the device's
    own lengths: it shrinks by exactly the null heads that the scheduler sent with the step.
    """


class ObservedFlashInferImpl(ObservedQueries, FlashInferImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedFlashInferBackend(StoredKV, FlashInferBackend):
    """vLLM's ``FLASHINFER`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return ObservedFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        return CompressedFlashInferMetadataBuilder

    @classmethod
    def fp8_dtype(cls, cache_dtype: str) -> torch.dtype:
        """Source: ``FlashInferBackend.get_dtype_for_flashinfer``."""
        return fp8_by_name(cache_dtype)
