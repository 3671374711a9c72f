"""Methods without statistics, each in an engine of its own, one after the other.

Two requests share a prefix, one prompt takes several chunks, and the pool is small.
"""

from typing import Any

from observed_engine import Observer, start_engine, statistics_file
from vllm import SamplingParams


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What each method's engine did."""
    seen = {}
    for method in job["methods"]:
        llm = start_engine(
            job["model"],
            {**job["settings"], "method": method},
            max_model_len=1024,
            max_num_batched_tokens=128,
            num_gpu_blocks_override=job["num_blocks"],
        )
        observer = Observer(llm)
        params = SamplingParams(
            max_tokens=job["length"], temperature=0.0, ignore_eos=True, logprobs=5
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        llm.generate(prompts[:1], params, use_tqdm=False)
        llm.generate(prompts[1:], params, use_tqdm=False)
        seen[method] = {
            "requests": observer.take(),
            "statistics": statistics_file(llm),
            "num_preemptions": observer.num_preemptions,
            "num_held": observer.num_held,
        }
        llm.llm_engine.engine_core.shutdown()
        del llm, observer
    return seen
