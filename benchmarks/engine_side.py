"""One vLLM engine of the benchmark, in a process of its own that answers JSON lines.

``engine.py`` starts two of these, with and without compression, and lets them work in turns.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cpu_engine import start_amx


@dataclass
class Batch:
    """What the scheduler put into one step. tokens: that it computes, of how many requests.

    round_clocks: of the rounds before it, how to read the seconds of each group, and its size.
    """

    tokens: int = 0
    requests: int = 0
    round_clocks: list[tuple[Callable[[], float], int]] = field(default_factory=list)


class Side:
    """An engine, and the requests that are decoding in it."""

    def __init__(self, model: str, arguments: dict[str, Any], settings: dict[str, Any] | None):
        from vllm import LLM

        start_amx()
        if settings is not None:
            arguments = arguments | {"additional_config": {"kv_compression": settings}}
        self.compresses = settings is not None
        self.engine = LLM(model, **arguments).llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self.block_size = core.scheduler.block_size
        self.on_gpu = self.engine.vllm_config.device_config.device_type == "cuda"
        self.request_ids: list[str] = []
        self.generated: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(0)
        self._watch_batches()
        if settings is not None:
            for rounds in core.model_executor.driver_worker.worker.rounds.values():
                self._time_rounds(rounds)

    def _watch_batches(self) -> None:
        """Know the batch that was launched last, and the one whose tokens the last step returned:
        under async scheduling a step launches a batch and returns the one before it.
        """
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output
        self.launched, self.returned = Batch(), Batch()
        running: dict[int, Batch] = {}

        def watched_schedule(*args: Any) -> Any:
            output = schedule(*args)
            requests = len(output.num_scheduled_tokens)
            self.launched = Batch(output.total_num_scheduled_tokens, requests)
            running[id(output)] = self.launched
            return output

        def watched_update(output: Any, *args: Any) -> Any:
            self.returned = running.pop(id(output))
            return update(output, *args)

        self.scheduler.schedule = watched_schedule
        self.scheduler.update_from_output = watched_update

    def _time_rounds(self, rounds: Any) -> None:
        """Note how long each round takes on the worker: score, select and compact."""
        original, on_gpu = rounds.run_batch, rounds.kv.keys.is_cuda

        def run_batch(plans: Any) -> Any:
            clock = _started_on_gpu() if on_gpu else _started()
            result = original(plans)
            self.launched.round_clocks.append((clock(), len(plans)))
            return result

        rounds.run_batch = run_batch

    @property
    def num_held(self) -> int:
        """Blocks that requests hold; block 0 is vLLM's null block."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def describe(self) -> dict[str, Any]:
        """The pool, and the versions that ran."""
        import vllm

        return {
            "pool_blocks": self.pool.num_gpu_blocks - 1,
            "block_size": self.block_size,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def prefill(
        self, context: int, num_requests: int, answer_tokens: int, budget: int | None = None
    ) -> dict[str, Any]:
        """Add requests of ``context`` random tokens and step until each has its first token.

        budget: of each request, where this engine compresses; None: that of its settings.
        """
        assert not self.engine.has_unfinished_requests()
        start = time.perf_counter()
        self.request_ids = [self.add(context, answer_tokens, budget) for _ in range(num_requests)]
        self.generated = {}
        most_held = 0
        while len(self.generated) < num_requests:
            self._step()
            most_held = max(most_held, self.num_held)
        self.synchronise()
        return {"seconds": time.perf_counter() - start, "most_blocks_held": most_held}

    def decode(self, num_steps: int) -> dict[str, Any]:
        """Steps of one token per request. seconds, held: per step. rounds: seconds of every round
        of every step, a list per step.

        Under async scheduling the device works on one more batch when a step returns. It is done
        when this returns, within the last step's time: the side that has the next turn must neither
        wait for it nor share the device with it.
        """
        seconds, held, clocks = [], [], []
        self.synchronise()
        for left in reversed(range(num_steps)):
            start = time.perf_counter()
            self._step()
            if left == 0:
                self.synchronise()
            seconds.append(time.perf_counter() - start)
            held.append(self.num_held)
            clocks.append(self.returned.round_clocks)
        assert len(self.generated) == len(self.request_ids)
        rounds = [[read() / size for read, size in own for _ in range(size)] for own in clocks]
        return {"seconds": seconds, "held": held, "rounds": rounds}

    def add(self, num_prompt: int, num_answer: int, budget: int | None = None) -> str:
        """A request of random tokens whose answer has exactly that length; see ``prefill``."""
        from vllm import SamplingParams

        has_own = self.compresses and budget is not None
        params = SamplingParams(
            max_tokens=num_answer,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_budget": budget} if has_own else None,
        )
        prompt = torch.randint(0, 256, (num_prompt,), generator=self.generator).tolist()
        request_id = f"{num_prompt} tokens at {time.perf_counter()}"
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return request_id

    def finish(self) -> dict[str, Any]:
        """End all requests; the pool must be empty again."""
        self.engine.abort_request(self.request_ids)
        while self.engine.has_unfinished_requests():
            self._step()
        return {"held": self.num_held}

    def turn(self, prompt: list[int], answer_tokens: int) -> dict[str, Any]:
        """One request alone: seconds to its first token, tokens found in the prefix cache, and its
        greedy answer."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=answer_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self.engine.add_request(f"turn at {start}", {"prompt_token_ids": prompt}, params)
        seconds, outputs = [], []
        while self.engine.has_unfinished_requests():
            new = self.engine.step()
            outputs += new
            seconds += [time.perf_counter() - start] * len(new)
        return {
            "first_token_seconds": seconds[0],
            "hit_tokens": outputs[-1].num_cached_tokens,
            "answer": list(outputs[-1].outputs[0].token_ids),
        }

    def synchronise(self) -> None:
        """Wait until a GPU has done all that was launched."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _step(self) -> None:
        self.returned = Batch()  # what a step that returns none has
        for output in self.engine.step():
            self.generated[output.request_id] = len(output.outputs[0].token_ids)


def _started() -> Callable[[], Callable[[], float]]:
    """A clock; calling it stops it and returns how to read its seconds."""
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - start
        return lambda: seconds

    return stop


def _started_on_gpu() -> Callable[[], Callable[[], float]]:
    """The same on the device, between what is launched now and at the stop; reading it waits."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def read() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def stop() -> Callable[[], float]:
        end.record()
        return read

    return stop


def main() -> None:
    """Read ``{"call": name, ...arguments}`` lines, answer each with one JSON line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    side = Side(**json.loads(sys.stdin.readline()))
    calls = {
        "prefill": side.prefill,
        "decode": side.decode,
        "finish": side.finish,
        "turn": side.turn,
    }
    answers.write(json.dumps(side.describe()) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(calls[request.pop("call")](**request)) + "\n")


if __name__ == "__main__":
    main()
