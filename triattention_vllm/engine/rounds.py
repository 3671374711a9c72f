"""A worker's part in a round: which layers a group has, their scorer, and its plans."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from triattention_kernels import PagedKV, RoundBatch, compact, forward_groups, moves_forward
from triattention_kernels.host_copy import on_device
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_layout import paged_kv
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.observations import Observations
from triattention_vllm.engine.recorded_queries import RecordedQueries
from triattention_vllm.engine.trace import SurvivorTrace
from triattention_vllm.method.policy import Policy
from triattention_vllm.method.ranking import Ranking
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_knorm import KnormScorer
from triattention_vllm.method.score_random import RandomScorer
from triattention_vllm.method.score_streamingllm import StreamingLLMScorer
from triattention_vllm.method.score_triattention import TriAttentionScorer, offsets_of
from triattention_vllm.method.score_vnorm import VnormScorer
from triattention_vllm.method.scorer import Scorer
from triattention_vllm.method.scorers import OBSERVING_SCORERS
from triattention_vllm.method.statistics import Statistics

MAX_BATCH_BYTES = 3 << 27
"""Scratch memory of one batch of launches on a GPU, 0.4 GB, before the step's own activations need
it. vLLM's profile of memory does not see it, so ``warm_up`` asks for it at start. With
Qwen3-8B's shape and ``per_head`` that is 68 thousand tokens of regions, counted as padded there:
requests times the longest region. A region that takes more is a batch of its own. A single request
whose blocks come back at other places also takes room for its own kept tokens, at most its budget.
"""


class Rounds(ABC):
    """Carries out the plans of one KV-cache group on some of this rank's layers.

    block_size: of the plans' blocks; the cache may be bound in smaller ones (``paged_kv``).
    """

    def __init__(self, kv: PagedKV, block_size: int) -> None:
        self.kv = kv
        self.split = block_size // kv.block_size
        self.trace: SurvivorTrace | None = None

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Scratch memory of a region's token."""

    @abstractmethod
    def run_batch(self, plans: Sequence[RoundPlan]) -> torch.Tensor:
        """One batch of launches; returns what was kept, [R, L, H_kv, tokens].

        plans: in blocks of ``kv``.
        """

    def run(self, plans: Sequence[RoundPlan]) -> None:
        """Plans of one of ``runs``.

        On the CPU each plan is a batch of its own, which bounds the scratch memory by one region.
        """
        plans = [in_kernel_blocks(plan, self.split) for plan in plans]
        on_cpu = self.kv.keys.device.type == "cpu"
        block_bytes = self.bytes_per_token * self.kv.block_size
        most_blocks = 0 if on_cpu else MAX_BATCH_BYTES // block_bytes
        for batch in batches(plans, most_blocks):
            kept = self.run_batch(batch)
            if self.trace is not None:
                self.trace.record(batch, kept)

    def warm_up(self, group_id: int, policy: Policy, num_blocks: int) -> None:
        """Rounds of the first blocks, which no request may hold yet: onto themselves, and onto one
        another, whose tokens go through scratch memory by other code."""
        region = min(cdiv(policy.budget + policy.interval, policy.block_size), num_blocks - 1)
        blocks = tuple(range(1, region + 1))
        num_kept = max(1, region - 1)
        for destination in (blocks[:num_kept], blocks[-num_kept:]):
            plan = RoundPlan(
                request_id="warm-up",
                group_id=group_id,
                nominal_boundary=policy.budget + policy.interval,
                source_blocks=blocks,
                first_candidate=0,
                destination_blocks=destination,
                row_start=0,
                row_blocks=(),
            )
            self.run_batch([in_kernel_blocks(plan, self.split)])
        # What a batch may take is asked for now, and stays with torch: a card that has no room for
        # it fails before a request comes.
        torch.empty(MAX_BATCH_BYTES, dtype=torch.uint8, device=self.kv.keys.device)


