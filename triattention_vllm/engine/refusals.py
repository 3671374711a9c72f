"""What cannot run together with KV compression, refused at start with one sentence each."""

from collections.abc import Collection, Iterator, Mapping

import vllm.envs as envs
from torch import nn
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from triattention_vllm.config import Settings
from triattention_vllm.engine.differences import (
    CPU_BUILD_VERIFIES_DRAFTS,
    RUNNER_V2_KNOWS_THE_CPU,
    STAGED_WRITES_GROW,
)
from triattention_vllm.engine.drafts import SPECULATIVE_METHODS
from triattention_vllm.engine.stored_kv import KV_DTYPES
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.scorers import OBSERVING_SCORERS

_OWN_DRAFTERS = ("gemma4_mtp", "step3p5_mtp")
"""Draft configurations that vLLM does not run through the proposer of all other MTP layers: their
layers lie in several KV-cache groups."""

REDUNDANCY_CAPABILITY = 80
"""CUDA compute capability, times ten. Before it a block has 64 KB of shared memory, and the kernel
of redundancy takes up to 96."""

_READ_MODES = {get_kv_quant_mode(name) for name in KV_DTYPES}


def refuse_unsupported(vllm_config: VllmConfig, settings: Settings) -> None:
    """Raise ``UnsupportedError`` naming everything in the configuration that stands against
    compression, or return."""
    _raise_all(_config_refusals(vllm_config, settings))


def refuse_unsupported_layers(layers: Mapping[str, nn.Module]) -> None:
    """Raise ``UnsupportedError`` for layers that would be compressed and cannot be.

    layers: name -> module of every layer that vLLM gives a plain full-attention cache, and of
    those that read one of these caches.
    """
    if not layers:
        raise UnsupportedError(
            "KV compression works on full-attention layers and this model has none, or none on one "
            "of its pipeline stages; start it without --kv-compression, or with fewer stages"
        )
    _raise_all(
        f"layer {name}: {reason}"
        for name, layer in layers.items()
        for reason in _layer_refusals(layer)
    )


def layers_sharing_a_cache(layers: Mapping[str, nn.Module], owners: Collection[str]) -> list[str]:
    """Names of the layers that read the cache of one of ``owners`` instead of their own. vLLM
    gives them no cache, so they are not among those that would be compressed."""
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, Attention) and layer.kv_sharing_target_layer_name in owners
    ]


def _raise_all(refusals: Iterator[str]) -> None:
    found = list(refusals)
    if found:
        raise UnsupportedError(
            "KV compression cannot run here: "
            + "; ".join(found)
            + ". Change that, or start without --kv-compression"
        )


