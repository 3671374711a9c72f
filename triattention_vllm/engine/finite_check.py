"""A few tokens through the model at start: one that computes NaN is refused before it serves.

Keys of such a model have no ranking, and vLLM itself would serve it. Where statistics are being
made the calibration sees the same; this is for the starts that find them, or need none.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig

from triattention_vllm.engine.attention import queries_shown
from triattention_vllm.engine.calibration_run import EngineWorker, run_segment
from triattention_vllm.engine.ranks import gather_from_all_ranks
from triattention_vllm.errors import UnsupportedError

_NUM_TOKENS = 8


def refuse_nan(
    worker: EngineWorker, kv_cache_config: KVCacheConfig, layer_names: Sequence[str]
) -> None:
    """Raise UnsupportedError, on every rank, where queries of these layers are NaN or infinite.

    Called when the KV cache is allocated and no request is scheduled. Collective. A layer whose
    implementation is not called (full CUDA graphs) is not seen.
    """
    layers: Mapping[str, Attention] = worker.vllm_config.compilation_config.static_forward_context
    not_finite: list[str] = []

    def observe(layer_name: str, query: Tensor) -> None:
        if not bool(query.isfinite().all()):
            not_finite.append(layer_name)

    with queries_shown([layers[name] for name in layer_names], observe):
        run_segment(worker, list(range(_NUM_TOKENS)), kv_cache_config)
    found = [name for names in gather_from_all_ranks(not_finite) for name in names]
    if found:
        raise UnsupportedError(
            f"the model computes NaN or infinity in the queries of {found[0]}"
            f"{f' and {len(found) - 1} more layers' if len(found) > 1 else ''}; its weights are "
            "damaged or overflow at this dtype: check the checkpoint, or set --dtype"
        )
