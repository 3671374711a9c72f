"""Everything that cannot run with compression is named at start, with what to do."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_runs import ModelFolder, random_prompt, run_engine
from fresh_process import ProcessError
from vllm.config import CUDAGraphMode, KVTransferConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType

from triattention_vllm.config import Settings
from triattention_vllm.engine import refusals
from triattention_vllm.engine.cli import install
from triattention_vllm.engine.differences import CPU_BUILD_VERIFIES_DRAFTS
from triattention_vllm.engine.refusals import refuse_unsupported, refuse_unsupported_layers
from triattention_vllm.engine.worker_choice import CPU_WORKER, GPU_WORKER, compression_worker_class
from triattention_vllm.errors import UnsupportedError


@pytest.fixture
def config(model_folder: ModelFolder) -> VllmConfig:
    """A configuration that may be compressed, to be spoilt in one respect."""
    return EngineArgs(str(model_folder("qwen3")), max_model_len=2048).create_engine_config()


class Changed:
    """A configuration with some attributes replaced, for what vLLM itself would not build here."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self._original = original
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def with_model(**changes: Any) -> Callable[[VllmConfig], Any]:
    return lambda config: Changed(config, model_config=Changed(config.model_config, **changes))


def with_parallel(**changes: Any) -> Callable[[VllmConfig], Any]:
    return lambda config: Changed(
        config, parallel_config=Changed(config.parallel_config, **changes)
    )


def with_cache(**changes: Any) -> Callable[[VllmConfig], Any]:
    return lambda config: Changed(config, cache_config=Changed(config.cache_config, **changes))


def with_ngram(**changes: Any) -> Callable[[VllmConfig], Any]:
    """Speculation that may be compressed, spoilt in one respect."""
    ngram = SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)
    return lambda config: Changed(config, speculative_config=Changed(ngram, **changes))


REFUSED: dict[str, tuple[Callable[[VllmConfig], Any], str]] = {
    "MLA": (with_model(use_mla=True), "multi-head latent attention"),
    "encoder-decoder": (with_model(is_encoder_decoder=True), "cross-attention"),
    "pooling": (with_model(runner_type="pooling"), "only text generation"),
    "prefix LM": (with_model(is_mm_prefix_lm=True), "both directions"),
    "R-SWA": (with_model(rswa_window=128), "keep the prompt by token position"),
    "decode context parallel": (
        with_parallel(decode_context_parallel_size=2),
        "context parallelism",
    ),
    "prefill context parallel": (
        with_parallel(prefill_context_parallel_size=2),
        "context parallelism",
    ),
    "KV connector": (
        lambda config: Changed(config, kv_transfer_config=KVTransferConfig()),
        "KV connector",
    ),
    "Ray executor": (with_parallel(distributed_executor_backend="ray"), "use the 'mp' executor"),
    "elastic expert parallel": (with_parallel(enable_elastic_ep=True), "warms up again while"),
    "micro-batching": (with_parallel(use_ubatching=True), "micro-batching"),
    "an unverified speculative method": (
        with_ngram(method="ngram_gpu"),
        "'ngram_gpu' has not been verified",
    ),
    "parallel drafting": (with_ngram(parallel_drafting=True), "parallel drafting"),
    "MTP of its own kind": (
        with_ngram(
            method="mtp",
            draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="gemma4_mtp")),
        ),
        "MTP layers with a drafter of their own",
    ),
    "Medusa": (with_ngram(method="medusa"), "'medusa' has not been verified"),
    "int4 KV": (
        with_cache(cache_dtype="int4_per_token_head"),
        "'int4_per_token_head' cannot be read",
    ),
    "NVFP4 KV": (with_cache(cache_dtype="nvfp4"), "'nvfp4' cannot be read"),
    "TurboQuant KV": (with_cache(cache_dtype="turboquant_4bit_nc"), "allowed: auto, .*, fp8"),
    "int8 KV on a CPU": (
        with_cache(cache_dtype="int8_per_token_head"),
        "on the CPU set fp8 or auto",
    ),
}


