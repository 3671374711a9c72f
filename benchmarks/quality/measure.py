"""One engine over the test problems, in a process of its own: answers, rounds, blocks, time.

    PYTHONPATH=benchmarks python benchmarks/quality/measure.py JOB RESULT

``run.py`` starts it: JOB names the model, the engine's arguments, the settings and the problems,
RESULT is what came out, task by task.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from cpu_engine import keep_async_scheduling, start_amx

Json = dict[str, Any]


class Engine:
    """A real vLLM engine in this process, and what is counted while it works."""

    def __init__(self, job: Json) -> None:
        if job["async_scheduling"]:
            keep_async_scheduling()
        start_amx()
        from vllm import LLM

        settings = job["settings"]
        extra = {} if settings is None else {"additional_config": {"kv_compression": settings}}
        self.engine = LLM(job["model"], **job["engine"], **extra).llm_engine
        core = self.engine.engine_core.engine_core
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self.rounds: dict[str, int] = {}
        if settings is not None:
            for rounds in core.model_executor.driver_worker.worker.rounds.values():
                self._count_rounds(rounds)

    def _count_rounds(self, rounds: Any) -> None:
        original = rounds.run_batch

        def run_batch(plans: Any) -> Any:
            for plan in plans:
                self.rounds[plan.request_id] = self.rounds.get(plan.request_id, 0) + 1
            return original(plans)

        rounds.run_batch = run_batch

    def answer(self, name: str, problems: list[Json]) -> Json:
        """Greedy answers to all problems at once."""
        from vllm import SamplingParams

        self.rounds.clear()
        names = []
        for idx, problem in enumerate(problems):
            params = SamplingParams(
                temperature=0.0, max_tokens=problem["max_tokens"], ignore_eos=problem["endless"]
            )
            prompt = {"prompt_token_ids": problem["prompt"]}
            names.append(self.engine.add_request(f"{name} {idx}", prompt, params))
        answers: dict[str, list[int]] = {}
        most_held = 0
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            held = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
            most_held = max(most_held, held)
        return {
            "answers": [answers[f"{name} {idx}"] for idx in range(len(problems))],
            "rounds": [self.rounds.get(name, 0) for name in names],
            "peak_blocks": most_held,
            "seconds": time.perf_counter() - start,
        }


def main(job_file: str, result_file: str) -> None:
    """Run a job."""
    job: Json = json.loads(Path(job_file).read_text(encoding="utf-8"))
    engine = Engine(job)
    results = {name: engine.answer(name, problems) for name, problems in job["problems"].items()}
    Path(result_file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
