"""The folded score against its definition, by hand, and against published golden values."""

import cmath
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triattention_kernels import PagedKV, RoundBatch, score_torch

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.score_triattention import (
    OFFSETS,
    TriAttentionScorer,
    mean_turn,
    offsets_of,
)
from triattention_vllm.method.statistics import Fingerprint, Statistics

MakeFingerprint = Callable[..., Fingerprint]
MakeStatistics = Callable[..., Statistics]
MakeRotary = Callable[..., Rotary]


def folded_scores(
    scorer: TriAttentionScorer, boundary: int, keys: Tensor, num_blocks: int = 1
) -> Tensor:
    """Scores [L, H, T] by the kernel of the product, for keys [L, H_kv, T, D] that lie in
    ``num_blocks`` blocks of a shuffled cache."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    in_order = torch.unflatten(keys, 2, (num_blocks, -1)).transpose(
        1, 2
    )  # [L, blocks, H_kv, slots, D]
    blocks = torch.empty_like(in_order)
    blocks[:, order] = in_order
    kv = PagedKV.from_blocks(torch.cat((blocks, torch.full_like(blocks, torch.nan)), dim=-1))
    batch = RoundBatch(order[None], order[None], (num_blocks,), (num_blocks,), (0,))
    return scorer.scores(kv, batch, [boundary])[0]


def query_weights(scorer: TriAttentionScorer, boundaries: list[int]) -> Tensor:
    """What the torch triad multiplies keys with, [R, L, H, D]."""
    rope = (scorer.interleaved, scorer.rotary_dim)
    return score_torch.query_weights(scorer.centres, scorer.turns(boundaries), *rope)


def score_by_definition(
    statistics: Statistics, rotary: Rotary, boundary: int, row: int, head_idx: int, key: list[float]
) -> float:
    """The score of one cached key with plain complex numbers and all 17 offsets."""
    rotary_dim = rotary.rotary_dims[row]
    factor = rotary.attention_factor[row].item()
    score = 0.0
    for f in range(rotary_dim // 2):
        i, j = (2 * f, 2 * f + 1) if rotary.interleaved else (f, f + rotary_dim // 2)
        cached = complex(key[i], key[j])
        centre = statistics.centre()[row, head_idx, f].item()
        magnitude = statistics.magnitude[row, head_idx, f].item()
        frequency = rotary.inv_freq[row, f].item()
        for offset in OFFSETS:
            turn = cmath.exp(1j * frequency * (boundary + offset))
            score += factor * (centre * cached.conjugate() * turn).real / len(OFFSETS)
        score += factor * (magnitude - abs(centre)) * abs(cached)
    for d in range(rotary_dim, len(key)):
        score += statistics.unrotated_mean[row, head_idx, d].item() * key[d]
    return score


def test_the_offsets_are_the_seventeen_powers_of_two_up_to_65536() -> None:
    assert OFFSETS == (
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536,
    )  # fmt: skip


def test_a_score_checked_by_hand(make_fingerprint: MakeFingerprint) -> None:
    """One head of four dims, of which RoPE rotates two, with w = pi / 2 and m = 1.

    Offset 1 turns by i, offset 2 by -1, the other fifteen by 1: their mean is (14 + i) / 17.
    T = 3 turns by -i, so c = (1 - 14 i) / 17. With qbar = 17 (so w_f = 1 - 14 i), a = 20 and
    the unrotated mean (2, -1), the key (3, 4, 5, 6) scores
    3 * 1 + 4 * (-14) + (20 - 17) * |3 + 4 i| + 2 * 5 - 1 * 6 = -34.
    """
    statistics = Statistics(
        fingerprint=make_fingerprint((0,), 1, 1, head_dim=4, rotary_dims=(2,)),
        centre_real=torch.tensor([[[17.0]]]),
        centre_imag=torch.tensor([[[0.0]]]),
        magnitude=torch.tensor([[[20.0]]]),
        unrotated_mean=torch.tensor([[[0.0, 0.0, 2.0, -1.0]]]),
        provenance={},
    )
    rotary = Rotary(
        inv_freq=torch.tensor([[math.pi / 2]], dtype=torch.float64),
        attention_factor=torch.ones(1, dtype=torch.float64),
        rotary_dims=(2,),
        interleaved=False,
    )
    scorer = TriAttentionScorer(statistics, rotary)
    key = torch.tensor([[[[3.0, 4.0, 5.0, 6.0]]]])
    assert query_weights(scorer, [3])[0, 0, 0].tolist() == pytest.approx([1, -14, 2, -1], abs=1e-6)
    assert scorer.norm_weights.tolist() == [[[3.0]]]
    assert folded_scores(scorer, 3, key).item() == pytest.approx(-34, abs=1e-4)


def test_the_fold_is_the_mean_over_all_offsets() -> None:
    inv_freq = torch.tensor([[1.0, 0.01], [0.3, 0.0]], dtype=torch.float64)
    turns = mean_turn(inv_freq, OFFSETS)
    for row in range(2):
        for f in range(2):
            angles = [inv_freq[row, f].item() * offset for offset in OFFSETS]
            mean = sum(cmath.exp(1j * angle) for angle in angles) / 17
            assert turns[row, f].item() == pytest.approx(mean, abs=1e-12)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    boundary=st.integers(1, 1_000_000),
    rotary_dims=st.sampled_from([(8, 8), (4, 4), (6, 0), (2, 2)]),
    interleaved=st.booleans(),
    factor=st.sampled_from([1.0, 1.3465735902799727]),
)
def test_folded_scores_equal_the_sum_over_all_offsets_in_float64(
    make_fingerprint: MakeFingerprint,
    make_statistics: MakeStatistics,
    make_rotary: MakeRotary,
    seed: int,
    boundary: int,
    rotary_dims: tuple[int, ...],
    interleaved: bool,
    factor: float,
) -> None:
    model = make_fingerprint((0, 1), 4, 2, 8, rotary_dims, interleaved)
    statistics = make_statistics(model, seed)
    rotary = make_rotary(rotary_dims, interleaved, attention_factor=factor)
    keys = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).double()
    scorer = TriAttentionScorer(statistics, rotary, dtype=torch.float64)
    scores = folded_scores(scorer, boundary, keys)
    for row in range(2):
        for head_idx in range(4):
            expected = [
                score_by_definition(statistics, rotary, boundary, row, head_idx, key.tolist())
                for key in keys[row, head_idx // 2]
            ]
            assert scores[row, head_idx].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-8)


def test_requests_of_one_batch_do_not_touch_each_other(
    make_statistics: MakeStatistics, make_rotary: MakeRotary
) -> None:
    scorer = TriAttentionScorer(make_statistics(), make_rotary())
    batch = query_weights(scorer, [2176, 999_999, 5000])
    assert batch.shape == (3, 3, 4, 8)
    assert batch.dtype == torch.float32
    for request_idx, boundary in enumerate([2176, 999_999, 5000]):
        assert batch[request_idx].equal(query_weights(scorer, [boundary])[0])


def test_weights_at_a_million_tokens_are_right_in_float32(
    make_statistics: MakeStatistics, make_rotary: MakeRotary
) -> None:
    parts = (make_statistics(), make_rotary())
    narrow = query_weights(TriAttentionScorer(*parts), [1_000_003]).double()
    wide = query_weights(TriAttentionScorer(*parts, dtype=torch.float64), [1_000_003])
    torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-7)


class Copies(TorchDispatchMode):
    """Notes of every copy to another device whether the host goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.without_waiting: list[bool] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device", "cpu") != "cpu":
            self.without_waiting.append(bool(kwargs.get("non_blocking")))
        return function(*args, **kwargs)