@pytest.mark.feature("Multi-head latent attention", "refused")
@pytest.mark.feature("Encoder-decoder, cross-attention", "refused")
@pytest.mark.feature("Bidirectional attention", "refused")
@pytest.mark.feature("Context parallel", "refused")
@pytest.mark.feature("KV connectors", "refused")
@pytest.mark.feature("Ray executor", "refused")
@pytest.mark.feature("Elastic expert parallel", "refused")
@pytest.mark.feature("Micro-batching (DBO)", "refused")
@pytest.mark.feature("Quantised KV that cannot be read", "refused")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compressed_is_refused_with_its_reason(
    case: str, config: VllmConfig
) -> None:
    spoil, reason = REFUSED[case]
    refuse_unsupported(config, Settings())
    with pytest.raises(UnsupportedError, match=reason) as caught:
        refuse_unsupported(spoil(config), Settings())
    assert "start without --kv-compression" in str(caught.value)


def test_scores_that_are_not_normalised_are_refused_beside_scaled_keys(config: VllmConfig) -> None:
    """Regression: a layer weighed as one over the scale of its fp8 keys."""
    scaled, plain = with_cache(cache_dtype="fp8")(config), Settings(score_normalise="none")
    refuse_unsupported(config, plain)
    refuse_unsupported(scaled, Settings())
    with pytest.raises(UnsupportedError, match="leave it at 'heads', or set --kv-cache-dtype auto"):
        refuse_unsupported(scaled, plain)


