"""A compressed engine computes what a dense float64 decoder computes that sees the same tokens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from dense_judge import FLOAT32_ERROR
from dense_reference import DenseReference
from engine_runs import (
    SMALL,
    EngineRun,
    ModelFolder,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)

from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS

BY_DEFAULT = {"budget": 128, "interval": 32}
"""The window is a quarter of the budget, as where nothing is set."""


@pytest.mark.parametrize(
    ("family", "selection"),
    [
        ("qwen3", "per_layer_per_head"),
        ("qwen3", "union"),
        ("gptj", "per_head"),
        ("gptj", "per_layer_per_head"),
        ("gptj", "union"),
        ("llama3", "per_layer_per_head"),
        ("gpt_neox", "per_head"),
    ],
)
def test_log_probabilities_equal_the_dense_reference_over_many_rounds(
    family: str,
    selection: str,
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
) -> None:
    folder, chosen = model_folder(family), {**SMALL, "selection": selection}
    run = run_engine(
        folder,
        [random_prompt(50, 1)],
        480,
        {**chosen, "calibration_text": text},
        max_model_len=2048,
    )
    (request,) = run.requests
    dense = reference(folder)
    result = replayed(run, request, dense, chosen)
    assert len(result.rounds) >= 10
    assert request.boundaries == [round_.round.nominal_boundary for round_ in result.rounds]
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    full = dense.logprobs(request.token_ids[:-1])
    assert largest_error(request, full) > 100 * FLOAT32_ERROR, "eviction changed nothing"
    assert_pool_is_as_at_the_start(run)


def test_bfloat16_in_the_amx_layout_is_as_close_as_full_attention_is(
    model_folder: ModelFolder, text: str
) -> None:
    folder, prompt = model_folder("qwen3"), random_prompt(50, 2)
    run = run_engine(
        folder,
        [prompt],
        480,
        {**SMALL, "calibration_text": text},
        dtype="bfloat16",
        max_model_len=2048,
    )
    full = run_engine(folder, [prompt], 480, None, dtype="bfloat16", max_model_len=2048)
    dense = DenseReference(folder, rounded_to=torch.bfloat16)
    (request,) = run.requests
    result = replayed(run, request, dense, SMALL, tolerance=0.1)
    assert len(result.rounds) >= 10
    rounding = largest_error(full.requests[0], dense.logprobs(full.requests[0].token_ids[:-1]))
    assert largest_error(request, result.logprobs) < 1.5 * rounding
    assert_pool_is_as_at_the_start(run)


@pytest.mark.skipif(
    not BLOCKS_ARE_SPLIT_IN_GROUPS, reason="refused before vLLM 0.32, whose rows differ"
)
def test_blocks_that_vllm_splits_for_the_kernel_are_compressed(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """Two kernel blocks a block of the manager, and prompts that share a prefix: the region then
    begins with protected tokens, and its first blocks are not its own."""
    folder, chosen = model_folder("qwen3"), {"budget": 256, "interval": 64, "window": 32}
    prompt = random_prompt(100, 1)
    run = run_engine(
        folder,
        [prompt, [*prompt[:70], 7, 8]],
        400,
        {**chosen, "calibration_text": text},
        max_model_len=2048,
        block_size=64,
        kernel_block_size=32,
    )
    for request in run.requests:
        result = replayed(run, request, reference(folder), chosen)
        assert len(result.rounds) >= 2
        assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    assert_pool_is_as_at_the_start(run)


def test_requests_of_different_lengths_do_not_touch_each_other(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """With the selection and the window that are the default. Regression: a neighbour's row was
    shifted, or another request's blocks were returned."""
    folder = model_folder("qwen3")
    lengths = (3, 40, 90, 200)
    run = run_engine(
        folder,
        [random_prompt(n, seed) for seed, n in enumerate(lengths)],
        [480, 40, 350, 300],
        {**BY_DEFAULT, "calibration_text": text},
        max_model_len=2048,
    )
    dense = reference(folder)
    for request in run.requests:
        result = replayed(run, request, dense, BY_DEFAULT)
        assert request.boundaries == [round_.round.nominal_boundary for round_ in result.rounds]
        assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    longest = run.requests[0]
    assert len(longest.kept) >= 10
    full = dense.logprobs(longest.token_ids[:-1])
    assert largest_error(longest, full) > 100 * FLOAT32_ERROR, "eviction changed nothing"
    assert [bool(request.kept) for request in run.requests] == [True, False, True, True]
    for rows in run.steps:
        for computed, num_null, num_real in rows.values():
            assert num_null + num_real >= -(-computed // run.block_size)
            assert (num_null + num_real - 1) * run.block_size <= computed
    assert_pool_is_as_at_the_start(run)


def test_a_prompt_of_eight_budgets_is_compressed_while_it_is_prefilled(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """Regression: eviction inside a chunked prefill dropped tokens that the chunk still needs."""
    folder, chunk = model_folder("qwen3"), 96
    run = run_engine(
        folder,
        [random_prompt(1030, 3)],
        60,
        {**SMALL, "calibration_text": text},
        max_model_len=4096,
        max_num_batched_tokens=chunk,
    )
    (request,) = run.requests
    result = replayed(run, request, reference(folder), SMALL)
    assert len(result.rounds) >= 9
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    most = max(num_real for rows in run.steps for _, _, num_real in rows.values())
    assert most <= -(-(128 + 32 + chunk) // run.block_size)
    assert_pool_is_as_at_the_start(run)


def test_filling_holes_evicts_the_same_tokens_as_the_repack_in_order(
    model_folder: ModelFolder, text: str
) -> None:
    """Where a key lies does not matter to attention: only the order of its sums changes."""
    folder, prompt = model_folder("qwen3"), random_prompt(50, 1)
    settings = {**SMALL, "score_redundancy": 0, "calibration_text": text}
    repack, holes = (
        run_engine(
            folder, [prompt], 300, {**settings, "compaction": compaction}, max_model_len=1024
        )
        for compaction in ("repack", "fill_holes")
    )
    (one,), (other,) = repack.requests, holes.requests
    assert len(one.kept) >= 6
    assert one.boundaries == other.boundaries
    assert torch.equal(one.kept[0], other.kept[0])
    assert one.token_ids == other.token_ids
    chosen = one.token_ids[one.num_prompt :]
    for token, position, also in zip(chosen, one.logprobs, other.logprobs, strict=True):
        assert position[token] == pytest.approx(also[token], abs=FLOAT32_ERROR)
    assert_pool_is_as_at_the_start(holes)


@pytest.fixture(scope="module")
def same_requests(model_folder: ModelFolder) -> Callable[..., EngineRun]:
    """Three requests that end at 255 tokens or before, in a pool with room for many more."""
    prompts = [random_prompt(n, n) for n in (5, 60, 100)]
    engine = {"max_model_len": 1024, "max_num_batched_tokens": 64}
    return partial(run_engine, model_folder("qwen3"), prompts, [250, 190, 150], **engine)


@pytest.fixture(scope="module")
def stock(same_requests: Callable[..., EngineRun]) -> EngineRun:
    return same_requests(None, plugin=False)


def assert_is_as_without_the_plugin(run: EngineRun, stock: EngineRun) -> None:
    for one, other in zip(run.requests, stock.requests, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert not one.kept


def test_below_the_trigger_nothing_differs_from_vllm_without_the_plugin(
    same_requests: Callable[..., EngineRun], stock: EngineRun, text: str
) -> None:
    """Rounds would begin at 288 tokens."""
    off = same_requests(None)
    on = same_requests({**SMALL, "budget": 256, "calibration_text": text})
    assert stock.scheduler == off.scheduler == "Scheduler"
    assert on.scheduler == "CompressionScheduler"
    assert_is_as_without_the_plugin(off, stock)
    assert_is_as_without_the_plugin(on, stock)


def test_while_memory_is_ample_nothing_differs_from_vllm_without_the_plugin(
    same_requests: Callable[..., EngineRun], stock: EngineRun, text: str
) -> None:
    pressed = same_requests({**SMALL, "when": "pressure", "calibration_text": text})
    assert_is_as_without_the_plugin(pressed, stock)


def test_a_round_in_a_full_pool_takes_its_own_released_blocks_again(
    model_folder: ModelFolder, reference: Callable[[Path], DenseReference], text: str
) -> None:
    """The pool holds budget, interval and one chunk, the answer is four times as long: the first
    round needs private blocks for hashed ones, and only its own are left."""
    folder = model_folder("qwen3")
    run = run_engine(
        folder,
        [random_prompt(20, 4)],
        900,
        {**SMALL, "calibration_text": text},
        max_model_len=4096,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=8,
    )
    (request,) = run.requests
    result = replayed(run, request, reference(folder), SMALL)
    assert len(result.rounds) > 20
    assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    assert run.num_blocks * run.block_size < len(request.token_ids) < 4096
    assert run.num_preemptions == 0
    assert_pool_is_as_at_the_start(run)
