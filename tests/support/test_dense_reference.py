"""The float64 reference equals transformers, which knows nothing of it."""

from pathlib import Path

import pytest
import torch
import transformers
from dense_reference import DenseReference, in_float64
from dense_replay import engine_steps, replay
from tiny_model import write_tiny_model
from tiny_models import write_model
from torch import Tensor

from triattention_vllm.method.policy import Policy

NUM_TOKENS = 300
FAMILIES = ["qwen3", "llama3", "gptj", "gpt_neox"]
HYBRIDS = {"gemma3": 1e-4, "gpt_oss": 1e-4, "qwen3_next": 1e-3, "smollm3": 1e-4}
"""Family -> tolerance: norms and linear attention of transformers compute in float32 here."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {family: write_model(root / family, family) for family in FAMILIES[1:]}
    folders["qwen3"] = write_tiny_model(root / "qwen3", hidden_size=128, head_dim=32)
    return folders


def random_tokens(num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(1))


def transformers_logprobs(folder: Path, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """float64 [n, vocab]; mask: bool [n, n], which key each query sees."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation=("eager" if "gptj" in folder.name else "sdpa"),
    )
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(
            ~mask, torch.finfo(torch.float64).min
        )[None, None]
    with torch.no_grad():
        logits = in_float64(model)(tokens[None], attention_mask=mask).logits[0]
    return logits.double().log_softmax(-1)


def tolerance(family: str) -> float:
    """GPT-J's attention of transformers computes its logits in float32 whatever the weights."""
    return 1e-4 if family == "gptj" else 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_evicted_it_equals_transformers(family: str, folders: dict[str, Path]) -> None:
    tokens = random_tokens()
    expected = transformers_logprobs(folders[family], tokens)
    actual = DenseReference(folders[family]).logprobs(tokens)
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_tokens_equal_an_explicit_mask_of_transformers(
    family: str, folders: dict[str, Path]
) -> None:
    tokens = random_tokens()
    dropped = torch.arange(20, 150, 2)
    run = DenseReference(folders[family]).start()
    first = run.extend(tokens[:200])
    run.visible[:, :, dropped] = False
    actual = torch.cat([first, run.extend(tokens[200:])])
    mask = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    mask[200:, dropped] = False
    expected = transformers_logprobs(folders[family], tokens, mask)
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance(family))
    undropped = DenseReference(folders[family]).logprobs(tokens)
    assert (actual[200:] - undropped[200:]).abs().max() > 0.1, "eviction must be visible"


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_of_several_kinds_equal_transformers_and_chunks_the_whole(
    family: str, tmp_path: Path
) -> None:
    folder, tokens = write_model(tmp_path / family, family), random_tokens()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        expected = model.eval()(tokens[None]).logits[0].double().log_softmax(-1)
    reference = DenseReference(folder)
    actual = reference.logprobs(tokens)
    assert torch.allclose(actual, expected, rtol=0, atol=HYBRIDS[family])
    run = reference.start()
    chunks = torch.cat([run.extend(chunk) for chunk in tokens.split(37)])
    assert torch.allclose(chunks, actual, rtol=0, atol=1e-9)


def test_chunks_equal_the_whole_sequence(folders: dict[str, Path]) -> None:
    tokens = random_tokens()
    reference = DenseReference(folders["qwen3"])
    run = reference.start()
    chunks = torch.cat([run.extend(chunk) for chunk in tokens.split(37)])
    assert torch.allclose(chunks, reference.logprobs(tokens), rtol=0, atol=1e-11)


class FlatStatistics:
    """Statistics of random queries, for a model of the given sizes."""

    def __init__(self, num_layers: int, num_heads: int, num_freqs: int, head_dim: int) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (num_layers, num_heads, num_freqs)
        self.centre_real = torch.randn(shape, generator=generator)
        self.centre_imag = torch.randn(shape, generator=generator)
        self.magnitude = torch.hypot(self.centre_real, self.centre_imag) * 1.5
        self.unrotated_mean = torch.zeros(num_layers, num_heads, head_dim)


