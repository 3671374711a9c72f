"""Generate with a model that is split over ranks, each a process; prints tokens and logprobs."""

import json
import sys

from vllm import LLM, SamplingParams


def main(job: dict) -> None:
    """Run one job: model, prompts, max_tokens, settings and further arguments of LLM."""
    llm = LLM(
        job["model"],
        enforce_eager=True,
        dtype="float32",
        kv_cache_memory_bytes=16 << 20,
        block_size=32,
        max_model_len=1024,
        distributed_executor_backend="mp",
        additional_config={"kv_compression": {"method": "triattention", **job["settings"]}},
        **job["engine"],
    )
    params = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    result = [
        {
            "token_ids": list(output.token_ids),
            "logprobs": [
                position[token].logprob
                for position, token in zip(output.logprobs, output.token_ids, strict=True)
            ],
        }
        for output in outputs
    ]
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
