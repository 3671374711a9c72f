"""The Triton scores against the torch ones, by their errors against float64."""

import pytest
import torch
from far_blocks import SHAPE
from kernel_inputs import LAYOUTS
from score_oracle import random_weights
from torch import Tensor
from triattention_kernels import ArgumentError, PagedKV, RoundBatch, score
from triton_runs import run_triton


def triton_score(*arguments) -> Tensor:
    found, _ = run_triton("triattention_kernels:score", *arguments, implementation="triton")
    return found


def assert_no_worse_than_torch(kv: PagedKV, batch: RoundBatch, *arguments) -> Tensor:
    """Root mean square of the errors; sums in another order err differently, by a quarter at
    most once some hundred are taken together.
    """
    centres, norms, turns, *rope = arguments
    wide = (centres.double(), norms.double(), turns.to(torch.complex128))
    found = triton_score(kv, batch, *arguments)
    truth = score(kv, batch, *wide, *rope)
    plain = score(kv, batch, *arguments)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    assert torch.equal(found.isneginf(), truth.isneginf())
    inside = ~truth.isneginf()
    errors = [(scores.double() - truth)[inside].square().mean().sqrt() for scores in (found, plain)]
    rounding = truth[inside].square().mean().sqrt() * torch.finfo(torch.float32).eps
    assert errors[0] <= 1.25 * max(errors[1], rounding), errors
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12, 0])
def test_every_layout_and_pairing_is_no_worse_than_torch(
    layout, interleaved, rotary_dim, make_cache, make_batch
):
    cache = make_cache(layout, (2, 5, 2, 16, 32))
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    weights = random_weights((2, 2, 6, 32), rotary_dim)
    assert_no_worse_than_torch(cache.kv, batch, *weights, interleaved, rotary_dim)


@pytest.mark.parametrize(
    ("group", "head_dim", "rotary_dim"),
    [
        *((1, 64, 64), (2, 80, 80), (3, 96, 24), (4, 128, 128), (5, 80, 32), (8, 64, 64)),
        *((16, 256, 64), (24, 256, 96)),
    ],
)
def test_every_group_and_head_dim_is_no_worse_than_torch(
    group, head_dim, rotary_dim, make_cache, make_batch
):
    cache = make_cache("token_major", (1, 8, 2, 16, head_dim), torch.bfloat16)
    batch = make_batch([[3, 1, 7, 2, 5]], [[2]], [0])
    weights = random_weights((1, 1, 2 * group, head_dim), rotary_dim)
    assert_no_worse_than_torch(cache.kv, batch, *weights, False, rotary_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4])
def test_every_dtype_is_cast_before_the_arithmetic(dtype, group, make_cache, make_batch):
    cache = make_cache("head_major", (2, 4, 2, 16, 64), dtype)
    batch = make_batch([[3, 1]], [[2]], [0])
    assert_no_worse_than_torch(
        cache.kv, batch, *random_weights((1, 2, 2 * group, 64), 64), False, 64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_packed_for_rocm_are_no_worse_than_torch(dtype, interleaved, make_batch):
    generator = torch.Generator().manual_seed(8)
    storage = torch.randn(2, 8, 2, 16, 64, generator=generator).to(dtype)
    batch = make_batch([[3, 1], [4]], [[2], [1]], [5, 0])
    kv = PagedKV.from_rocm_layout(storage, 2)
    assert_no_worse_than_torch(kv, batch, *random_weights((2, 2, 8, 32), 32), interleaved, 32)


def test_keys_at_positions_of_a_million_are_scored_exactly_enough(make_batch):
    """Against the definition: the mean over 17 offsets in complex128, from the cached keys."""
    position, num_frequencies, num_tokens = 1_000_003, 64, 64
    generator = torch.Generator().manual_seed(6)
    frequencies = 1e6 ** (-torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    centre, rest = torch.randn(2, 4, num_frequencies, generator=generator).double().unbind()
    centre = torch.complex(centre, torch.randn(centre.shape, generator=generator).double())
    tokens = torch.randn(num_tokens, num_frequencies, generator=generator).double()
    keys = torch.polar(tokens, (position - torch.arange(num_tokens))[:, None] * frequencies)
    cached = torch.cat([keys.real, keys.imag], dim=-1).float()
    keys = torch.complex(*cached.double().chunk(2, dim=-1))
    turns = [
        torch.polar(torch.ones_like(frequencies), (position + 2**n) * frequencies)
        for n in range(17)
    ]
    mean = torch.stack(turns).mean(0)
    expected = ((centre * mean)[:, None] * keys.conj()).real.sum(-1)
    expected += (rest.abs()[:, None] * keys.abs()).sum(-1)
    centres = torch.cat([centre.real, centre.imag], dim=-1).float()[None]
    blocks = torch.cat([cached, cached], dim=-1).view(1, 4, 1, 16, 4 * num_frequencies)
    batch = make_batch([[0, 1, 2, 3]], [[0]], [0])
    weights = (centres, rest.abs().float()[None], mean.to(torch.complex64)[None, None])
    arguments = (*weights, False, 2 * num_frequencies)
    kv = PagedKV.from_blocks(blocks)
    for found in (score(kv, batch, *arguments), triton_score(kv, batch, *arguments)):
        error = (found[0, 0].double() - expected).abs().amax(-1)
        assert (error <= 2e-6 * expected.abs().amax(-1)).all()


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 2), (3, 4, 1, 3, 6), (1, 3, 5, 7, 10)])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_odd_sizes_and_size_one_are_scored(shape, group, make_cache, make_batch):
    num_layers, num_blocks, num_kv_heads, _, head_dim = shape
    cache = make_cache("head_major", shape)
    batch = make_batch([list(range(1, num_blocks))], [[1]], [0])
    weights = random_weights((1, num_layers, num_kv_heads * group, head_dim), head_dim)
    arguments = (cache.kv, batch, *weights, False, head_dim)
    assert torch.allclose(triton_score(*arguments), score(*arguments), rtol=1e-5, atol=1e-5)


