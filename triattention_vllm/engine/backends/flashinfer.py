"""``FLASHINFER``: vLLM's backend, its name and everything else of it, on shifted rows."""

from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)

from triattention_vllm.engine.attention import ObservedQueries, ShiftedRows


class CompressedFlashInferMetadataBuilder(ShiftedRows, FlashInferMetadataBuilder):
    """Builds from rows without their null head, for compressed groups only."""


class ObservedFlashInferImpl(ObservedQueries, FlashInferImpl):
    """The implementation; calibration may look at the queries of a plain run."""


class CompressedFlashInferBackend(FlashInferBackend):
    """vLLM's ``FLASHINFER`` with our builder and implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return ObservedFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        return CompressedFlashInferMetadataBuilder