def test_redundancy_is_refused_on_a_gpu_whose_shared_memory_its_kernel_exceeds(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a server on a GPU of compute capability 7.5 failed while it warmed up."""

    class Gpu(CpuPlatform):
        capability = DeviceCapability(7, 5)

        @classmethod
        def is_cuda(cls) -> bool:
            return True

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

    refuse_unsupported(config, Settings())
    monkeypatch.setattr(refusals, "current_platform", Gpu)
    with pytest.raises(UnsupportedError, match="score_redundancy needs a GPU of .* set it to 0"):
        refuse_unsupported(config, Settings())
    refuse_unsupported(config, Settings(score_redundancy=0))
    Gpu.capability = DeviceCapability(8, 0)
    refuse_unsupported(config, Settings())


@pytest.mark.feature("Rust frontend", "refused")
def test_the_rust_frontend_is_refused(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answered a budget that cannot be served with 200, and had no metrics of rounds."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    refuse_unsupported(config, Settings())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError, match="kv_budget.*; unset VLLM_USE_RUST_FRONTEND"):
        refuse_unsupported(config, Settings())


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "fp8_per_token_head", "fp8", "fp8_e5m2"])
def test_a_gpu_may_store_keys_in_eight_bits(dtype: str, config: VllmConfig) -> None:
    """And not in four."""
    on_gpu = Changed(config, device_config=SimpleNamespace(device_type="cuda"))
    refuse_unsupported(with_cache(cache_dtype=dtype)(on_gpu), Settings())
    with pytest.raises(UnsupportedError, match="'int4_per_token_head' cannot be read"):
        refuse_unsupported(with_cache(cache_dtype="int4_per_token_head")(on_gpu), Settings())


@pytest.mark.parametrize("grow", [True, False])
def test_model_runner_v2_is_refused_where_a_step_can_write_too_few_rows(
    grow: bool, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "STAGED_WRITES_GROW", grow)
    device = SimpleNamespace(device_type="cuda")
    on_gpu = Changed(config, device_config=device, use_v2_model_runner=True)
    if grow:
        refuse_unsupported(on_gpu, Settings())
        return
    with pytest.raises(UnsupportedError, match="or install vLLM 0.30 or newer"):
        refuse_unsupported(on_gpu, Settings())


@pytest.mark.parametrize(("triton", "knows"), [(True, True), (True, False), (False, True)])
def test_model_runner_v2_on_a_cpu_needs_a_triton_for_it(
    triton: bool, knows: bool, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own choice on a CPU is V2 where Triton has a backend for it."""
    monkeypatch.setattr(refusals, "HAS_TRITON", triton)
    monkeypatch.setattr(refusals, "RUNNER_V2_KNOWS_THE_CPU", knows)
    on_v2 = Changed(config, use_v2_model_runner=True)
    if triton and knows:
        refuse_unsupported(on_v2, Settings())
        return
    with pytest.raises(UnsupportedError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        refuse_unsupported(on_v2, Settings())


def test_union_over_ranks_that_hold_different_heads_is_refused(config: VllmConfig) -> None:
    two_ranks = with_parallel(world_size=2)(config)
    refuse_unsupported(two_ranks, Settings(selection="per_head"))
    with pytest.raises(UnsupportedError, match="union"):
        refuse_unsupported(two_ranks, Settings(selection="union"))


def with_graphs(mode: CUDAGraphMode) -> Callable[[VllmConfig], Any]:
    return lambda config: Changed(
        config, compilation_config=Changed(config.compilation_config, cudagraph_mode=mode)
    )


HIDDEN: dict[str, tuple[Callable[[VllmConfig], Any], dict[str, Any], str]] = {
    "full CUDA graphs": (
        with_graphs(CUDAGraphMode.FULL_AND_PIECEWISE),
        {},
        r"inside full CUDA graphs \(cudagraph_mode=FULL_AND_PIECEWISE\); set cudagraph",
    ),
    "full graphs of decoding": (
        with_graphs(CUDAGraphMode.FULL_DECODE_ONLY),
        {},
        "set cudagraph_mode to PIECEWISE with --compilation-config",
    ),
    "speculation": (with_ngram(), {}, "under speculation the host does not know their posi.*off"),
    "fp8 KV": (with_cache(cache_dtype="fp8"), {}, "scales of fp8 keys are not read; set --kv-ca"),
    "a window shorter than its queries": (
        lambda config: config,
        {"window": 7},
        "the last 8 before a round, .*; raise window from 7 to 8 or more",
    ),
    "a quarter shorter than its queries": (
        lambda config: config,
        {"budget": 31, "interval": 8},
        "the last 8 before a round, .*; raise window from 7 to 8 or more",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=pytest.mark.skipif(
                case == "speculation" and not CPU_BUILD_VERIFIES_DRAFTS,
                reason="vLLM 0.30 on the CPU fails at drafts, so no method may have them",
            ),
        )
        for case in HIDDEN
    ],
)
def test_methods_that_look_at_queries_are_refused_where_they_cannot(
    case: str, config: VllmConfig
) -> None:
    spoil, chosen, reason = HIDDEN[case]
    looking = Settings.from_mapping({"method": "snapkv", **chosen})
    refuse_unsupported(with_graphs(CUDAGraphMode.PIECEWISE)(config), Settings(method="snapkv"))
    refuse_unsupported(spoil(config), Settings.from_mapping({"method": "knorm", **chosen}))
    with pytest.raises(UnsupportedError, match=f"method 'snapkv' looks at queries.*{reason}"):
        refuse_unsupported(spoil(config), looking)


def test_all_reasons_are_given_at_once(config: VllmConfig) -> None:
    spoilt = with_cache(cache_dtype="nvfp4")(with_model(use_mla=True)(config))
    with pytest.raises(UnsupportedError, match=r"latent attention.*; keys of KV dtype 'nvfp4'"):
        refuse_unsupported(spoilt, Settings())


LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "bidirectional": ({"attn_type": AttentionType.ENCODER_ONLY}, "not causal self-attention"),
    "cross-attention": ({"attn_type": AttentionType.ENCODER_DECODER}, "not causal self-attention"),
    "KV sharing": ({"kv_sharing_target_layer_name": "layers.3.attn"}, "cache of layers.3.attn"),
    "values of another size": ({"head_size_v": 64}, "keys have 32 dimensions and values 64"),
    "ALiBi": ({"impl": SimpleNamespace(alibi_slopes=[0.5])}, "ALiBi computes biases"),
    "quantised KV": ({"kv_cache_dtype": "nvfp4"}, "stored as nvfp4, which cannot be read"),
}