def runs(plans: Sequence[RoundPlan]) -> Iterator[dict[int, list[RoundPlan]]]:
    """A step's plans, of all groups, cut into runs; of each run the plans of every group.

    plans: in the order in which they were decided. Runs are carried out one after another, the
    plans of a run in any order. A later plan may write what an earlier one reads, of its own group
    or of another whose block is the same bytes, when a released block was given out again within
    the step: it begins a new run. In a full pool a plan may have got its own blocks again, at other
    places; it is a run of its own.
    """
    sources = [plan.source_blocks for plan in plans]
    destinations = [plan.destination_blocks for plan in plans]
    for together in forward_groups(sources, destinations):
        of_group: dict[int, list[RoundPlan]] = {}
        for plan in plans[together.start : together.stop]:
            of_group.setdefault(plan.group_id, []).append(plan)
        yield of_group


def batches(plans: Sequence[RoundPlan], most_blocks: int) -> Iterator[Sequence[RoundPlan]]:
    """Plans of one run and group, cut into those that share their launches.

    most_blocks: of a batch's regions, padded to the longest; a plan with more is a batch of its
    own.
    """
    start, longest = 0, 0
    for idx, plan in enumerate(plans):
        longest = max(longest, len(plan.source_blocks))
        if idx > start and (idx + 1 - start) * longest > most_blocks:
            yield plans[start:idx]
            start, longest = idx, len(plan.source_blocks)
    if plans:
        yield plans[start:]


