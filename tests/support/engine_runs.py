"""A real vLLM engine in a fresh process: what it generated, and what every round kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from cpu_engine import keep_async_scheduling
from dense_reference import DenseReference
from dense_replay import Replay, replay, steps_of
from fresh_process import run_fresh
from observed_engine import start_engine, statistics_file

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

SMALL: dict[str, Any] = {"budget": 128, "interval": 32, "window": 16}
"""Settings with which rounds begin at 160 tokens."""
ModelFolder = Callable[[str], Path]


@dataclass
class RequestRun:
    """token_ids: prompt and output. logprobs: per output token, token id -> log-probability.
    starts: tokens computed before each step that the request was part of; drafts: the tokens that
    a draft had proposed for that step."""

    num_prompt: int
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    kept: list[torch.Tensor] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


@dataclass
class EngineRun:
    """requests: in the order given. num_blocks, num_free: of the pool, after the last request.

    statistics: their file, None where the method has none.
    steps: per engine step, request id -> (logical tokens computed, null blocks, real blocks), in
    the first compressed KV-cache group.
    block_size: of the compressed groups, or of the first one; group_block_sizes: of all.
    groups: rows of ``RequestRun.kept`` that belong to each compressed group.
    longest_hashed: tokens of the longest prefix that any block of any group has a hash for.
    num_handed_over: pairs of plans of one step whose later one writes a block that the earlier one,
    of a group with a higher number, reads.
    """

    requests: list[RequestRun]
    num_blocks: int
    num_free: int
    statistics: str | None
    steps: list[dict[str, tuple[int, int, int]]]
    num_preemptions: int
    scheduler: str
    worker: str
    block_size: int
    group_block_sizes: list[int]
    ref_counts: list[int]
    groups: list[list[int]]
    longest_hashed: int
    num_handed_over: int


@dataclass
class Job:
    """Prompts are token ids; ``engine`` are keyword arguments of LLM; ``settings`` ours."""

    model: str
    prompts: list[list[int]]
    max_tokens: list[int]
    settings: dict[str, Any] | None
    engine: dict[str, Any]
    async_scheduling: bool = False
    repeat: int = 1
    kernel_block_size: int | None = None
    extra_args: Sequence[dict[str, Any] | None] | None = None


def engine_job(
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    settings: dict[str, Any] | None,
    *,
    async_scheduling: bool = False,
    repeat: int = 1,
    kernel_block_size: int | None = None,
    extra_args: Sequence[dict[str, Any] | None] | None = None,
    **engine: Any,
) -> Job:
    """All prompts at once, greedily. ``repeat`` sends the same prompts again to the same engine;
    the last time counts. ``kernel_block_size``: the only block size that the attention backend
    claims to take, so that vLLM splits larger ones. ``extra_args``: of each request."""
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    return Job(
        str(model),
        [list(prompt) for prompt in prompts],
        lengths,
        settings,
        engine,
        async_scheduling,
        repeat,
        kernel_block_size,
        extra_args,
    )


def run_engine(*arguments: Any, plugin: bool = True, **more: Any) -> EngineRun:
    """``generate`` the job with these arguments of ``engine_job`` in a process of its own. Raises
    ProcessError where the engine fails."""
    environment = {} if plugin else {"VLLM_PLUGINS": ""}
    job = engine_job(*arguments, **more)
    run: EngineRun = run_fresh(generate, job, environment=environment, timeout=550)
    return run


def statistics_of(run: EngineRun) -> Statistics:
    """Those that the engine made, or found in the cache folder."""
    assert run.statistics is not None, "the method has no statistics"
    return Statistics.load(run.statistics)


def replayed(
    run: EngineRun,
    request: RequestRun,
    dense: DenseReference,
    settings: Mapping[str, Any],
    **how: Any,
) -> Replay:
    """The reference over the tokens that the engine computed, in its steps and with its choices;
    fails where one was no best choice. ``how``: arguments of ``dense_replay.replay``."""
    chosen = Settings(**settings)
    computed = request.token_ids[:-1]
    arguments = {
        "policy": chosen.policy(run.block_size),
        "statistics": statistics_of(run),
        "selection": chosen.selection,
        "steps": steps_of(request.starts, len(computed)),
        "kept_log": request.kept,
        "groups": run.groups,
        "redundancy": chosen.redundancy,
    }
    return replay(dense, computed, num_prompt=request.num_prompt, **arguments | how)


def largest_error(request: RequestRun, logprobs: torch.Tensor, end: int | None = None) -> float:
    """Engine against reference, float64 [n, vocab]: over every log-probability that the engine
    returned, or those of the first ``end`` output tokens; NaN where any is."""
    errors = [
        abs(float(logprobs[request.num_prompt - 1 + i, token]) - value)
        for i, position in enumerate(request.logprobs[:end])
        for token, value in position.items()
    ]
    return float(torch.tensor(errors).max())


def assert_pool_is_as_at_the_start(run: EngineRun) -> None:
    """Every block is free, and nothing refers to any; block 0 is vLLM's null block."""
    assert run.num_free == run.num_blocks - 1
    assert set(run.ref_counts) == {0}


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids below 256, which every tiny model has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def generate(job: Job) -> EngineRun:
    """Runs in the engine's process."""
    from vllm import SamplingParams

    if job.async_scheduling:
        keep_async_scheduling()
    if job.kernel_block_size is not None:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = [job.kernel_block_size]
        CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda spec=None: sizes)
    llm = start_engine(job.model, job.settings, **{"disable_log_stats": True, **job.engine})
    recorder = _Recorder(llm)
    params = [
        SamplingParams(
            max_tokens=n,
            temperature=0.0,
            ignore_eos=True,
            logprobs=20,
            detokenize=False,
            extra_args=extra_args,
        )
        for n, extra_args in zip(
            job.max_tokens, job.extra_args or [None] * len(job.prompts), strict=True
        )
    ]
    for _ in range(job.repeat):
        recorder.forget()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False
        )
    return recorder.result(outputs)


