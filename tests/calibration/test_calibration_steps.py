"""Segments, blocks and shards of a calibration, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.states import SamplingStates

from triattention_vllm.engine import calibration, ranks
from triattention_vllm.engine.calibration import merge_shards
from triattention_vllm.engine.calibration_run import longest_segment, run_segment, split_evenly
from triattention_vllm.errors import SeamError, StatisticsError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics

MODEL = Fingerprint(
    architecture="TinyForCausalLM",
    layer_indices=(0, 2, 5),
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rotary_dims=(4, 0, 4),
    interleaved=False,
    inv_freq_hash="a",
    weights_hash="b",
)


def engine_config(
    max_num_batched_tokens: int = 4096, max_model_len: int = 2048, num_lookahead_tokens: int = 0
) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_num_batched_tokens),
        model_config=SimpleNamespace(max_model_len=max_model_len, skip_tokenizer_init=True),
        num_lookahead_tokens=num_lookahead_tokens,
        num_speculative_tokens=0,
        speculative_config=None,
    )


def pool(num_blocks: int, *block_sizes: int) -> SimpleNamespace:
    common = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    specs = [FullAttentionSpec(block_size=block_sizes[0], **common)]
    specs += [SlidingWindowSpec(block_size=s, sliding_window=64, **common) for s in block_sizes[1:]]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)


@given(num_tokens=st.integers(1, 5000), longest=st.integers(2, 600), has_first=st.booleans())
def test_segments_are_the_text_in_order_and_nearly_equal(
    num_tokens: int, longest: int, has_first: bool
) -> None:
    first = [-1] if has_first else []
    segments = split_evenly(list(range(num_tokens)), first, longest)
    assert [token for part in segments for token in part[len(first) :]] == list(range(num_tokens))
    assert all(part[: len(first)] == first for part in segments)
    lengths = [len(part) for part in segments]
    assert max(lengths) <= longest
    assert max(lengths) - min(lengths) <= 1


def test_the_longest_segment_obeys_step_model_and_pool() -> None:
    assert longest_segment(engine_config(), pool(1000, 16)) == 2047
    assert longest_segment(engine_config(max_num_batched_tokens=512), pool(1000, 16)) == 512
    in_small_pool = longest_segment(engine_config(), pool(21, 16))
    assert 280 <= in_small_pool <= 320
    assert longest_segment(engine_config(), pool(21, 16, 16)) <= 160
    with pytest.raises(StatisticsError, match="KV cache size"):
        longest_segment(engine_config(), pool(3, 16))


def test_the_longest_segment_leaves_room_for_a_draft_model() -> None:
    """Its first pass is longer than the step, and its buffers are as long as the longest step."""
    config = engine_config(max_num_batched_tokens=512)
    config.speculative_config = SimpleNamespace(max_num_new_slots_for_drafting=1)
    assert longest_segment(config, pool(1000, 16)) == 511


class RecordingWorker:
    """Takes steps as vLLM's worker does: sampling follows where execute_model returns None."""

    def __init__(self, **limits: int) -> None:
        self.vllm_config = engine_config(**limits)
        self.steps: list[SchedulerOutput] = []
        self.num_sampled = 0

    def execute_model(self, step: SchedulerOutput) -> object:
        self.steps.append(step)
        return None if step.total_num_scheduled_tokens else "nothing to do"

    def sample_tokens(self, grammar_output: None) -> object:
        self.num_sampled += 1
        return "a token"


def test_a_segment_is_one_request_that_is_finished_afterwards() -> None:
    worker = RecordingWorker(num_lookahead_tokens=5)
    run_segment(worker, list(range(100)), pool(50, 16, 32))
    step, finish = worker.steps
    (request,) = step.scheduled_new_reqs
    assert step.num_scheduled_tokens == {request.req_id: 100}
    assert request.prompt_token_ids == request.prefill_token_ids == list(range(100))
    assert [len(ids) for ids in request.block_ids] == [7, 4]
    all_ids = [block_id for ids in request.block_ids for block_id in ids]
    assert sorted(all_ids) == list(range(1, 12)), "different blocks, never the null block"
    assert worker.num_sampled == 1
    assert finish.finished_req_ids == {request.req_id}
    assert finish.total_num_scheduled_tokens == 0


