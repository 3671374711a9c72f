"""Speculative decoding on the real engine: rounds see committed tokens only, answers stay right."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_judge import FLOAT32_ERROR
from dense_reference import DenseReference, DenseRun
from draft_models import (
    write_eagle3_head,
    write_eagle_head,
    write_mimo,
    write_near_copy,
    write_other_heads,
)
from engine_runs import (
    SMALL,
    EngineRun,
    ModelFolder,
    RequestRun,
    assert_pool_is_as_at_the_start,
    largest_error,
    random_prompt,
    replayed,
    run_engine,
)
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.engine.differences import CPU_BUILD_VERIFIES_DRAFTS
from triattention_vllm.method.policy import Round

pytestmark = pytest.mark.skipif(
    not CPU_BUILD_VERIFIES_DRAFTS, reason="vLLM 0.30 on the CPU fails at its first draft by itself"
)
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
NUM_DRAFTS = 3
LENGTHS = {50: 200, 20: 190, 90: 150}
"""Prompt length -> answer length of the requests that run together."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM has EAGLE heads for; a MiMo model with its weights computes the same."""
    return write_tiny_model(tmp_path_factory.mktemp("llama") / "model", architecture="llama")


def speculate(folder: Path, text: str, config: dict[str, Any], **engine: Any) -> EngineRun:
    engine["speculative_config"] = {"num_speculative_tokens": NUM_DRAFTS, **config}
    prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    settings = {**SMALL, "calibration_text": text}
    return run_engine(
        folder, prompts, list(LENGTHS.values()), settings, max_model_len=1024, **engine
    )


def assert_equals_the_dense_reference(run: EngineRun, dense: DenseReference) -> None:
    """Rounds at the policy's boundaries over committed tokens, best choices, right answers."""
    for request in run.requests:
        result = replayed(run, request, dense, SMALL)
        assert len(result.rounds) >= 2
        assert largest_error(request, result.logprobs) < FLOAT32_ERROR
    assert_pool_is_as_at_the_start(run)


def accepted_and_rejected(run: EngineRun) -> tuple[int, int]:
    accepted = rejected = 0
    for request in run.requests:
        for (start, end), drafts in zip(pairwise(request.starts), request.drafts, strict=False):
            if drafts and end > start:  # otherwise the request was preempted
                accepted += end - start - 1
                rejected += len(drafts) - (end - start - 1)
    return accepted, rejected


@pytest.mark.feature("Speculative decoding", "works")
def test_ngram_drafts_never_become_candidates(
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
) -> None:
    """Sent twice: the second time the prompts come from the prefix cache."""
    folder = model_folder("qwen3")
    run = speculate(folder, text, NGRAM, repeat=2)
    assert min(accepted_and_rejected(run)) > 50
    assert [request.starts[0] for request in run.requests] == [32, 0, 64]
    assert_equals_the_dense_reference(run, reference(folder))


@pytest.mark.feature("Speculative decoding", "works")
def test_a_draft_model_reads_its_own_compressed_cache(
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
    tmp_path: Path,
) -> None:
    """Every proposal is what the draft says that sees its protected prefix and latest tokens."""
    folder = model_folder("qwen3")
    draft = write_near_copy(tmp_path / "draft", folder)
    run = speculate(folder, text, {"method": "draft_model", "model": str(draft)})
    assert min(accepted_and_rejected(run)) > 50
    assert_equals_the_dense_reference(run, reference(folder))
    dense = DenseReference(draft)
    num_checked = 0
    for request in run.requests:
        for expected, is_clear, proposed in dense_proposals(dense, request, run.block_size):
            if is_clear:
                assert proposed == expected
                num_checked += 1
    assert num_checked > 300


def dense_proposals(
    dense: DenseReference, request: RequestRun, block_size: int
) -> Iterator[tuple[int, bool, int]]:
    """(greedy token of the dense draft, whether it leads clearly, what the engine proposed).

    A draft runs behind a step: over the tokens that the step committed and the one it sampled.
    """
    policy, num_prompt = Settings(**SMALL).policy(block_size), request.num_prompt
    tokens = torch.tensor(request.token_ids)
    run = dense.start()
    num_evicted = 0
    for (start, end), proposed in zip(pairwise(request.starts), request.drafts[1:], strict=True):
        due = policy.due_round(start, num_evicted, num_prompt)
        if due is not None:
            keep_latest(run, due)
            num_evicted = due.num_evicted_after
        run.extend(tokens[start:end])
        ahead = copy.copy(run)
        token = tokens[end : end + 1]
        for draft in proposed:
            best = ahead.extend(token)[-1].topk(2)
            yield int(best.indices[0]), bool(best.values[0] - best.values[1] > 1e-3), draft
            token = torch.tensor([draft])


def keep_latest(run: DenseRun, due: Round) -> None:
    """Hide the oldest candidates of a draft's cache."""
    cached = run.visible[0, 0].nonzero().flatten()
    evicted = cached[due.first_candidate : due.first_candidate + due.num_newly_evicted]
    run.visible[:, :, evicted] = False


def test_a_draft_with_heads_of_its_own_survives_preemption(
    model_folder: ModelFolder, text: str, tmp_path: Path
) -> None:
    folder = model_folder("qwen3")
    draft = write_other_heads(tmp_path / "draft", folder)
    run = speculate(
        folder,
        text,
        {"method": "draft_model", "model": str(draft)},
        num_gpu_blocks_override=14,
        max_num_batched_tokens=96,
    )
    assert run.num_preemptions > 0
    assert min(accepted_and_rejected(run)) > 0
    assert [len(r.token_ids) for r in run.requests] == [n + m for n, m in LENGTHS.items()]
    assert all(request.kept for request in run.requests)
    assert_pool_is_as_at_the_start(run)


@pytest.mark.feature("Speculative decoding", "works")
@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_layers_that_draft_from_the_models_states_read_their_own_compressed_cache(
    method: str, llama: Path, reference: Callable[[Path], DenseReference], text: str, tmp_path: Path
) -> None:
    if method == "mtp":
        run = speculate(write_mimo(tmp_path / "mimo", llama), text, {"method": method})
    else:
        write = write_eagle_head if method == "eagle" else write_eagle3_head
        head = write(tmp_path / method, llama)
        run = speculate(llama, text, {"method": method, "model": str(head)})
    assert min(accepted_and_rejected(run)) > 30
    assert_equals_the_dense_reference(run, reference(llama))