class _Recorder:
    """Looks at the engine from inside its process: rounds, rows and the pool."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.statistics = None
        self.all_managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.managers = self.all_managers
        self.layers: list[tuple[int, int]] = []  # (layer index, group) of every compressed layer
        if "rounds" in vars(self.worker):
            for group_id, rounds in self.worker.rounds.items():
                self._observe(group_id, rounds)
            self.managers = [self.managers[group_id] for group_id in self.worker.rounds]
            self.statistics = statistics_file(llm)
        self._watch_steps()
        self.forget()

    def forget(self) -> None:
        self.kept: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
        self.steps: list[dict[str, tuple[int, int, int]]] = []
        self.starts: dict[str, list[int]] = {}
        self.drafts: dict[str, list[list[int]]] = {}
        self.num_preemptions = 0
        self.num_handed_over = 0

    def _observe(self, group_id: int, rounds: Any) -> None:
        from vllm.model_executor.models.utils import extract_layer_index

        original = rounds.run_batch
        names = self.worker.kv_cache_config.kv_cache_groups[group_id].layer_names
        own = [name for name in names if name not in self.worker.drafts]
        self.layers = sorted([*self.layers, *((extract_layer_index(n), group_id) for n in own)])

        def run_batch(plans: Any) -> torch.Tensor:
            kept: torch.Tensor = original(plans)
            for plan, tokens in zip(plans, kept, strict=True):
                rounds_of = self.kept.setdefault(plan.request_id, {})
                rounds_of.setdefault(plan.nominal_boundary, {})[group_id] = tokens.clone()
            return kept

        rounds.run_batch = run_batch

    def _all_layers(self, kept: dict[int, torch.Tensor]) -> torch.Tensor:
        """One round of all groups [L, H_kv, tokens], in the order of layers."""
        rows = {group_id: iter(tokens) for group_id, tokens in kept.items()}
        return torch.stack([next(rows[group_id]) for _, group_id in self.layers])

    def _watch_steps(self) -> None:
        original = self.scheduler.schedule

        def schedule(*args: Any) -> Any:
            output = original(*args)
            self.num_preemptions += len(output.preempted_req_ids or ())
            self.num_handed_over += sum(
                earlier.group_id > later.group_id
                and not set(earlier.source_blocks).isdisjoint(later.destination_blocks)
                for earlier, later in combinations(vars(output).get("round_plans", ()), 2)
            )
            manager = self.managers[0]
            for request_id, num_tokens in output.num_scheduled_tokens.items():
                computed = self.scheduler.requests[request_id].num_computed_tokens
                self.starts.setdefault(request_id, []).append(computed - num_tokens)
                proposed = output.scheduled_spec_decode_tokens.get(request_id, [])
                self.drafts.setdefault(request_id, []).append(self._drafts(request_id, proposed))
            rows = {}
            for request in self.scheduler.running:
                row = manager.req_to_blocks[request.request_id]
                num_null = sum(block.is_null for block in row)
                computed = request.num_computed_tokens
                rows[request.request_id] = (computed, num_null, len(row) - num_null)
            self.steps.append(rows)
            return output

        self.scheduler.schedule = schedule

    def _drafts(self, request_id: str, proposed: Sequence[int]) -> list[int]:
        """Model runner V2 tells the scheduler how many there are, and keeps which they are."""
        if -1 not in proposed:
            return list(proposed)
        states = self.worker.model_runner.req_states
        own: torch.Tensor = states.draft_tokens[states.req_id_to_index[request_id]]
        return own[: len(proposed)].tolist()

    def result(self, outputs: Sequence[Any]) -> EngineRun:
        pool = self.scheduler.kv_cache_manager.block_pool
        requests = []
        for output in outputs:
            (key,) = [key for key in self.starts if key.split("-")[0] == output.request_id]
            rounds = self.kept.get(key, {})
            completion = output.outputs[0]
            requests.append(
                RequestRun(
                    num_prompt=len(output.prompt_token_ids),
                    token_ids=[*output.prompt_token_ids, *completion.token_ids],
                    logprobs=[
                        {token: value.logprob for token, value in position.items()}
                        for position in completion.logprobs
                    ],
                    kept=[self._all_layers(kept) for kept in rounds.values()],
                    boundaries=list(rounds),
                    starts=self.starts[key],
                    drafts=self.drafts[key],
                )
            )
        return EngineRun(
            requests=requests,
            num_blocks=pool.num_gpu_blocks,
            num_free=pool.get_num_free_blocks(),
            statistics=self.statistics,
            steps=self.steps,
            num_preemptions=self.num_preemptions,
            scheduler=type(self.scheduler).__name__,
            worker=type(self.worker).__name__,
            block_size=self.managers[0].block_size,
            group_block_sizes=[manager.block_size for manager in self.all_managers],
            ref_counts=[block.ref_cnt for block in pool.blocks[1:]],
            num_handed_over=self.num_handed_over,
            longest_hashed=max(block.block_hash_num_tokens or 0 for block in pool.blocks),
            groups=[
                [row for row, (_, own) in enumerate(self.layers) if own == group_id]
                for group_id in sorted({group_id for _, group_id in self.layers})
            ],
        )
