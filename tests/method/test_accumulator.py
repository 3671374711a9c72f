"""Means of queries: by hand, in pieces, and what is not accepted."""

from collections.abc import Callable

import pytest
import torch
from rope_by_hand import rotated

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics, StatisticsAccumulator

MakeFingerprint = Callable[..., Fingerprint]
MakeRotary = Callable[..., Rotary]
NAMES = ("centre_real", "centre_imag", "magnitude", "unrotated_mean")


def test_means_worked_out_by_hand(make_fingerprint: MakeFingerprint) -> None:
    """Two queries 3 + 4i and 3 - 4i: centre 3, magnitude 5; the unrotated dim is 1, then 2."""
    accumulator = StatisticsAccumulator(num_heads=1, head_dim=3, rotary_dims=(2,))
    accumulator.add(0, torch.tensor([[[3 + 4j]], [[3 - 4j]]]), torch.tensor([[[1.0]], [[2.0]]]))
    statistics = accumulator.finish(
        make_fingerprint((5,), 1, 1, head_dim=3, rotary_dims=(2,)), text="mine", versions="v"
    )
    assert statistics.centre().tolist() == [[[3 + 0j]]]
    assert statistics.magnitude.tolist() == [[[5.0]]]
    assert statistics.unrotated_mean.tolist() == [[[0.0, 0.0, 1.5]]]
    provenance = dict(statistics.provenance)
    assert provenance.pop("created").startswith("20")
    assert provenance == {
        "tokens_seen": "2",
        "text": "mine",
        "versions": "v",
        "schema_version": "2",
    }


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_after_rope_give_the_means_from_before_rope(
    make_fingerprint: MakeFingerprint, make_rotary: MakeRotary, interleaved: bool
) -> None:
    rotary = make_rotary((6, 0), interleaved, attention_factor=1.25)
    queries = torch.randn(2, 50, 4, 8, dtype=torch.float64) + 1
    positions = torch.arange(50) * 1000
    accumulator = StatisticsAccumulator(4, 8, (6, 0))
    for layer_idx in range(2):
        after = rotated(rotary, queries[layer_idx], positions.tolist(), layer_idx)
        accumulator.add(layer_idx, *rotary.un_rotate(after, positions, layer_idx))
    model = make_fingerprint((0, 4), 4, 2, 8, (6, 0), interleaved)
    statistics = accumulator.finish(model, text="random", versions="")

    pairs = queries[0, :, :, :6]
    first, second = (
        (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :3], pairs[..., 3:])
    )
    expected = {
        "centre_real": first.mean(0),
        "centre_imag": second.mean(0),
        "magnitude": (first**2 + second**2).sqrt().mean(0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(statistics, name)[0].double(), values, rtol=1e-6, atol=0)
        assert not getattr(statistics, name)[1].any()
    means = queries.mean(1)
    means[0, :, :6] = 0
    torch.testing.assert_close(statistics.unrotated_mean.double(), means, rtol=1e-6, atol=0)


def random_batches(num_batches: int, seed: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            layer_idx,
            torch.randn(1 + batch, 4, 2, dtype=torch.complex128, generator=generator),
            torch.randn(1 + batch, 4, 4, dtype=torch.float64, generator=generator),
        )
        for batch in range(num_batches)
        for layer_idx in range(2)
    ]


def finished(accumulator: StatisticsAccumulator, make_fingerprint: MakeFingerprint) -> Statistics:
    return accumulator.finish(make_fingerprint((0, 1), rotary_dims=(4, 4)), "", "")