def test_turns_reach_the_device_without_the_host_waiting(
    make_statistics: MakeStatistics, make_rotary: MakeRotary
) -> None:
    """On tensors without memory, of which nothing can be read either."""
    scorer = TriAttentionScorer(make_statistics(), make_rotary(), device="meta")
    copies = Copies()
    with copies:
        assert scorer.turns([2176, 5000]).is_meta
    assert copies.without_waiting == [True]


def test_a_rank_scores_with_the_statistics_of_its_own_heads_and_layers(
    make_statistics: MakeStatistics, make_rotary: MakeRotary
) -> None:
    whole = TriAttentionScorer(make_statistics(), make_rotary())
    shard = make_statistics().shard([1, 2], head_start=2, num_heads=2)
    rank = TriAttentionScorer(shard, make_rotary().select_layers([1, 2]))
    assert query_weights(rank, [4096]).equal(query_weights(whole, [4096])[:, 1:, 2:])
    assert rank.norm_weights.equal(whole.norm_weights[1:, 2:])


def test_a_rank_whose_layers_have_no_rotary_embedding_scores_with_plain_means(
    make_fingerprint: MakeFingerprint, make_statistics: MakeStatistics, make_rotary: MakeRotary
) -> None:
    statistics = make_statistics(make_fingerprint((3, 7), rotary_dims=(8, 0)))
    shard = statistics.shard([7], head_start=0, num_heads=4)
    scorer = TriAttentionScorer(shard, make_rotary((8, 0)).select_layers([1]))
    keys = torch.randn(1, 2, 5, 8)
    expected = torch.einsum("lhd,lhtd->lht", shard.unrotated_mean, keys.repeat_interleave(2, 1))
    assert scorer.rotary_dim == 0
    torch.testing.assert_close(folded_scores(scorer, 2176, keys), expected)


