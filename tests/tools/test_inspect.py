"""``triattention inspect``: concentration, kinds of heads, and two files against each other."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics
from triattention_vllm.tools.head_kinds import kind, preference, reach, read_frequencies
from triattention_vllm.tools.inspect_file import compare
from triattention_vllm.tools.main import main

THETA = 1e6
F = 8
FREQUENCIES = THETA ** (-torch.arange(F, dtype=torch.float64) / F)
Make = Callable[..., Statistics]


def statistics(weights: torch.Tensor, inv_freq_hash: str | None = None) -> Statistics:
    """Two layers of three heads with centres of these lengths [2, 3, F] and R of 1/2."""
    return Statistics(
        fingerprint=Fingerprint(
            "TinyForCausalLM", (1, 5), 3, 1, 2 * F, (2 * F, 2 * F), False, inv_freq_hash, "w"
        ),
        centre_real=weights.float(),
        centre_imag=torch.zeros(2, 3, F),
        magnitude=2 * weights.float(),
        unrotated_mean=torch.zeros(2, 3, 2 * F),
        provenance={"tokens_seen": "10", "text": "a text", "schema_version": "1"},
    )


@pytest.fixture
def three_kinds(tmp_path: Path) -> Path:
    """A file whose heads 0, 1 and 2 hold only the fastest, a middle and the slowest frequency."""
    weights = torch.full((2, 3, F), 1e-6)
    for head_idx, frequency in enumerate((0, 4, F - 1)):
        weights[:, head_idx, frequency] = 1.0
    file = tmp_path / "three.safetensors"
    statistics(weights).save(file)
    return file


def test_the_curve_is_the_sum_of_cosines() -> None:
    weights = torch.rand(2, 3, F, generator=torch.Generator().manual_seed(0))
    found = preference(statistics(weights), FREQUENCIES, torch.tensor([0, 3, 700]))
    for layer in range(2):
        for head in range(3):
            own = weights[layer, head].double().tolist()
            for place, distance in enumerate((0, 3, 700)):
                turned = sum(
                    w * math.cos(f * distance)
                    for w, f in zip(own, FREQUENCIES.tolist(), strict=True)
                )
                assert float(found[layer, head, place]) == pytest.approx(turned / sum(own))


def test_reach_is_the_largest_offset_up_to_which_half_is_left() -> None:
    """One frequency w keeps half up to w d = pi / 3, and comes back at 2 pi / w."""
    slow = torch.full((F,), math.pi / 3 / 1025, dtype=torch.float64)
    weights = torch.ones(2, 3, F)
    for frequencies, tokens in ((slow, 1024), (slow / 64, 65536), (slow * 1025, 1)):
        assert set(reach(statistics(weights), frequencies).flatten().tolist()) == {tokens}


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(0, "local"), (128, "local"), (256, "range"), (8192, "range"), (16384, "sinks")],
)
def test_kinds_by_reach(tokens: int, name: str) -> None:
    assert kind(tokens, 2 * F) == name
    assert kind(tokens, 0) == "no RoPE"


def test_frequencies_other_than_those_of_the_file_are_refused() -> None:
    right = Rotary(FREQUENCIES.repeat(2, 1), torch.ones(2).double(), (16, 16), False)
    made = statistics(torch.ones(2, 3, F), right.inv_freq_hash())
    assert torch.equal(read_frequencies(made, None, THETA), FREQUENCIES)
    with pytest.raises(StatisticsError, match="--rope-theta 500000 gives other frequencies"):
        read_frequencies(made, None, 500000.0)


def test_the_model_gives_the_frequencies(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "head_dim": 16, "rope_theta": THETA}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = statistics(torch.ones(2, 3, F))
    assert torch.equal(read_frequencies(made, str(tmp_path), None), FREQUENCIES)
    wrong = {**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    half = read_frequencies(made, str(tmp_path), None)
    assert torch.allclose(half, FREQUENCIES / 2)


def test_the_summary_as_json(three_kinds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(three_kinds), "--rope-theta", str(THETA), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["provenance"]["text"] == "a text"
    assert [row["layer"] for row in found["concentration"]] == [1, 5]
    assert {row["mean"] for row in found["concentration"]} == {0.5}
    assert found["kinds"] == {"local": 2, "range": 2, "sinks": 2}
    assert {one["kind"] for one in found["heads"]} == {"local", "range", "sinks"}


def test_tables_and_picture(
    three_kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "heads.png"
    arguments = ["inspect", str(three_kinds), "--rope-theta", str(THETA), "--heads", "1.0", "5.2"]
    assert main([*arguments, "--plot", str(png), "--compare", str(three_kinds)]) == 0
    shown = capsys.readouterr().out
    assert "Heads by reach: 2 local, 2 range, 2 sinks." in shown
    assert "cosine of the centres 1.0000 on average" in shown
    assert png.read_bytes().startswith(b"\x89PNG")


def test_without_frequencies_the_file_is_still_shown(
    three_kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(three_kinds), "--plot", str(tmp_path / "r.png")]) == 0
    assert "add --model or --rope-theta" in capsys.readouterr().out
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_comparison_by_hand() -> None:
    """One head turned by a right angle, all magnitudes doubled."""
    weights = torch.ones(2, 3, F)
    mine = statistics(weights)
    turned = mine.centre_real.clone()
    turned[1, 2] = 0
    imaginary = torch.zeros(2, 3, F)
    imaginary[1, 2] = 1
    other = replace(mine, centre_real=turned, centre_imag=imaginary, magnitude=2 * mine.magnitude)
    found = compare(mine, other)
    assert found["cosine_lowest"] == 0
    assert found["lowest_head"] == "5.2"
    assert found["cosine_mean"] == round(5 / 6, 5)
    assert found["magnitude_change"] == 1.0
    assert found["same_weights"] is True


def test_files_of_different_models_are_not_compared(make_files: tuple[Path, Path]) -> None:
    first, second = make_files
    with pytest.raises(StatisticsError, match="2 layers of 3 query heads .*, and 1 of 3"):
        compare(Statistics.load(first), Statistics.load(second))


@pytest.fixture
def make_files(tmp_path: Path) -> tuple[Path, Path]:
    whole = statistics(torch.ones(2, 3, F))
    whole.save(tmp_path / "whole.safetensors")
    whole.shard((1,), 0, 3).save(tmp_path / "part.safetensors")
    return tmp_path / "whole.safetensors", tmp_path / "part.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.safetensors"], "there is no such file"),
        ([__file__], "is not a whole safetensors file"),
        (["{file}", "--heads", "1.7"], "the file has no head 1.7"),
        (["{file}", "--rope-theta", "0.5"], "--rope-theta is 0.5; it must be above 1"),
        (["{file}", "--plot", "/no/such/folder/x.png"], "cannot be written"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    arguments: list[str], message: str, three_kinds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(file=three_kinds) for argument in arguments]
    assert main(["inspect", *given]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "delete" not in shown