def test_queries_in_pieces_equal_one_pass(make_fingerprint: MakeFingerprint) -> None:
    batches = random_batches(6, seed=0)
    one_pass, in_pieces = StatisticsAccumulator(4, 8, (4, 4)), StatisticsAccumulator(4, 8, (4, 4))
    for batch in batches:
        in_pieces.add(*batch)
    for layer_idx in range(2):
        own = [batch[1:] for batch in batches if batch[0] == layer_idx]
        one_pass.add(layer_idx, *(torch.cat(part) for part in zip(*own, strict=True)))
    pieces, whole = finished(in_pieces, make_fingerprint), finished(one_pass, make_fingerprint)
    assert pieces.provenance["tokens_seen"] == whole.provenance["tokens_seen"] == "21"
    for name in NAMES:
        torch.testing.assert_close(
            getattr(pieces, name), getattr(whole, name), rtol=1e-6, atol=1e-7
        )


def test_a_hundred_thousand_small_terms_beside_a_large_one_are_not_lost(
    make_fingerprint: MakeFingerprint,
) -> None:
    """float32 sums would lose them: 1e8 + 1 = 1e8 there."""
    accumulator = StatisticsAccumulator(1, 2, (2,))
    empty = torch.zeros(1, 1, 0)
    accumulator.add(0, torch.full((1, 1, 1), 1e8 + 0j), empty)
    for _ in range(100):
        accumulator.add(0, torch.ones(1000, 1, 1, dtype=torch.complex64), empty.expand(1000, 1, 0))
    statistics = accumulator.finish(make_fingerprint((0,), 1, 1, 2), "", "")
    assert statistics.magnitude.item() == pytest.approx((1e8 + 1e5) / 100_001, rel=1e-6)


def test_a_layer_that_saw_no_token_is_an_error(make_fingerprint: MakeFingerprint) -> None:
    accumulator = StatisticsAccumulator(4, 8, (4, 4))
    with pytest.raises(StatisticsError, match=r"no queries were recorded in layers \[0, 1\] of 2"):
        finished(accumulator, make_fingerprint)
    accumulator.add(0, torch.ones(3, 4, 2) + 0j, torch.ones(3, 4, 4))
    accumulator.add(1, torch.ones(0, 4, 2) + 0j, torch.ones(0, 4, 4))
    with pytest.raises(StatisticsError, match=r"no queries were recorded in layers \[1\] of 2"):
        finished(accumulator, make_fingerprint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_pairs", [True, False])
def test_queries_that_are_not_finite_are_refused_and_leave_no_trace(
    make_fingerprint: MakeFingerprint, value: float, in_pairs: bool
) -> None:
    accumulator = StatisticsAccumulator(4, 8, (4, 4))
    for layer_idx in range(2):
        accumulator.add(layer_idx, torch.ones(3, 4, 2) + 0j, torch.ones(3, 4, 4))
    before = finished(accumulator, make_fingerprint)
    pairs, unrotated = torch.ones(3, 4, 2) + 0j, torch.ones(3, 4, 4)
    (pairs if in_pairs else unrotated)[1, 2, 1] = value
    with pytest.raises(StatisticsError, match="layer 1 contain NaN or infinity"):
        accumulator.add(1, pairs, unrotated)
    after = finished(accumulator, make_fingerprint)
    assert after.provenance["tokens_seen"] == "3"
    for name in NAMES:
        assert getattr(after, name).equal(getattr(before, name))


@pytest.mark.parametrize(
    ("layer_idx", "pairs", "unrotated", "message"),
    [
        (2, (3, 4, 2), (3, 4, 4), "layers 0 to 1 exist"),
        (-1, (3, 4, 2), (3, 4, 4), "layers 0 to 1 exist"),
        (0, (3, 4, 3), (3, 4, 4), "they must be"),
        (0, (3, 2, 2), (3, 2, 4), "they must be"),
        (0, (3, 4, 2), (2, 4, 4), "they must be"),
        (0, (3, 4, 2), (3, 4, 8), "they must be"),
    ],
)
def test_queries_of_another_shape_are_refused(
    layer_idx: int, pairs: tuple[int, ...], unrotated: tuple[int, ...], message: str
) -> None:
    accumulator = StatisticsAccumulator(4, 8, (4, 4))
    with pytest.raises(StatisticsError, match=message):
        accumulator.add(layer_idx, torch.ones(pairs) + 0j, torch.ones(unrotated))