@pytest.mark.parametrize(
    ("rotary_dims", "interleaved"), [((8, 8), False), ((8, 8, 8), True), ((8, 0, 8), False)]
)
def test_rotary_parameters_of_other_layers_are_refused(
    make_statistics: MakeStatistics,
    make_rotary: MakeRotary,
    rotary_dims: tuple[int, ...],
    interleaved: bool,
) -> None:
    with pytest.raises(StatisticsError, match="rotary parameters of the same layers"):
        TriAttentionScorer(make_statistics(), make_rotary(rotary_dims, interleaved))


@pytest.mark.parametrize(
    ("dtype", "column", "frequencies_in_float64", "tolerance"),
    [
        (torch.float32, "scores_per_query_head", False, 1e-4),
        (torch.float32, "scores_fp64", True, 2e-6),
        (torch.float64, "scores_fp64", True, 1e-6),
    ],
)
def test_scores_equal_the_golden_ones_of_qwen3_8b(
    shared_data: Path,
    dtype: torch.dtype,
    column: str,
    frequencies_in_float64: bool,
    tolerance: float,
) -> None:
    """In float64 the float64 column is met score by score: it was computed with frequencies
    ``theta^(-f/F)`` in float64 throughout. In float32 it is met relative to the layer and head's
    largest score: the sum rounds relative to its terms, also where these cancel.

    The float32 column was computed with float32 angles up to T + 65536, which alone moves scores
    by 1e-4 of the layer and head's largest: it is met relative to that one.
    """
    golden = load_file(shared_data / "golden" / "score_qwen3_8b.safetensors")
    inv_freq = golden["inv_freq"].double()
    if frequencies_in_float64:
        exact = 1_000_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
        torch.testing.assert_close(inv_freq, exact, rtol=2**-23, atol=0)
        inv_freq = exact
    statistics = Statistics(
        fingerprint=Fingerprint(
            "Qwen3ForCausalLM", (5, 20), 8, 2, 128, (128, 128), False, None, None
        ),
        centre_real=golden["q_mean_real"],
        centre_imag=golden["q_mean_imag"],
        magnitude=golden["q_abs_mean"],
        unrotated_mean=torch.zeros(2, 8, 128),
        provenance={},
    )
    rotary = Rotary(
        inv_freq=inv_freq.repeat(2, 1),
        attention_factor=torch.ones(2, dtype=torch.float64),
        rotary_dims=(128, 128),
        interleaved=False,
    )
    scorer = TriAttentionScorer(statistics, rotary, dtype=dtype)
    scores = folded_scores(scorer, 5000, golden["keys_rotated"], num_blocks=6)
    expected = golden[column].double()
    magnitude = expected.abs()
    if dtype == torch.float32:
        magnitude = magnitude.amax(-1, keepdim=True)
    assert ((scores.double() - expected).abs() / magnitude).max().item() < tolerance


def test_a_score_without_its_norm_term_or_with_other_offsets_is_the_same_sum_with_fewer_parts(
    make_statistics: Callable[..., Statistics], make_rotary: Callable[..., Rotary]
) -> None:
    parts = (make_statistics(), make_rotary())
    whole = TriAttentionScorer(*parts, dtype=torch.float64)
    bare = TriAttentionScorer(*parts, dtype=torch.float64, norm_term=False)
    assert whole.norm_weights.any()
    assert not bare.norm_weights.any()
    assert bare.centres.equal(whole.centres)
    both = TriAttentionScorer(*parts, dtype=torch.float64, offsets=[3, 50]).turns([77])
    near, far = (
        TriAttentionScorer(*parts, dtype=torch.float64, offsets=[offset]).turns([77])
        for offset in (3, 50)
    )
    torch.testing.assert_close(both, (near + far) / 2)
    assert not torch.allclose(both, whole.turns([77]))


def test_offsets_go_by_name_or_by_number() -> None:
    assert offsets_of("geometric", 4096) == OFFSETS
    assert offsets_of("short", 100) == (1, 2, 4, 8, 16, 32, 64)
    assert offsets_of("7,300", 100) == (7, 300)
