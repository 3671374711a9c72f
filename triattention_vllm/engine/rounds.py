"""A worker's part in a round: which layers a group has, their scorer, and its plans."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from triattention_kernels import PagedKV, RoundBatch, forward_groups, moves_forward
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_layout import paged_kv
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.method.policy import Policy
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_triattention import TriAttentionScorer
from triattention_vllm.method.statistics import Statistics

MAX_BATCH = 64
"""Requests that one batch of launches takes on a GPU; bounds the scores' memory."""


class GroupRounds:
    """Carries out the plans of one KV-cache group on this rank's layers and heads."""

    def __init__(self, kv: PagedKV, scorer: TriAttentionScorer, settings: Settings) -> None:
        self.kv = kv
        self.scorer = scorer
        self.selection = settings.selection
        self.compaction = settings.compaction

    def run(self, plans: Sequence[RoundPlan]) -> None:
        """Score, select and compact; plans in the order in which they were decided.

        A later plan may write what an earlier one reads, when a released block was given out
        again within the step; it then waits for the earlier batch. In a full pool a plan may
        have got its own blocks again, at other places. On the CPU each plan is a batch of its
        own, which bounds the scratch memory by one region.
        """
        sources = [plan.source_blocks for plan in plans]
        destinations = [plan.destination_blocks for plan in plans]
        size = MAX_BATCH if self.kv.keys.is_cuda else 1
        for together in forward_groups(sources, destinations):
            for start in range(together.start, together.stop, size):
                self.run_batch(plans[start : min(start + size, together.stop)])

    def run_batch(self, plans: Sequence[RoundPlan]) -> torch.Tensor:
        """One batch of launches; returns what was kept, [R, L, H_kv, tokens]."""
        device = self.kv.keys.device
        batch = RoundBatch(
            source_blocks=_padded([plan.source_blocks for plan in plans], device),
            destination_blocks=_padded([plan.destination_blocks for plan in plans], device),
            num_source_blocks=tuple(len(plan.source_blocks) for plan in plans),
            num_destination_blocks=tuple(len(plan.destination_blocks) for plan in plans),
            first_candidate=tuple(plan.first_candidate for plan in plans),
            moves_forward=moves_forward(
                [plan.source_blocks for plan in plans], [plan.destination_blocks for plan in plans]
            ),
        )
        boundaries = [plan.nominal_boundary for plan in plans]
        return run_rounds(self.kv, batch, boundaries, self.scorer, self.selection, self.compaction)

    def warm_up(self, group_id: int, policy: Policy, num_blocks: int) -> None:
        """One round of the first blocks onto themselves, which no request may hold yet."""
        region = min(-(-(policy.budget + policy.interval) // policy.block_size), num_blocks - 1)
        blocks = tuple(range(1, region + 1))
        plan = RoundPlan(
            request_id="warm-up",
            group_id=group_id,
            nominal_boundary=policy.budget + policy.interval,
            source_blocks=blocks,
            first_candidate=0,
            destination_blocks=blocks[: max(1, region - 1)],
            row_start=0,
            row_blocks=(),
        )
        self.run([plan])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Block ids [R, longest] int64, rows padded with 0; one copy that nothing waits for."""
    width = max(len(row) for row in rows)
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    on_host = torch.tensor(padded, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def group_rounds(
    group: KVCacheGroupSpec,
    forward_context: Mapping[str, nn.Module],
    statistics: Statistics,
    rotary: Rotary,
    head_start: int,
    settings: Settings,
) -> GroupRounds:
    """The rounds of a group's layers, for this rank's query heads.

    head_start: index of this rank's first query head in the whole model, so that a rank of
    tensor parallelism scores with the statistics of its own heads.
    """
    layers = [cast(Attention, forward_context[name]) for name in group.layer_names]
    num_heads = layers[0].num_heads
    kv = paged_kv(layers, group.kv_cache_spec.block_size)
    indices = tuple(extract_layer_index(name) for name in group.layer_names)
    shard = statistics.shard(indices, head_start, num_heads)
    return GroupRounds(kv, TriAttentionScorer(shard, rotary, kv.keys.device), settings)
