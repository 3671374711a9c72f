"""One engine on the GPU, in a process of its own: ``benchmarks/engine_side.py``, with a refusal of
compression as an answer, with what vLLM has resolved, and with a backlog of requests.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from engine_side import Side

from triattention_vllm.errors import TriAttentionError

Json = dict[str, Any]


def register_dummy_weights() -> None:
    """vLLM's random weights under ``load_format="dummy"``, with norms that scale by 1.

    vLLM draws these too from a thousandth around 0. Keys and values are then so small that an fp8
    cache holds zeros alone, and nothing tells one token from another.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class DummyWeights(DummyModelLoader):
        def load_weights(self, model: Any, model_config: Any) -> None:
            super().load_weights(model, model_config)
            for layer in model.modules():
                if isinstance(layer, RMSNorm):
                    layer.weight.data.fill_(1.0)

    register_model_loader("dummy")(DummyWeights)


class GpuSide(Side):
    """Also serves more requests than fit."""

    def __init__(self, model: str, arguments: Json, settings: Json | None) -> None:
        register_dummy_weights()
        super().__init__(model, arguments, settings)
        self.num_preemptions = 0
        self._watch_preemptions()

    def _watch_preemptions(self) -> None:
        original = self.scheduler.schedule

        def schedule(*args: Any) -> Any:
            output = original(*args)
            self.num_preemptions += len(output.preempted_req_ids or ())
            return output

        self.scheduler.schedule = schedule

    def describe(self) -> Json:
        """Which of vLLM's ways to run a step this engine took, too."""
        config = self.engine.vllm_config
        layers = config.compilation_config.static_forward_context
        backends = {layer.attn_backend.get_name() for layer in layers.values()}
        return super().describe() | {
            "model_runner_v2": config.use_v2_model_runner,
            "compilation_mode": str(config.compilation_config.mode),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "attention_backends": sorted(backends),
            "worker": config.parallel_config.worker_cls,
        }

    def fill(
        self,
        total: int,
        prompt: int,
        most_prompt: int | None,
        num_waiting: int,
        mean_held: int,
        seconds: float,
    ) -> Json:
        """Begin as many requests as the pool holds when each of them holds ``mean_held`` tokens, at
        lengths spread evenly from ``prompt`` to ``total``, and put ``num_waiting`` behind them.

        most_prompt: of the tokens that it has come to, a request begins with so many at most, and
        answers what is left to ``total`` all the same. Ends when each of the first has a token, or
        after ``seconds``.
        """
        pool_tokens = (self.pool.num_gpu_blocks - 1) * self.block_size
        most = self.engine.vllm_config.scheduler_config.max_num_seqs
        num_first = max(1, min(most, int(0.95 * pool_tokens / mean_held)))
        spread = [
            prompt + (total - prompt) * (2 * i + 1) // (2 * num_first) for i in range(num_first)
        ]
        began = time.perf_counter()
        prompts = [min(context, most_prompt or context) for context in spread]
        self.generated = {}
        self.request_ids = [
            self.add(own, total - context) for own, context in zip(prompts, spread, strict=True)
        ]
        first = set(self.request_ids)
        while not first <= self.generated.keys() and time.perf_counter() - began < seconds:
            self._step()
        for _ in range(num_waiting):
            self.request_ids.append(self.add(prompt, total - prompt))
        spent = time.perf_counter() - began
        return {
            "first": num_first,
            "began": len(first & self.generated.keys()),
            "longest_prompt": max(prompts),
            "seconds": spent,
        }

    def serve(self, seconds: float) -> Json:
        """Steps for so long; one list per figure with an entry per step.

        computed: tokens of the batch that the step returned, more than its ``requests`` where it
        prefilled. running, held: once the step was over, with the batch that it launched. rounds:
        seconds of every round of all steps. device_used_bytes: of the whole card when it is over,
        what vLLM does not count included; None without one.
        """
        preempted = self.num_preemptions
        steps: dict[str, list[float]] = {
            name: [] for name in ("seconds", "tokens", "computed", "requests", "running", "held")
        }
        clocks: list[Any] = []
        before = sum(self.generated.values())
        began = last = time.perf_counter()
        while last - began < seconds and self.engine.has_unfinished_requests():
            self._step()
            now, generated = time.perf_counter(), sum(self.generated.values())
            found = (now - last, generated - before, self.returned.tokens)
            found += (self.returned.requests, len(self.scheduler.running), self.num_held)
            for values, value in zip(steps.values(), found, strict=True):
                values.append(value)
            clocks += self.returned.round_clocks
            last, before = now, generated
        self.synchronise()
        return {
            **steps,
            "rounds": [read() / size for read, size in clocks for _ in range(size)],
            "preemptions": self.num_preemptions - preempted,
            "device_used_bytes": self._device_used_bytes(),
        }

    def _device_used_bytes(self) -> int | None:
        if not self.on_gpu:
            return None
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def main() -> None:
    """The first line starts the engine; its answer has ``refused`` where compression is."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    try:
        side = GpuSide(**json.loads(sys.stdin.readline()))
    except TriAttentionError as error:
        answers.write(json.dumps({"refused": str(error)}) + "\n")
        return
    names = ("prefill", "decode", "fill", "serve", "finish")
    calls = {name: getattr(side, name) for name in names}
    answers.write(json.dumps(side.describe()) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(calls[request.pop("call")](**request)) + "\n")


if __name__ == "__main__":
    main()
