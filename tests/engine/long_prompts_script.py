"""Prompts far beyond the budget, in chunks of many sizes, through one engine."""

from typing import Any

from observed_engine import Observer, start_engine, statistics_file
from vllm import SamplingParams


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Each case is (chunk, prompts, max_tokens): what a step may hold, and requests sent at once.

    One engine serves them all: the number of tokens in a step is lowered in its scheduler, which
    reads it at each step.
    """
    llm = start_engine(
        job["model"],
        job["settings"],
        max_model_len=job["max_model_len"],
        max_num_batched_tokens=max(chunk for chunk, _, _ in job["cases"]),
        num_gpu_blocks_override=job["num_blocks"],
    )
    observer = Observer(llm)
    seen = []
    for chunk, prompts, max_tokens in job["cases"]:
        observer.scheduler.max_num_scheduled_tokens = chunk
        assert llm.reset_prefix_cache()
        params = [
            SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=5)
            for n in max_tokens
        ]
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seen.append(observer.take())
    return {
        "cases": seen,
        "statistics": statistics_file(llm),
        "num_preemptions": observer.num_preemptions,
        "num_held": observer.num_held,
    }
