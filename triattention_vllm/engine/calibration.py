"""Statistics of the running model, made by running a text through it and looking at its queries.

Queries are recorded where our attention implementations receive them, after RoPE, and un-rotated
with the model's own rotary parameters: so every model, quantisation and parallel layout that vLLM
serves is calibrated as it runs.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import vllm
from torch import Tensor
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.kv_cache_interface import KVCacheConfig

from triattention_vllm import __version__
from triattention_vllm.engine.attention import queries_shown
from triattention_vllm.engine.calibration_run import (
    EngineWorker,
    longest_segment,
    run_segment,
    split_evenly,
)
from triattention_vllm.engine.ranks import is_first_rank, of_all_ranks, on_first_rank
from triattention_vllm.errors import SeamError, StatisticsError, TriAttentionError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics, StatisticsAccumulator

MIN_TOKENS = 256
"""Fewest tokens of a calibration text."""

_CHUNK = 256


def calibrate(
    worker: EngineWorker,
    kv_cache_config: KVCacheConfig,
    layer_names: Sequence[str],
    rotary: Rotary,
    fingerprint: Fingerprint,
    text: str,
    text_name: str,
) -> Statistics:
    """Statistics of the whole model over ``text``, equal on every rank. Collective.

    Called when the KV cache is allocated and no request is scheduled. layer_names: this rank's
    compressed attention layers, whose implementations have a ``query_observer``; rotary: their
    parameters, same order; text_name: how the statistics call the text.

    Raises StatisticsError where the text is too short, the engine has no tokenizer or too little
    room, or queries are NaN; SeamError where a layer was not seen.
    """
    vllm_config = worker.vllm_config
    segments = _segments(vllm_config, kv_cache_config, text, text_name)
    layers = vllm_config.compilation_config.static_forward_context
    recorder = _QueryRecorder(layers, layer_names, rotary)
    hidden = not (is_first_rank() and sys.stderr.isatty())
    with recorder.recording():
        for segment in tqdm(segments, desc="Calibrating", unit="segment", disable=hidden):
            recorder.begin_segment()
            run_segment(worker, segment, kv_cache_config)
            recorder.check_segment(len(segment))
    first_head = get_tensor_model_parallel_rank() * recorder.num_heads
    return merge_shards(
        fingerprint, _shards_or_failure(recorder, fingerprint, text_name, first_head)
    )


def _shards_or_failure(
    recorder: "_QueryRecorder", fingerprint: Fingerprint, text_name: str, first_head: int
) -> list[tuple[int, Statistics]]:
    """Every rank's first query head and statistics; one rank's failure is raised on all."""
    own: tuple[int, Statistics] | TriAttentionError
    if recorder.failure is None:
        own = first_head, recorder.finish(fingerprint, text_name)
    else:
        own = recorder.failure
    return of_all_ranks(own)


def _segments(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, text: str, text_name: str
) -> list[list[int]]:
    """The prompts of the steps, equal on every rank: all wait for one another in each of them. One
    rank reads the tokenizer, and the smallest pool says how long they are."""
    tokens, first = on_first_rank(lambda: _tokens(vllm_config.model_config, text, text_name))
    longest: int | StatisticsError
    try:
        longest = longest_segment(vllm_config, kv_cache_config)
    except StatisticsError as error:
        longest = error
    return split_evenly(tokens, first, min(of_all_ranks(longest)))


def _tokens(model_config: ModelConfig, text: str, text_name: str) -> tuple[list[int], list[int]]:
    """Token ids of the text, and the token that begins every text (empty if there is none)."""
    if model_config.skip_tokenizer_init:
        raise StatisticsError(
            "calibration reads a text, and this engine runs without a tokenizer "
            "(skip_tokenizer_init); give a statistics file with the setting `statistics`"
        )
    tokenizer = cached_tokenizer_from_config(model_config)
    tokens: list[int] = tokenizer.encode(text)
    begins = tokens[:1] if tokens and tokens[0] in tokenizer.all_special_ids else []
    if len(tokens) < MIN_TOKENS:
        raise StatisticsError(
            f"the calibration text {text_name} has {len(tokens)} tokens; at least {MIN_TOKENS} "
            "are needed, and several thousand are better: give a longer text, or none to use the "
            "one that is shipped"
        )
    return tokens[len(begins) :], begins


class _QueryRecorder:
    """Accumulates the queries of some attention layers while it is recording.

    failure: the first thing that went wrong, if anything did. It is not raised where it happens:
    in the middle of a step the other ranks would wait for this one forever.
    """

    def __init__(
        self, layers: Mapping[str, Attention], layer_names: Sequence[str], rotary: Rotary
    ) -> None:
        self._layers = {name: layers[name] for name in layer_names}
        self._rows = {name: row for row, name in enumerate(layer_names)}
        self._rotary = rotary
        self._num_seen = dict.fromkeys(layer_names, 0)
        self.failure: TriAttentionError | None = None
        some = self._layers[layer_names[0]]
        self.num_heads: int = some.num_heads
        self._accumulator = StatisticsAccumulator(
            self.num_heads, some.head_size, rotary.rotary_dims
        )

    def recording(self) -> AbstractContextManager[None]:
        """Observe every layer inside the block, none after it."""
        return queries_shown(list(self._layers.values()), self._observe)

    def begin_segment(self) -> None:
        """Positions count from 0 again."""
        self._num_seen = dict.fromkeys(self._num_seen, 0)

    def check_segment(self, num_tokens: int) -> None:
        """Note a failure unless every layer has shown all queries of the segment, once."""
        wrong = {name: seen for name, seen in self._num_seen.items() if seen != num_tokens}
        if wrong and self.failure is None:
            self.failure = SeamError(
                f"{num_tokens} tokens were run and attention layers showed other numbers of "
                f"queries: {wrong}. If cudagraph_mode is FULL, start once without it or give a "
                "statistics file with the setting `statistics`; otherwise this vLLM version is "
                "not supported"
            )

    def _observe(self, layer_name: str, query: Tensor) -> None:
        """Add queries [n, H, D] at the next n positions; in chunks, to bound float64 memory."""
        row, start = self._rows[layer_name], self._num_seen[layer_name]
        for chunk in torch.split(query, _CHUNK):
            positions = torch.arange(start, start + len(chunk), device=query.device)
            pairs, unrotated = self._rotary.un_rotate(chunk, positions, row)
            try:
                self._accumulator.add(row, pairs, unrotated)
            except StatisticsError as error:
                self.failure = self.failure or error
            start += len(chunk)
        self._num_seen[layer_name] = start

    def finish(self, whole: Fingerprint, text_name: str) -> Statistics:
        """This rank's layers and heads; ``whole`` is the fingerprint of the whole model."""
        own = replace(
            whole,
            layer_indices=tuple(extract_layer_index(name) for name in self._layers),
            num_heads=self.num_heads,
            num_kv_heads=None,
            rotary_dims=self._rotary.rotary_dims,
        )
        versions = (
            f"triattention-vllm {__version__}, vllm {vllm.__version__}, torch {torch.__version__}"
        )
        return self._accumulator.finish(own, text_name, versions)


