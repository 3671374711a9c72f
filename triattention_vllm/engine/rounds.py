"""A worker's part in a round: which layers a group has, their scorer, and its plans."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from triattention_kernels import PagedKV, RoundBatch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_layout import paged_kv
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.round import run_rounds
from triattention_vllm.method.score_triattention import TriAttentionScorer
from triattention_vllm.method.statistics import Statistics


class GroupRounds:
    """Carries out the plans of one KV-cache group on this rank's layers and heads."""

    def __init__(
        self,
        kv: PagedKV,
        scorer: TriAttentionScorer,
        settings: Settings,
    ) -> None:
        self.kv = kv
        self.scorer = scorer
        self.selection = settings.selection

    def run(self, plan: RoundPlan) -> torch.Tensor:
        """Score, select and compact one request; returns what it kept, [L, H_kv, tokens].

        Plans run one at a time, in the order they were decided, which bounds the staging
        memory by one request's region.
        """
        device = self.kv.keys.device
        batch = RoundBatch(
            source_blocks=torch.tensor([plan.source_blocks], device=device),
            destination_blocks=torch.tensor([plan.destination_blocks], device=device),
            num_source_blocks=(len(plan.source_blocks),),
            num_destination_blocks=(len(plan.destination_blocks),),
            first_candidate=(plan.first_candidate,),
        )
        return run_rounds(self.kv, batch, (plan.nominal_boundary,), self.scorer, self.selection)[0]


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
