"""The draft model of speculative decoding: which layers are its own, who builds their metadata."""

from collections.abc import Collection
from itertools import chain

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunnerV2
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunnerV1
from vllm.v1.worker.utils import AttentionGroup

from triattention_vllm.engine.rotary import attention_owners

DRAFT_MODEL_METHODS = ("draft_model", "eagle", "eagle3", "mtp")
"""Speculative methods whose draft model has attention layers of its own."""

SPECULATIVE_METHODS = ("ngram", *DRAFT_MODEL_METHODS)
"""Speculative methods that have been verified together with compression."""


def draft_layer_names(
    vllm_config: VllmConfig, model: nn.Module, layer_names: Collection[str]
) -> frozenset[str]:
    """Those of ``layer_names`` that belong to a draft model and not to ``model``."""
    config = vllm_config.speculative_config
    if config is None or config.method not in DRAFT_MODEL_METHODS:
        return frozenset()
    return frozenset(layer_names) - attention_owners(model).keys()


def draft_attention_groups(runner: ModelRunnerV1 | ModelRunnerV2) -> list[AttentionGroup]:
    """Groups whose metadata builders serve the draft model alone."""
    if isinstance(runner, ModelRunnerV2):
        speculator = runner.speculator
        has_layers = isinstance(speculator, DraftModelSpeculator)
        return list(chain(*speculator.attn_groups)) if has_layers else []
    # Only then a runner has a drafter.
    if runner.speculative_config is None or not get_pp_group().is_last_rank:
        return []
    drafter = runner.drafter
    return drafter.draft_attn_groups if isinstance(drafter, SpecDecodeBaseProposer) else []