def attention_layer(**changes: Any) -> Attention:
    """vLLM's layer class with what the refusals read; making a whole one needs an engine."""
    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    vars(layer).update(
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        head_size=32,
        head_size_v=32,
        impl=SimpleNamespace(alibi_slopes=None),
        kv_cache_dtype="auto",
    )
    vars(layer).update(changes)
    return layer


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_that_cannot_be_compressed_is_named_with_its_reason(case: str) -> None:
    changes, reason = LAYERS[case]
    refuse_unsupported_layers({"layers.0.attn": attention_layer()})
    with pytest.raises(UnsupportedError, match=f"layer layers.1.attn: .*{reason}"):
        refuse_unsupported_layers(
            {"layers.0.attn": attention_layer(), "layers.1.attn": attention_layer(**changes)}
        )


def test_a_layer_of_another_class_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layers.0.attn: Linear is not vLLM's Attention"):
        refuse_unsupported_layers({"layers.0.attn": torch.nn.Linear(2, 2)})


@pytest.mark.feature("Pooling models", "refused")
def test_a_pooling_model_is_refused_with_compression_and_untouched_without(
    model_folder: ModelFolder,
) -> None:
    install()
    arguments = {"runner": "pooling", "convert": "embed", "max_model_len": 2048}
    model = str(model_folder("qwen3"))
    untouched = EngineArgs(model, **arguments).create_engine_config()
    assert untouched.scheduler_config.scheduler_cls is None
    assert untouched.parallel_config.worker_cls == CPU_WORKER
    on = {"kv_compression": {"method": "triattention"}}
    with pytest.raises(UnsupportedError, match="runs as 'pooling' and only text generation"):
        EngineArgs(model, additional_config=on, **arguments).create_engine_config()


@pytest.mark.feature("Models without full attention", "refused")
def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="this model has none"):
        refuse_unsupported_layers({})


@pytest.mark.feature("ALiBi", "refused")
def test_an_alibi_model_is_refused_before_it_serves(model_folder: ModelFolder) -> None:
    with pytest.raises(ProcessError, match="ALiBi computes biases from token positions"):
        run_engine(model_folder("bloom"), [random_prompt(4, 0)], 2, {}, max_model_len=2500)


@pytest.mark.feature("KV sharing across layers", "refused")
def test_a_model_whose_layers_read_a_compressed_cache_of_others_is_refused(
    model_folder: ModelFolder,
) -> None:
    """Regression: vLLM gives such a layer no cache of its own, so it was not looked at."""
    with pytest.raises(
        ProcessError, match=r"layers\.3\.\S+: it shares the KV cache of \S+layers\.1"
    ):
        run_engine(model_folder("gemma3n"), [random_prompt(4, 0)], 2, {}, max_model_len=2500)


@pytest.mark.skipif(CPU_BUILD_VERIFIES_DRAFTS, reason="vLLM 0.30 alone fails at drafts on the CPU")
def test_drafts_are_refused_where_vllm_itself_fails_at_them(
    config: VllmConfig, model_folder: ModelFolder
) -> None:
    with pytest.raises(UnsupportedError, match="fails on the CPU at its first draft"):
        refuse_unsupported(with_ngram()(config), Settings())
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with pytest.raises(ProcessError, match="Cannot inspect kernel parameters"):
        run_engine(
            model_folder("qwen3"),
            [[1, 2, 3] * 10],
            20,
            None,
            plugin=False,
            max_model_len=1024,
            speculative_config=ngram,
        )


@pytest.mark.feature("CUDA", "not yet run on a GPU")
def test_a_gpu_is_refused_until_the_user_accepts_that_it_is_untested() -> None:
    with pytest.raises(UnsupportedError, match="TRIATTENTION_ALLOW_UNTESTED_VLLM=1 to try"):
        compression_worker_class(GPU_WORKER, {})
    accepted = {"TRIATTENTION_ALLOW_UNTESTED_VLLM": "1"}
    chosen = compression_worker_class(GPU_WORKER, accepted)
    assert chosen == "triattention_vllm.engine.worker.CompressionGPUWorker"
    with pytest.raises(UnsupportedError, match="no worker for 'my.Worker'"):
        compression_worker_class("my.Worker", accepted)
