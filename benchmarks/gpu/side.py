"""One engine on the GPU, in a process of its own: ``benchmarks/engine_side.py``, with a refusal of
compression as an answer, and with what vLLM has resolved.
"""

import json
import os
import sys
from typing import Any

from engine_side import Side

from triattention_vllm.errors import TriAttentionError


def resolved(side: Side) -> dict[str, Any]:
    """Which of vLLM's ways to run a step this engine took."""
    config = side.engine.vllm_config
    layers = config.compilation_config.static_forward_context
    backends = {layer.attn_backend.get_name() for layer in layers.values()}
    return {
        "model_runner_v2": config.use_v2_model_runner,
        "compilation_mode": str(config.compilation_config.mode),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "async_scheduling": config.scheduler_config.async_scheduling,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "attention_backends": sorted(backends),
        "worker": config.parallel_config.worker_cls,
    }


def main() -> None:
    """The first line starts the engine; its answer has ``refused`` where compression is."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    try:
        side = Side(**json.loads(sys.stdin.readline()))
    except TriAttentionError as error:
        answers.write(json.dumps({"refused": str(error)}) + "\n")
        return
    calls = {"prefill": side.prefill, "decode": side.decode, "finish": side.finish}
    answers.write(json.dumps(side.describe() | resolved(side)) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(calls[request.pop("call")](**request)) + "\n")


if __name__ == "__main__":
    main()
