"""Token segments as ordinary requests through this engine's own worker, before it serves."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

from torch import nn
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.outputs import AsyncModelRunnerOutput

from triattention_vllm.errors import StatisticsError, UnsupportedError

_MIN_SEGMENT = 64


class EngineWorker(Protocol):
    """What is used of vLLM's Worker: its configuration, its model and its steps, each of which is
    execute_model, then sample_tokens."""

    vllm_config: VllmConfig

    def get_model(self) -> nn.Module:
        """The loaded model."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> object:
        """None where sampling has to follow."""

    def sample_tokens(self, grammar_output: None) -> object:
        """The sampled tokens, possibly still on their way from the device."""


def longest_segment(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Tokens of the longest prompt that one step can prefill and the KV pool can hold.

    Raises StatisticsError where that is too short to calibrate with.
    """
    drafts = vllm_config.speculative_config
    # A draft model runs over the step's tokens and the one that was sampled.
    num_extra = 0 if drafts is None else drafts.max_num_new_slots_for_drafting
    num_tokens = min(
        vllm_config.scheduler_config.max_num_batched_tokens - num_extra,
        vllm_config.model_config.max_model_len - 1,
    )
    while num_tokens >= _MIN_SEGMENT:
        if _num_blocks(num_tokens, vllm_config, kv_cache_config) < kv_cache_config.num_blocks:
            return num_tokens
        num_tokens = num_tokens * 7 // 8
    raise StatisticsError(
        f"calibration needs prompts of at least {_MIN_SEGMENT} tokens, and this engine cannot run "
        "one in one step: raise max_model_len, max_num_batched_tokens or the KV cache size, or "
        "give a statistics file with the setting `statistics`"
    )


def split_evenly(tokens: list[int], first: list[int], longest: int) -> list[list[int]]:
    """Segments of at most ``longest`` tokens and nearly equal length, each led by ``first``
    (the token that begins a text, if the model has one)."""
    num_segments = cdiv(len(tokens), longest - len(first))
    ends = [len(tokens) * number // num_segments for number in range(num_segments + 1)]
    return [first + tokens[start:end] for start, end in pairwise(ends)]


def run_segment(worker: EngineWorker, tokens: list[int], kv_cache_config: KVCacheConfig) -> None:
    """Prefill ``tokens`` at positions 0, 1, ... in one step, then finish the request.

    Takes the first blocks of the KV pool, which no request may hold yet, and leaves no request
    behind. Collective over all ranks of the engine, like every step.
    """
    vllm_config = worker.vllm_config
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [_request(tokens, vllm_config, kv_cache_config)]
    step.num_scheduled_tokens = {_REQUEST_ID: len(tokens)}
    step.total_num_scheduled_tokens = len(tokens)
    step.num_spec_tokens_to_schedule = vllm_config.num_speculative_tokens
    finish = SchedulerOutput.make_empty()
    finish.finished_req_ids = {_REQUEST_ID}
    try:
        output = worker.execute_model(step)
        if output is None:
            output = worker.sample_tokens(None)
        if isinstance(output, AsyncModelRunnerOutput):
            output.get_output()
    finally:
        worker.execute_model(finish)


_REQUEST_ID = "triattention-calibration"


def _request(
    tokens: list[int], vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> NewRequestData:
    return NewRequestData(
        req_id=_REQUEST_ID,
        prompt_token_ids=tokens,
        mm_features=[],
        # With a seed of its own, or model runner V2 would draw one from the generator that the
        # seeds of users' requests are drawn from, and they would sample other tokens.
        sampling_params=SamplingParams(max_tokens=2, temperature=0.0, seed=0),
        pooling_params=None,
        block_ids=tuple(_block_ids(len(tokens), vllm_config, kv_cache_config)),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=tokens,
    )


def _block_ids(
    num_tokens: int, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> Iterator[list[int]]:
    """Blocks 1, 2, ... (0 is vLLM's null block), different ones for each KV group."""
    next_id = 1
    for group in kv_cache_config.kv_cache_groups:
        num_blocks = _blocks_of_group(num_tokens, group.kv_cache_spec, vllm_config)
        yield list(range(next_id, next_id + num_blocks))
        next_id += num_blocks


def _num_blocks(num_tokens: int, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    groups = kv_cache_config.kv_cache_groups
    return sum(_blocks_of_group(num_tokens, group.kv_cache_spec, vllm_config) for group in groups)


def _blocks_of_group(num_tokens: int, spec: KVCacheSpec, vllm_config: VllmConfig) -> int:
    """Blocks that the scheduler would give a prompt: its tokens and the drafts behind them."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    if isinstance(spec, CrossAttentionSpec):
        raise UnsupportedError("calibration cannot run a model with cross-attention")
    num_extra = spec.num_speculative_blocks if isinstance(spec, MambaSpec) else 0
    with_drafts = num_tokens + vllm_config.num_lookahead_tokens
    num_slots = min(with_drafts, vllm_config.model_config.max_model_len)
    return cdiv(num_slots, spec.block_size) + num_extra