def test_a_segment_draws_no_seed_of_the_users_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: without compression, and at a start that found its statistics, other tokens were
    sampled. Model runner V2 draws the seeds of requests that name none from one generator."""
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    worker, states = RecordingWorker(), SamplingStates(max_num_reqs=2, vocab_size=10)
    run_segment(worker, [1, 2, 3], pool(50, 16))
    (segment,) = worker.steps[0].scheduled_new_reqs

    def drawn(*first: SamplingParams) -> int:
        np.random.seed(7)
        for params in (*first, SamplingParams()):
            states.add_request(0, params)
        return int(states.seeds.np[0])

    assert drawn(segment.sampling_params) == drawn()
    assert drawn(SamplingParams()) != drawn()


def test_the_request_is_finished_also_where_its_step_fails() -> None:
    class FailingWorker(RecordingWorker):
        def sample_tokens(self, grammar_output: None) -> object:
            raise RuntimeError("out of memory")

    worker = FailingWorker()
    with pytest.raises(RuntimeError, match="out of memory"):
        run_segment(worker, [1, 2, 3], pool(50, 16))
    assert len(worker.steps[-1].finished_req_ids) == 1


def whole_statistics() -> Statistics:
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(2, 3, 4, 2, generator=generator)
    magnitude = centre.norm(dim=0) + 0.5
    unrotated = torch.randn(3, 4, 6, generator=generator)
    for row, rotary_dim in enumerate(MODEL.rotary_dims):
        unrotated[row, :, :rotary_dim] = 0.0
        if rotary_dim == 0:
            centre[:, row] = 0.0
            magnitude[row] = 0.0
    provenance = {"tokens_seen": "5", "text": "t"}
    return Statistics(MODEL, centre[0], centre[1], magnitude, unrotated, provenance)


def test_shards_of_every_rank_merge_into_the_whole() -> None:
    whole = whole_statistics()
    shards = [
        (first_head, whole.shard(layers, first_head, 2))
        for layers in ([0, 2], [5])
        for first_head in (0, 2)
    ]
    for order in (shards, shards[::-1], shards + shards):
        merged = merge_shards(MODEL, order)
        assert torch.equal(merged.centre(), whole.centre())
        assert torch.equal(merged.magnitude, whole.magnitude)
        assert torch.equal(merged.unrotated_mean, whole.unrotated_mean)
        assert merged.fingerprint == MODEL


def test_heads_that_no_rank_recorded_are_an_error() -> None:
    whole = whole_statistics()
    with pytest.raises(SeamError, match="no rank recorded"):
        merge_shards(MODEL, [(0, whole.shard([0, 2, 5], 0, 2))])


class Layer(SimpleNamespace):
    """An attention layer whose implementation may be observed."""


def recorder() -> tuple[calibration._QueryRecorder, dict[str, Layer]]:
    names = [f"model.layers.{idx}.self_attn.attn" for idx in MODEL.layer_indices]
    layers = {
        name: Layer(num_heads=4, head_size=6, impl=SimpleNamespace(query_observer=None))
        for name in names
    }
    rotary = Rotary(
        inv_freq=torch.tensor([[1.0, 0.1], [0.0, 0.0], [1.0, 0.1]], dtype=torch.float64),
        attention_factor=torch.ones(3, dtype=torch.float64),
        rotary_dims=MODEL.rotary_dims,
        interleaved=False,
    )
    return calibration._QueryRecorder(layers, names, rotary), layers


def test_observers_are_taken_off_also_after_an_error() -> None:
    recording, layers = recorder()

    def fail_while_recording() -> None:
        with recording.recording():
            assert all(layer.impl.query_observer is not None for layer in layers.values())
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        fail_while_recording()
    assert all(layer.impl.query_observer is None for layer in layers.values())


def test_positions_start_again_with_each_segment() -> None:
    whole, parts = recorder()[0], recorder()
    query = torch.randn(600, 4, 6)
    names = list(parts[1])
    for recording, lengths in ((whole, [600]), (parts[0], [257, 343])):
        for name in names:
            recording.begin_segment()
            start = 0
            for length in lengths:
                recording._observe(name, query[start : start + length])
                start += length
    one, two = (part.finish(MODEL, "t") for part in (whole, parts[0]))
    assert torch.allclose(one.centre(), two.centre(), atol=1e-6)
    again = recorder()[0]
    for name in names:
        for start, end in ((0, 257), (257, 600)):
            again.begin_segment()
            again._observe(name, query[start:end])
    assert not torch.allclose(again.finish(MODEL, "t").centre(), one.centre(), atol=1e-3)


def test_nan_queries_are_a_failure_that_does_not_stop_the_step() -> None:
    recording, layers = recorder()
    query = torch.randn(10, 4, 6)
    query[3, 1, 0] = torch.nan
    for name in layers:
        recording._observe(name, query)
    recording.check_segment(10)
    assert isinstance(recording.failure, StatisticsError)
    with pytest.raises(StatisticsError, match="NaN"):
        raise recording.failure


def test_a_layer_that_was_not_seen_is_a_failure() -> None:
    recording, layers = recorder()
    name, *_ = layers
    recording._observe(name, torch.randn(10, 4, 6))
    recording.check_segment(10)
    assert isinstance(recording.failure, SeamError)
    assert "model.layers.2" in str(recording.failure)


def test_an_engine_without_tokenizer_asks_for_a_file() -> None:
    with pytest.raises(StatisticsError, match="give a statistics file"):
        calibration._tokens(engine_config().model_config, "text", "a text")


def test_a_short_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(encode=lambda text: list(range(len(text))), all_special_ids=[])
    monkeypatch.setattr(calibration, "cached_tokenizer_from_config", lambda config: tokenizer)
    model_config = SimpleNamespace(skip_tokenizer_init=False)
    with pytest.raises(StatisticsError, match="notes.txt has 255 tokens; at least 256"):
        calibration._tokens(model_config, "x" * 255, "notes.txt")
    tokens, first = calibration._tokens(model_config, "x" * 256, "notes.txt")
    assert (len(tokens), first) == (256, [])


def test_the_token_that_begins_a_text_begins_every_segment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = SimpleNamespace(encode=lambda text: list(range(300)), all_special_ids=[0, 7])
    monkeypatch.setattr(calibration, "cached_tokenizer_from_config", lambda config: tokenizer)
    tokens, first = calibration._tokens(SimpleNamespace(skip_tokenizer_init=False), "", "t")
    assert first == [0]
    assert tokens == list(range(1, 300))


def test_all_ranks_run_the_same_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: every rank tokenised the text and counted its own pool, and where one failed or
    came to other segments the others waited for it in a step, for ever."""
    monkeypatch.setattr(ranks, "is_first_rank", lambda: False)
    monkeypatch.setattr(ranks, "from_first_rank", lambda value: [(list(range(1000)), [7])])
    monkeypatch.setattr(ranks, "gather_from_all_ranks", lambda value: [value, 300])
    segments = calibration._segments(engine_config(), pool(1000, 16), "text", "notes.txt")
    assert [segment[0] for segment in segments] == [7] * 4
    assert max(map(len, segments)) <= 300
    too_small = StatisticsError("the pool of another rank")
    monkeypatch.setattr(ranks, "gather_from_all_ranks", lambda value: [value, too_small])
    with pytest.raises(StatisticsError, match="the pool of another rank"):
        calibration._segments(engine_config(), pool(1000, 16), "text", "notes.txt")


def test_own_fingerprint_of_a_rank_names_its_layers_and_heads() -> None:
    recording, layers = recorder()
    for name in layers:
        recording._observe(name, torch.randn(8, 4, 6))
    made = recording.finish(replace(MODEL, num_heads=8), "t")
    assert made.fingerprint.layer_indices == (0, 2, 5)
    assert made.fingerprint.num_heads == 4
    assert made.provenance["tokens_seen"] == "8"