def test_requests_of_a_batch_do_not_touch_each_other(make_cache, make_batch):
    cache = make_cache("head_major", (2, 8, 2, 16, 32))
    sources = [[1, 2, 3], [4], [5, 6]]
    *weights, turns = random_weights((3, 2, 8, 32), 32)
    batch = make_batch(sources, [[1], [4], [5]], [0, 0, 0])
    together = triton_score(cache.kv, batch, *weights, turns, False, 32)
    for idx, source in enumerate(sources):
        alone = make_batch([source], [source[:1]], [0])
        found = triton_score(cache.kv, alone, *weights, turns[idx : idx + 1], False, 32)
        assert torch.equal(found[0], together[idx, ..., : found.shape[-1]])
        assert together[idx, ..., found.shape[-1] :].isneginf().all()


def test_a_key_of_nan_spoils_its_own_token_only(make_cache, make_batch):
    cache = make_cache("head_major", (1, 3, 1, 16, 32))
    cache.blocks[0, 2, 0, 5, 3] = torch.nan
    batch = make_batch([[1, 2]], [[1]], [0])
    for group in (1, 4):
        weights = random_weights((1, 1, group, 32), 32)
        found = triton_score(cache.kv, batch, *weights, False, 32)
        assert found.isnan().nonzero()[:, 3].unique().tolist() == [21]


@pytest.mark.parametrize("is_layer", [False, True])
def test_offsets_pass_the_range_of_32_bits(is_layer):
    generator = torch.Generator().manual_seed(2)
    content = torch.randn(SHAPE, generator=generator).to(torch.float8_e5m2)
    centres = torch.arange(48.0).view(3, 1, 16)
    (scores, moved), _ = run_triton("far_blocks:far_round", content, centres, is_layer)
    keys = content[:, 2, 0, :, :16].float()
    assert torch.allclose(scores[0, :, 0], (keys * centres).sum(dim=-1), rtol=1e-5)
    expected = content.view(torch.uint8)[:, [2, 1, 2]]
    assert torch.equal(moved, expected)


def test_weights_that_triton_does_not_take_are_refused(make_cache, make_batch):
    cache = make_cache("head_major", (1, 3, 1, 16, 32))
    batch = make_batch([[1, 2]], [[1]], [0])
    centres, *others = random_weights((1, 1, 4, 32), 32)
    wide = random_weights((1, 1, 4, 32), 32, torch.float64)
    with pytest.raises(ArgumentError, match=r"centres is torch.float64 .* takes torch.float32"):
        triton_score(cache.kv, batch, *wide, False, 32)
    spread = centres.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ArgumentError, match="centres is .* with a contiguous last dimension"):
        triton_score(cache.kv, batch, spread, *others, False, 32)


def test_triton_on_the_cpu_is_refused_and_never_replaced(make_cache, make_batch, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cache = make_cache("head_major", (1, 3, 1, 16, 32))
    batch = make_batch([[1, 2]], [[1]], [0])
    with pytest.raises(ArgumentError, match='implementation="triton" was asked for tensors on cpu'):
        score(cache.kv, batch, *random_weights((1, 1, 4, 32), 32), False, 32, "triton")
