"""Two engines behind one front end, each with its own scheduler, pool and worker."""

import asyncio
import os
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The same prompts to both ranks, at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return asyncio.run(answers(job))


async def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One answer per rank and prompt: rank, tokens and their log-probabilities."""
    arguments = AsyncEngineArgs(
        job["model"],
        enforce_eager=True,
        dtype="float32",
        kv_cache_memory_bytes=16 << 20,
        block_size=32,
        max_model_len=1024,
        data_parallel_size=2,
        disable_log_stats=True,
        additional_config={"kv_compression": {"method": "triattention", **job["settings"]}},
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        return await asyncio.gather(
            *(
                answer(engine, prompt, rank, job["max_tokens"])
                for prompt in job["prompts"]
                for rank in range(2)
            )
        )
    finally:
        engine.shutdown()


async def answer(engine: AsyncLLM, prompt: list[int], rank: int, num_tokens: int) -> dict[str, Any]:
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=2, detokenize=False
    )
    name = f"rank {rank}, {len(prompt)} tokens"
    async for output in engine.generate(
        {"prompt_token_ids": prompt}, params, name, data_parallel_rank=rank
    ):
        last = output.outputs[0]
        if output.finished:
            return {
                "rank": rank,
                "num_prompt": len(prompt),
                "token_ids": [*prompt, *last.token_ids],
                "logprobs": [{t: v.logprob for t, v in row.items()} for row in last.logprobs],
            }
    raise AssertionError(f"{name} ended without an answer")