POLICY = Policy(budget=96, interval=32, window=16, sink_tokens=4, protect="sinks", block_size=16)


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head", "union"])
@pytest.mark.parametrize("max_chunk", [None, 40])
def test_a_replay_equals_a_mask_built_from_its_rounds(
    selection: str, max_chunk: int | None, folders: dict[str, Path]
) -> None:
    reference = DenseReference(folders["qwen3"])
    statistics = FlatStatistics(4, 4, 16, 32)
    tokens = random_tokens()
    steps = engine_steps(NUM_TOKENS, 150, max_chunk)
    result = replay(
        reference,
        tokens.tolist(),
        num_prompt=150,
        policy=POLICY,
        statistics=statistics,
        selection=selection,
        steps=steps,
    )
    assert len(result.rounds) >= 4
    seen = torch.ones(4, 2, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    num_evicted = 0
    rounds = iter(result.rounds)
    for step in steps:
        if POLICY.due_round(step.committed, num_evicted, 150) is None:
            continue
        done = next(rounds)
        num_evicted = done.round.num_evicted_after
        visible = torch.zeros(4, 2, NUM_TOKENS, dtype=torch.bool).scatter_(2, done.kept, True)
        visible[:, :, step.start :] = True
        seen[:, :, step.start :] = visible.unsqueeze(2)
        assert done.kept.shape[2] == step.start - num_evicted
        assert (done.kept[:, :, :4] == torch.arange(4)).all(), "sinks stay"
        distinct = {tuple(row) for row in done.kept.flatten(0, 1).tolist()}
        assert len(distinct) == {"union": 1, "per_head": 2, "per_layer_per_head": 8}[selection]
    expected = reference.logprobs(tokens, seen)
    assert torch.allclose(result.logprobs, expected, rtol=0, atol=1e-11)


def replayed(folder: Path, kept_log: list[Tensor] | None) -> list[Tensor]:
    """Region indices of each round's survivors, the form that engines log."""
    result = replay(
        DenseReference(folder),
        random_tokens(200).tolist(),
        num_prompt=50,
        policy=POLICY,
        statistics=FlatStatistics(4, 4, 16, 32),
        selection="per_layer_per_head",
        kept_log=kept_log,
    )
    cached = torch.arange(200).expand(4, 2, -1)
    log = []
    for done in result.rounds:
        end = done.round.num_evicted_before + done.round.end_candidate
        region = cached[:, :, : done.round.end_candidate]
        newer = torch.arange(end, 200).expand(4, 2, -1)
        kept = torch.cat([done.kept[:, :, :4], done.survivors], 2)
        log.append(torch.searchsorted(region.contiguous(), kept))
        cached = torch.cat([kept, newer], 2)
    return log


def test_a_replay_accepts_the_choice_it_would_make_itself(folders: dict[str, Path]) -> None:
    log = replayed(folders["qwen3"], None)
    again = replayed(folders["qwen3"], log)
    assert len(log) >= 2
    assert all(torch.equal(first, second) for first, second in zip(log, again, strict=True))


def test_a_replay_refuses_a_choice_that_is_not_the_best(folders: dict[str, Path]) -> None:
    log = replayed(folders["qwen3"], None)
    absent = next(idx for idx in range(4, 96) if idx not in log[1][2, 1].tolist())
    worse = log[1].clone()
    worse[2, 1, 4] = absent
    worse[2, 1] = worse[2, 1].sort().values
    with pytest.raises(AssertionError, match="an evicted token scores"):
        replayed(folders["qwen3"], [log[0], worse, *log[2:]])


def test_a_replay_refuses_a_choice_that_evicts_a_protected_token(
    folders: dict[str, Path],
) -> None:
    log = replayed(folders["qwen3"], None)
    with pytest.raises(AssertionError, match="protected"):
        replayed(folders["qwen3"], [log[0] + 1, *log[1:]])


def test_a_replay_refuses_a_missing_round(folders: dict[str, Path]) -> None:
    log = replayed(folders["qwen3"], None)
    with pytest.raises(AssertionError, match="did not run"):
        replayed(folders["qwen3"], log[:-1])