def merge_shards(fingerprint: Fingerprint, shards: Sequence[tuple[int, Statistics]]) -> Statistics:
    """The whole model's statistics from every rank's (first query head, layers and heads).

    Data-parallel ranks have the same layers and heads: they write the same values.
    Raises SeamError where a layer or head is left out.
    """
    rows = {layer_idx: row for row, layer_idx in enumerate(fingerprint.layer_indices)}
    shape = (fingerprint.num_layers, fingerprint.num_heads)
    num_frequencies = fingerprint.num_frequencies
    whole = {
        name: torch.zeros(*shape, size)
        for name, size in (
            ("centre_real", num_frequencies),
            ("centre_imag", num_frequencies),
            ("magnitude", num_frequencies),
            ("unrotated_mean", fingerprint.head_dim),
        )
    }
    filled = torch.zeros(shape, dtype=torch.bool)
    for first_head, shard in shards:
        heads = slice(first_head, first_head + shard.fingerprint.num_heads)
        for shard_row, layer_idx in enumerate(shard.fingerprint.layer_indices):
            row = rows[layer_idx]
            for name, values in whole.items():
                own: Tensor = vars(shard)[name][shard_row]
                values[row, heads, : own.shape[-1]] = own
            filled[row, heads] = True
    if not bool(filled.all()):
        missing = [list(pair) for pair in (~filled).nonzero().tolist()]
        raise SeamError(
            f"no rank recorded these (layer row, query head): {missing[:8]}; this parallel layout "
            "is not supported, give a statistics file with the setting `statistics`"
        )
    return Statistics(fingerprint=fingerprint, provenance=shards[0][1].provenance, **whole)