def _config_refusals(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    yield from _model_refusals(vllm_config.model_config)
    yield from _parallel_refusals(vllm_config, settings)
    yield from _speculation_refusals(vllm_config.speculative_config)
    if settings.method in OBSERVING_SCORERS:
        yield from _observation_refusals(vllm_config, settings)
    yield from _cache_refusals(vllm_config, settings)
    yield from _device_refusals(settings)
    if envs.VLLM_USE_RUST_FRONTEND:
        yield (
            "the Rust frontend does not check kv_budget and has none of our metrics; "
            "unset VLLM_USE_RUST_FRONTEND"
        )
    on_cpu = _is_on_cpu(vllm_config)
    if vllm_config.speculative_config is not None and on_cpu and not CPU_BUILD_VERIFIES_DRAFTS:
        yield "vLLM 0.30 fails on the CPU at its first draft; use another release for drafts"
    if vllm_config.use_v2_model_runner and on_cpu and not (HAS_TRITON and RUNNER_V2_KNOWS_THE_CPU):
        yield (
            "model runner V2 runs on the CPU from vLLM 0.32 on where vLLM finds a Triton for it; "
            "set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    elif vllm_config.use_v2_model_runner and not STAGED_WRITES_GROW:
        yield (
            "model runner V2 has no room for a round's rows before vLLM 0.30; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, or install vLLM 0.30 or newer"
        )


def _device_refusals(settings: Settings) -> Iterator[str]:
    if not settings.redundancy or not current_platform.is_cuda():
        return
    if not current_platform.has_device_capability(REDUNDANCY_CAPABILITY):
        yield (
            "score_redundancy needs a GPU of compute capability 8.0 or newer: on an older one its "
            "kernel finds too little shared memory; set it to 0"
        )


def _is_on_cpu(vllm_config: VllmConfig) -> bool:
    return bool(vllm_config.device_config.device_type == "cpu")


def _model_refusals(model: ModelConfig) -> Iterator[str]:
    if model.runner_type != "generate":
        yield f"the model runs as {model.runner_type!r} and only text generation can be compressed"
    if model.use_mla:
        yield "the model uses multi-head latent attention, whose cache has no per-head keys"
    if model.is_encoder_decoder:
        yield "the model is an encoder-decoder and cross-attention is not compressed"
    if model.is_mm_prefix_lm:
        yield "the model attends in both directions inside images, by token position"
    if model.rswa_window is not None:
        yield "the model's sliding windows (R-SWA) keep the prompt by token position"


def _parallel_refusals(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism splits a request's tokens over ranks; set its size to 1"
    if parallel.distributed_executor_backend == "ray":
        yield "the Ray executor has not been verified with compression; use the 'mp' executor"
    if parallel.enable_elastic_ep:
        yield "elastic expert parallelism warms up again while requests hold blocks; turn it off"
    if parallel.use_ubatching:
        yield "micro-batching (DBO) splits a step that calibration reads in one piece; turn it off"
    if settings.selection == "union" and parallel.world_size > 1:
        yield "selection 'union' needs all heads and layers on one rank; use per_head"


def _cache_refusals(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector loads and saves blocks by token position; unset kv_transfer_config"
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in KV_DTYPES:
        yield f"keys of KV dtype {cache_dtype!r} cannot be read; allowed: {', '.join(KV_DTYPES)}"
    elif get_kv_quant_mode(cache_dtype).is_per_token_head and _is_on_cpu(vllm_config):
        yield f"KV dtype {cache_dtype!r} is one of TRITON_ATTN's; on the CPU set fp8 or auto"
    if (
        settings.score_normalise == "none"
        and get_kv_quant_mode(cache_dtype) == KVQuantMode.FP8_PER_TENSOR
    ):
        yield (
            "score_normalise 'none' compares layers by the length of their keys, and the scales of "
            "fp8 keys are not read; leave it at 'heads', or set --kv-cache-dtype auto"
        )


def _speculation_refusals(config: SpeculativeConfig | None) -> Iterator[str]:
    """Drafts that have been verified propose one chain of tokens, from no cache or from one that
    is read through rows like the model's own."""
    if config is None:
        return
    if config.method not in SPECULATIVE_METHODS:
        yield (
            f"speculative method {config.method!r} has not been verified with compression; "
            f"allowed: {SPECULATIVE_METHODS}"
        )
    elif config.method == "mtp" and config.draft_model_config.hf_config.model_type in _OWN_DRAFTERS:
        yield "MTP layers with a drafter of their own in vLLM have not been verified; turn it off"
    elif config.parallel_drafting:
        yield "parallel drafting has not been verified with compression; turn it off"


def _observation_refusals(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    """A scorer that looks at queries runs where the host sees every query and its position."""
    method = f"method {settings.method!r} looks at queries"
    num_queries = OBSERVING_SCORERS[settings.method].num_queries
    if settings.min_window < num_queries:
        yield (
            f"{method}, the last {num_queries} before a round, which have to be behind every "
            f"candidate; raise window from {settings.min_window} to {num_queries} or more"
        )
    graphs = vllm_config.compilation_config.cudagraph_mode
    if graphs.has_full_cudagraphs():
        yield (
            f"{method}, which nothing can see inside full CUDA graphs (cudagraph_mode="
            f"{graphs.name}); set cudagraph_mode to PIECEWISE with --compilation-config"
        )
    if vllm_config.speculative_config is not None:
        yield f"{method}, and under speculation the host does not know their positions; turn it off"
    if get_kv_quant_mode(vllm_config.cache_config.cache_dtype) == KVQuantMode.FP8_PER_TENSOR:
        yield f"{method}, and the scales of fp8 keys are not read; set --kv-cache-dtype auto"


def _layer_refusals(layer: nn.Module) -> Iterator[str]:
    if not isinstance(layer, Attention):
        yield f"{type(layer).__name__} is not vLLM's Attention"
        return
    if layer.attn_type != AttentionType.DECODER:
        yield f"attention type {layer.attn_type!r} is not causal self-attention"
    if layer.kv_sharing_target_layer_name is not None:
        yield f"it shares the KV cache of {layer.kv_sharing_target_layer_name}"
    if layer.head_size != layer.head_size_v:
        yield f"keys have {layer.head_size} dimensions and values {layer.head_size_v}"
    if layer.impl.alibi_slopes is not None:
        yield "ALiBi computes biases from token positions in the cache"
    if get_kv_quant_mode(layer.kv_cache_dtype) not in _READ_MODES:
        yield f"its keys are stored as {layer.kv_cache_dtype}, which cannot be read"
