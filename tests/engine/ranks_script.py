"""Generate with an engine whose workers are processes of their own, and look at all of them."""

from typing import Any

from cpu_engine import keep_async_scheduling
from observed_engine import Observer, start_engine, statistics_file
from vllm import SamplingParams


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine after the other, as ``job["engines"]`` says, with the same prompts."""
    return {"engines": [generate(job, **engine) for engine in job["engines"]]}


def generate(
    job: dict[str, Any], *, asynchronous: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Greedy answers to all prompts at once."""
    if asynchronous:
        keep_async_scheduling()
    engine = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 1024, "max_num_seqs": 128}
    llm = start_engine(job["model"], job["settings"], **{**engine, **arguments})
    observer = Observer(llm)
    params = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=2, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    llm.generate(prompts, params, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    result = {
        "requests": observer.take(),
        "statistics": statistics_file(llm),
        "num_preemptions": observer.num_preemptions,
        "most_running": observer.most_running,
        "scheduler": type(core.scheduler).__name__,
        "executor": type(core.model_executor).__name__,
        "queue_depth": core.batch_queue_size,
        "num_held": observer.num_held,
    }
    llm.llm_engine.engine_core.shutdown()
    return result