def in_kernel_blocks(plan: RoundPlan, split: int) -> RoundPlan:
    """The same plan where block b is the ``split`` kernel blocks from ``b * split`` on."""
    if split == 1:
        return plan

    def spelt_out(blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(block * split + part for block in blocks for part in range(split))

    return replace(
        plan,
        source_blocks=spelt_out(plan.source_blocks),
        destination_blocks=spelt_out(plan.destination_blocks),
    )


class TargetRounds(Rounds):
    """Rounds of the model's own layers: the best-scored candidates survive.

    observations: what the scorer is told of each request, where it looks at queries.
    """

    def __init__(
        self,
        kv: PagedKV,
        block_size: int,
        scorer: Scorer,
        settings: Settings,
        observations: Observations | None = None,
    ) -> None:
        super().__init__(kv, block_size)
        self.scorer = scorer
        self.selection = settings.selection
        self.compaction = settings.compaction
        self.observations = observations
        self.ranking = Ranking(
            normalise=settings.score_normalise == "heads",
            layers=settings.score_layers,
            redundancy=settings.redundancy,
            protected_values=settings.score_protect_values,
        )

    @property
    def bytes_per_token(self) -> int:
        """Scores and redundancy of every layer; ranking values, and kept indices twice, of every
        layer that chooses for itself."""
        num_layers, num_kv_heads = self.kv.num_layers, self.kv.num_kv_heads
        num_scores = self.scorer.num_scores(num_kv_heads) + num_kv_heads
        num_choosing = num_layers if self.selection == "per_layer_per_head" else 1
        return 4 * num_layers * num_scores + (4 + 2 * 8) * num_choosing * num_kv_heads

    def run_batch(self, plans: Sequence[RoundPlan]) -> torch.Tensor:
        """Score, select and compact."""
        batch = _batch(plans, self.kv.keys.device)
        boundaries = [plan.nominal_boundary for plan in plans]
        observed = [] if self.observations is None else [self.observations.of(p) for p in plans]
        kept, scores = run_rounds(
            self.kv,
            batch,
            boundaries,
            self.scorer,
            self.selection,
            self.compaction,
            observed,
            self.ranking,
        )
        if self.observations is not None:
            self.observations.keep(plans, scores, kept)
        return kept

    def warm_up(self, group_id: int, policy: Policy, num_blocks: int) -> None:
        """Nothing where queries have to be seen first: a first round may wait for a compiler."""
        if self.observations is None:
            super().warm_up(group_id, policy, num_blocks)


class DraftRounds(Rounds):
    """Rounds of a draft model's layers: the protected prefix and the latest candidates survive.

    A draft only proposes: which of its own keys remain cannot change a token of the answer, only
    how many proposals are accepted. So it needs neither statistics nor heads like the target's.
    """

    @property
    def bytes_per_token(self) -> int:
        """Kept indices, twice."""
        return 2 * 8

    def run_batch(self, plans: Sequence[RoundPlan]) -> torch.Tensor:
        """Compact what ``latest_tokens`` keeps."""
        device, block_size = self.kv.keys.device, self.kv.block_size
        rows = _padded([latest_tokens(plan, block_size) for plan in plans], device)
        kept = rows[:, None, None].expand(-1, self.kv.num_layers, self.kv.num_kv_heads, -1)
        compact(self.kv, _batch(plans, device), kept)
        return kept


def latest_tokens(plan: RoundPlan, block_size: int) -> list[int]:
    """Region token indices, ascending: the protected ones that lead the region and the latest."""
    num_region = len(plan.source_blocks) * block_size
    num_kept = len(plan.destination_blocks) * block_size
    first_latest = num_region - (num_kept - plan.first_candidate)
    return [*range(plan.first_candidate), *range(first_latest, num_region)]


def _batch(plans: Sequence[RoundPlan], device: torch.device) -> RoundBatch:
    """The plans' blocks as the kernels take them."""
    sources = [plan.source_blocks for plan in plans]
    destinations = [plan.destination_blocks for plan in plans]
    return RoundBatch(
        source_blocks=_padded(sources, device),
        destination_blocks=_padded(destinations, device),
        num_source_blocks=tuple(map(len, sources)),
        num_destination_blocks=tuple(map(len, destinations)),
        first_candidate=tuple(plan.first_candidate for plan in plans),
        moves_forward=moves_forward(sources, destinations),
    )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Indices [R, longest] int64, rows padded with 0; one copy that nothing waits for."""
    width = max(len(row) for row in rows)
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return on_device(padded, torch.int64, device)


def target_rounds(
    layers: Sequence[Attention],
    block_size: int,
    statistics: tuple[Statistics, Rotary] | None,
    rank: int,
    settings: Settings,
    max_model_len: int,
) -> TargetRounds:
    """The rounds of a group's layers of the served model, for this rank's heads.

    statistics: of the whole model, and the rotary parameters of these layers, where the method
    scores with them. rank: of tensor parallelism, so that each scores for its own heads.
    """
    kv = paged_kv(layers, block_size)
    indices = tuple(extract_layer_index(layer.layer_name) for layer in layers)
    if statistics is not None:
        whole, rotary = statistics
        num_heads = layers[0].num_heads
        shard = whole.shard(indices, rank * num_heads, num_heads)
        scorer = triattention_scorer(shard, rotary, kv.keys.device, settings, max_model_len)
        return TargetRounds(kv, block_size, scorer, settings)
    if settings.method in OBSERVING_SCORERS:
        observing = OBSERVING_SCORERS[settings.method]([layer.impl.scale for layer in layers])
        queries = RecordedQueries(layers, observing.num_queries, settings.interval)
        observations = Observations(queries, observing.accumulates, block_size)
        return TargetRounds(kv, block_size, observing, settings, observations)
    scorers: dict[str, Callable[[], Scorer]] = {
        "streamingllm": StreamingLLMScorer,
        "knorm": KnormScorer,
        "vnorm": VnormScorer,
        "random": lambda: RandomScorer(indices, rank * kv.num_kv_heads),
    }
    return TargetRounds(kv, block_size, scorers[settings.method](), settings)


def triattention_scorer(
    shard: Statistics,
    rotary: Rotary,
    device: torch.device,
    settings: Settings,
    max_model_len: int,
) -> TriAttentionScorer:
    """The score of these layers and heads as the settings want it."""
    return TriAttentionScorer(
        shard,
        rotary,
        device,
        offsets=offsets_of(settings.score_offsets, max_model_len),
        norm_term=settings.score_norm_term == "full",
    )
