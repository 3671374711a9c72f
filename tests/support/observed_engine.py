"""What vLLM's engine core did with every request, seen from inside its process.

A script that runs in a process of its own (``fresh_process``) makes an engine, observes it and
hands ``Observed`` requests back, which ``dense_judge`` holds against the float64 reference. Nothing
here depends on how a request was made: children of ``n``, beams and aborted requests are seen too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ObservedStep:
    """Tokens [start, end) were computed; ``committed`` of the earlier ones were known to be kept
    when blocks were allocated. sampled: the step chose the token at ``end``."""

    start: int
    end: int
    committed: int
    had_round: bool
    sampled: bool
    num_blocks: int


@dataclass
class Life:
    """The steps of a request between its (re)start and its end or preemption, without a gap.

    kept: of every round, int64 [L, H_kv, kept], one tensor per rank.
    """

    steps: list[ObservedStep] = field(default_factory=list)
    kept: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def num_hits(self) -> int:
        """Tokens that came from the prefix cache."""
        return self.steps[0].start


@dataclass
class Observed:
    """One request of the engine core.

    token_ids: prompt and output. logprobs: per output token, token id -> log-probability;
    prompt_logprobs: position -> the same.
    """

    request_id: str
    num_prompt: int
    token_ids: list[int]
    lives: list[Life]
    logprobs: list[dict[int, float]]
    prompt_logprobs: dict[int, dict[int, float]]

    @property
    def num_rounds(self) -> int:
        return sum(step.had_round for life in self.lives for step in life.steps)

    @property
    def most_blocks(self) -> int:
        """Most blocks that the request held at once."""
        return max(step.num_blocks for life in self.lives for step in life.steps)


class Observer:
    """Watches an ``LLM`` whose engine core runs in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.block_size = self.manager.block_size
        self.num_preemptions = 0
        self.most_running = 0
        self._seen: dict[str, Observed] = {}
        self._requests: dict[str, Any] = {}
        self._committed: dict[str, int] = {}
        self._preempted: set[str] = set()
        llm.collective_rpc(_watch_rounds)
        self._watch_manager()
        self._watch_schedule()
        self._watch_outputs()

    def _watch_manager(self) -> None:
        original = self.manager.remove_skipped_blocks

        def remove_skipped_blocks(request_id: str, committed: int, *args: Any) -> None:
            # A request that has no blocks yet gets them behind this call: nothing to compress.
            has_blocks = bool(self.manager.req_to_blocks.get(request_id))
            self._committed[request_id] = committed if has_blocks else 0
            original(request_id, committed, *args)

        self.manager.remove_skipped_blocks = remove_skipped_blocks

    def _watch_schedule(self) -> None:
        original = self.scheduler.schedule

        def schedule(*args: Any) -> Any:
            output = original(*args)
            preempted = output.preempted_req_ids or set()
            self.num_preemptions += len(preempted)
            self._preempted |= preempted
            self.most_running = max(self.most_running, len(self.scheduler.running))
            plans = vars(output).get("round_plans", ())
            with_round = {plan.request_id for plan in plans}
            for request_id, num_new in output.num_scheduled_tokens.items():
                self._note_step(request_id, num_new, request_id in with_round)
            return output

        self.scheduler.schedule = schedule

    def _note_step(self, request_id: str, num_new: int, had_round: bool) -> None:
        request = self.scheduler.requests[request_id]
        self._requests[request_id] = request
        if request_id not in self._seen:
            num_prompt = request.num_prompt_tokens
            self._seen[request_id] = Observed(request_id, num_prompt, [], [], [], {})
        lives = self._seen[request_id].lives
        end = request.num_computed_tokens
        row = self.manager.req_to_blocks[request_id]
        step = ObservedStep(
            start=end - num_new,
            end=end,
            committed=self._committed[request_id],
            had_round=had_round,
            sampled=not request.is_prefill_chunk,
            num_blocks=sum(not block.is_null for block in row),
        )
        follows = lives and lives[-1].steps[-1].end == step.start
        if not follows or request_id in self._preempted:
            lives.append(Life())
        self._preempted.discard(request_id)
        lives[-1].steps.append(step)

    def _watch_outputs(self) -> None:
        original = self.scheduler.update_from_output

        def update_from_output(*args: Any) -> Any:
            outputs = original(*args)
            for of_client in outputs.values():
                for output in of_client.outputs:
                    self._note_output(output)
            return outputs

        self.scheduler.update_from_output = update_from_output

    def _note_output(self, output: Any) -> None:
        seen = self._seen[output.request_id]
        if output.new_logprobs is not None:
            new = output.new_logprobs
            seen.logprobs += _rows(new.logprob_token_ids.tolist(), new.logprobs.tolist())
        prompt = output.new_prompt_logprobs_tensors
        if prompt is not None:
            rows = _rows(prompt.logprob_token_ids.tolist(), prompt.logprobs.tolist())
            seen.prompt_logprobs = dict(enumerate(rows, start=1))

    def take(self) -> list[Observed]:
        """Every request since the last call, in the order in which they first ran."""
        of_ranks = self.llm.collective_rpc(_take_rounds)
        for request_id, seen in self._seen.items():
            seen.token_ids = list(self._requests[request_id].all_token_ids)
            rounds = list(zip(*(kept.get(request_id, []) for kept in of_ranks), strict=True))
            for life in seen.lives:
                num_rounds = sum(step.had_round for step in life.steps)
                life.kept = [list(kept) for kept in rounds[:num_rounds]]
                rounds = rounds[num_rounds:]
            assert not rounds, f"the workers ran {len(rounds)} rounds that no step had planned"
        seen = list(self._seen.values())
        self._seen, self._requests = {}, {}
        return seen

    @property
    def num_held(self) -> int:
        """Blocks that are referenced; block 0 is vLLM's null block."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()


def _rows(ids: list[list[int]], values: list[list[float]]) -> list[dict[int, float]]:
    """Per position, token id -> log-probability."""
    return [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]


def _watch_rounds(wrapper: Any) -> None:
    """Runs in the worker: remember what every round kept; without compression there is none."""
    wrapper.observed_kept = {}
    for rounds in vars(wrapper.worker).get("rounds", {}).values():
        _watch_one(rounds, wrapper.observed_kept)


def _watch_one(rounds: Any, log: dict[str, list[torch.Tensor]]) -> None:
    original = rounds.run_batch

    def run_batch(plans: Any) -> torch.Tensor:
        kept: torch.Tensor = original(plans)
        for plan, own in zip(plans, kept, strict=True):
            log.setdefault(plan.request_id, []).append(own.clone())
        return kept

    rounds.run_batch = run_batch


def _take_rounds(wrapper: Any) -> dict[str, list[torch.Tensor]]:
    """Runs in the worker: request -> [L, H_kv, kept] of every round since the last call."""
    kept = dict(wrapper.observed_kept)
    wrapper.observed_kept.clear()
    return kept


def statistics_file(llm: Any) -> str | None:
    """Where a compressing engine keeps the statistics of its model, if its method has any."""
    file: str | None = llm.collective_rpc(_statistics)[0]
    return file


def _statistics(wrapper: Any) -> str | None:
    """Runs in the worker."""
    source = wrapper.worker.statistics_source
    return None if source is None else str(source.description.split("kept in ")[-1])


def start_engine(model: str, settings: Mapping[str, Any] | None, **engine: Any) -> Any:
    """An eager float32 ``LLM`` with small blocks; ``engine`` overrules."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "max_logprobs": 20,
        **engine,
    }
    if settings is not None:
        chosen = {"method": "triattention", **settings}
        arguments["additional_config"] = {"kv_compression": chosen}
    return LLM(model, **arguments)
