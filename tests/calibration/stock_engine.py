"""Calibrates one model folder in a stock vLLM engine with our attention."""

from typing import Any

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention

from triattention_vllm.engine.attention import override_backends
from triattention_vllm.engine.calibration import calibrate
from triattention_vllm.engine.fingerprint import model_fingerprint
from triattention_vllm.engine.rotary import read_rotary


def greedy_answer(engine: LLM) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    outputs = engine.generate(["The same prompt"], sampling, use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


def run(job: dict[str, Any]) -> None:
    """``job``: model, text, output (a file for the statistics) and arguments of the engine."""
    override_backends()
    engine = LLM(job["model"], kv_cache_memory_bytes=64 << 20, **job["engine"])
    core = engine.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context
    names = [
        name
        for name, layer in layers.items()
        if isinstance(layer, Attention) and layer.sliding_window is None
    ]
    model = worker.get_model()
    rotary = read_rotary(model, names)
    fingerprint = model_fingerprint(worker.vllm_config, model, names, rotary)
    before = greedy_answer(engine)
    assert engine.reset_prefix_cache()
    statistics = calibrate(
        worker,
        worker.model_runner.kv_cache_config,
        names,
        rotary,
        fingerprint,
        job["text"],
        "test text",
    )
    assert greedy_answer(engine) == before, "calibration left something behind"
    assert not any("calibration" in name for name in worker.model_runner.requests)
    assert all(layers[name].impl.query_observer is None for name in names)
    statistics.save(job["output"])
