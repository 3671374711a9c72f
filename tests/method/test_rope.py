"""Un-rotating queries: every layout, far positions, what is refused."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_by_hand import rotated

from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.rope import Rotary, dims_from_pairs, pairs_from_dims, phases

MakeRotary = Callable[..., Rotary]
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def test_a_quarter_turn_is_taken_back_to_the_first_dim_of_each_pair() -> None:
    for interleaved, turned in ((False, [0, 0, 1, 0]), (True, [0, 1, 0, 0])):
        rotary = Rotary(
            inv_freq=torch.tensor([[math.pi / 2, 0.25]], dtype=torch.float64),
            attention_factor=torch.ones(1, dtype=torch.float64),
            rotary_dims=(4,),
            interleaved=interleaved,
        )
        pairs, _ = rotary.un_rotate(torch.tensor([[turned]]), torch.tensor([1]), layer_idx=0)
        assert pairs[0, 0].tolist() == pytest.approx([1, 0], abs=1e-15)


def test_pairs_of_dims_follow_the_layout() -> None:
    dims = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pairs_from_dims(dims, interleaved=False).tolist() == [1 + 3j, 2 + 4j]
    assert pairs_from_dims(dims, interleaved=True).tolist() == [1 + 2j, 3 + 4j]
    for interleaved in (False, True):
        assert dims_from_pairs(pairs_from_dims(dims, interleaved), interleaved).equal(dims)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    positions=st.lists(st.integers(0, 1_000_000), min_size=1, max_size=4),
    num_frequencies=st.integers(1, 5),
    num_unrotated=st.integers(0, 3),
    interleaved=st.booleans(),
    factor=st.sampled_from([1.0, 1.3465735902799727, 0.7]),
)
def test_un_rotating_undoes_what_the_definition_does(
    make_rotary: MakeRotary,
    seed: int,
    positions: list[int],
    num_frequencies: int,
    num_unrotated: int,
    interleaved: bool,
    factor: float,
) -> None:
    rotary = make_rotary((2 * num_frequencies,) * 2, interleaved, attention_factor=factor)
    generator = torch.Generator().manual_seed(seed)
    head_dim = 2 * num_frequencies + num_unrotated
    query = torch.randn(len(positions), 2, head_dim, dtype=torch.float64, generator=generator)

    after = rotated(rotary, query, positions, layer_idx=1)
    pairs, unrotated = rotary.un_rotate(after, torch.tensor(positions), layer_idx=1)
    # Plain floats round an angle of a million to 1e-10.
    torch.testing.assert_close(
        dims_from_pairs(pairs, interleaved), query[..., : 2 * num_frequencies], rtol=0, atol=1e-9
    )
    assert unrotated.equal(query[..., 2 * num_frequencies :])


@given(position=st.integers(900_000, 1_100_000), frequency=st.floats(1e-7, 1.0))
def test_phases_at_a_million_positions_are_exact_to_1e_9(position: int, frequency: float) -> None:
    exact = Fraction(frequency) * position
    angle = float(exact - int(exact / (2 * PI)) * 2 * PI)
    turn = phases(torch.tensor([frequency], dtype=torch.float64), torch.tensor([position]))
    assert turn.real.item() == pytest.approx(math.cos(angle), abs=1e-9)
    assert turn.imag.item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_a_layer_without_rotary_embedding_keeps_all_its_dims(make_rotary: MakeRotary) -> None:
    rotary = make_rotary((8, 0))
    query = torch.randn(5, 2, 8)
    pairs, unrotated = rotary.un_rotate(query, torch.arange(5) + 1000, layer_idx=1)
    assert pairs.shape == (5, 2, 4)
    assert not pairs.any()
    assert unrotated.equal(query.double())


def test_bfloat16_queries_are_widened_before_they_are_turned(make_rotary: MakeRotary) -> None:
    rotary = make_rotary((8,))
    query = torch.randn(3, 2, 8).bfloat16()
    positions = torch.tensor([0, 17, 99_999])
    pairs, unrotated = rotary.un_rotate(query, positions, layer_idx=0)
    wide_pairs, _ = rotary.un_rotate(query.double(), positions, layer_idx=0)
    assert pairs.dtype == torch.complex128
    assert unrotated.dtype == torch.float64
    assert pairs.equal(wide_pairs)


def test_selecting_layers_takes_their_rows(make_rotary: MakeRotary) -> None:
    rotary = make_rotary((8, 0, 8))
    selected = rotary.select_layers([1, 2])
    assert selected.rotary_dims == (0, 8)
    assert selected.inv_freq.equal(rotary.inv_freq[1:])


def test_the_frequency_hash_sees_another_theta_but_not_the_last_bits(
    make_rotary: MakeRotary,
) -> None:
    rotary = make_rotary(theta=1_000_000.0)
    last_bits = make_rotary(theta=1_000_000.0)
    last_bits.inv_freq.mul_(1 + 1e-7)
    assert last_bits.inv_freq_hash() == rotary.inv_freq_hash()
    assert make_rotary(theta=10_000.0).inv_freq_hash() != rotary.inv_freq_hash()
    assert make_rotary(theta=1_050_000.0).inv_freq_hash() != rotary.inv_freq_hash()


def test_the_frequency_hash_is_the_same_on_every_pipeline_stage(make_rotary: MakeRotary) -> None:
    whole_model = make_rotary((8, 8, 0, 8))
    assert whole_model.select_layers([1]).inv_freq_hash() == whole_model.inv_freq_hash()
    assert whole_model.select_layers([2, 3]).inv_freq_hash() == whole_model.inv_freq_hash()


def rotary_of(**changes: object) -> Rotary:
    parts: dict[str, object] = {
        "inv_freq": torch.ones(2, 4, dtype=torch.float64),
        "attention_factor": torch.ones(2, dtype=torch.float64),
        "rotary_dims": (8, 8),
        "interleaved": False,
    }
    return Rotary(**(parts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inv_freq": torch.ones(2, 4)}, "must be float64"),
        ({"inv_freq": torch.ones(3, 4, dtype=torch.float64)}, "one row of frequencies per layer"),
        ({"inv_freq": torch.full((2, 4), math.nan, dtype=torch.float64)}, "NaN or infinity"),
        ({"attention_factor": torch.ones(3, dtype=torch.float64)}, "one factor per layer"),
        ({"attention_factor": torch.zeros(2, dtype=torch.float64)}, "must be positive"),
        ({"rotary_dims": (8, 6)}, r"rotate different numbers of dims: \{1: 6\}"),
        ({"rotary_dims": (8, 0)}, "layer 1 rotates no dims but has frequencies"),
    ],
)
def test_parts_that_describe_no_model_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        rotary_of(**changes)


@pytest.mark.parametrize(
    ("query", "positions", "layer_idx", "message"),
    [
        (torch.ones(3, 2, 8), torch.arange(3), 2, "layer 2 was asked for"),
        (torch.ones(3, 2, 8), torch.arange(3), -1, "layer -1 was asked for"),
        (torch.ones(3, 2, 6), torch.arange(3), 0, "D of at least 8"),
        (torch.ones(3, 16), torch.arange(3), 0, r"must be \[n, H, D\]"),
        (torch.ones(3, 2, 8), torch.arange(4), 0, "one position per query"),
    ],
)
def test_queries_of_another_shape_are_refused(
    query: torch.Tensor, positions: torch.Tensor, layer_idx: int, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        rotary_of().un_rotate(query, positions, layer_idx)
