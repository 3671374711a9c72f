"""Statistics: what tensors may hold, which model they fit, which part belongs to a rank."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Fingerprint, Statistics

MakeFingerprint = Callable[..., Fingerprint]
MakeStatistics = Callable[..., Statistics]


def test_concentration_is_the_centre_over_the_magnitude(make_fingerprint: MakeFingerprint) -> None:
    statistics = Statistics(
        fingerprint=make_fingerprint((0,), 1, 1, head_dim=6),
        centre_real=torch.tensor([[[3.0, 0.0, 5.0]]]),
        centre_imag=torch.tensor([[[4.0, 0.0, 0.0]]]),
        magnitude=torch.tensor([[[10.0, 0.0, 4.9999]]]),
        unrotated_mean=torch.zeros(1, 1, 6),
        provenance={},
    )
    assert statistics.centre().tolist() == [[[3 + 4j, 0j, 5 + 0j]]]
    assert statistics.concentration().tolist() == [[[0.5, 0.0, 1.0]]]


@pytest.mark.parametrize("name", ["centre_real", "centre_imag", "magnitude", "unrotated_mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(
    make_statistics: MakeStatistics, name: str, value: float
) -> None:
    statistics = make_statistics()
    tensors = {name: getattr(statistics, name).clone()}
    tensors[name][1, 2, 3] = value
    with pytest.raises(StatisticsError, match=f"{name} contains NaN or infinity"):
        replace(statistics, **tensors)


@pytest.mark.parametrize("name", ["centre_real", "centre_imag", "magnitude", "unrotated_mean"])
def test_tensors_of_another_shape_or_type_are_refused(
    make_statistics: MakeStatistics, name: str
) -> None:
    statistics = make_statistics()
    values = getattr(statistics, name)
    for wrong in (values[:2], values[:, :3], values[..., :-1], values[0], values.double()):
        with pytest.raises(StatisticsError, match=f"{name} is torch.float.*must be torch.float32"):
            replace(statistics, **{name: wrong})


def test_a_magnitude_below_the_centre_is_refused_because_no_queries_give_it(
    make_statistics: MakeStatistics,
) -> None:
    statistics = make_statistics()
    rounding = statistics.centre().abs().float() * (1 - 1e-5)
    assert replace(statistics, magnitude=rounding).concentration().max() <= 1
    magnitude = statistics.magnitude.clone()
    magnitude[2, 1, 3] = 0.9 * float(statistics.centre()[2, 1, 3].abs())
    with pytest.raises(StatisticsError, match="layer 2, query head 1, frequency 3: magnitude"):
        replace(statistics, magnitude=magnitude)


def test_an_unrotated_mean_on_rotated_dims_is_refused(
    make_fingerprint: MakeFingerprint, make_statistics: MakeStatistics
) -> None:
    statistics = make_statistics(make_fingerprint((3, 7), rotary_dims=(4, 0)))
    unrotated_mean = statistics.unrotated_mean.clone()
    unrotated_mean[0, 0, 3] = 1.0
    with pytest.raises(StatisticsError, match="layer 3 is not zero on the 4 dims"):
        replace(statistics, unrotated_mean=unrotated_mean)


def test_statistics_of_another_model_with_the_same_head_dim_are_refused(
    make_fingerprint: MakeFingerprint, make_statistics: MakeStatistics
) -> None:
    statistics = make_statistics()
    statistics.check_fits(make_fingerprint())
    running = make_fingerprint((0, 1, 2, 3), num_heads=8)
    with pytest.raises(StatisticsError) as caught:
        statistics.check_fits(running)
    assert "layers: the file has 3, the running model has 4; missing from the file: [3]" in str(
        caught.value
    )
    assert "num_heads: the file has 4, the running model has 8" in str(caught.value)
    assert "triattention calibrate" in str(caught.value)


def test_the_shards_of_all_ranks_make_up_the_whole(make_statistics: MakeStatistics) -> None:
    statistics = make_statistics()
    for name in ("centre_real", "centre_imag", "magnitude", "unrotated_mean"):
        ranks = [
            torch.cat(
                [getattr(statistics.shard(layers, start, 2), name) for start in (0, 2)], dim=1
            )
            for layers in ((0,), (1, 2))
        ]
        assert torch.cat(ranks).equal(getattr(statistics, name))


def test_a_shard_describes_its_own_layers_and_heads(
    make_fingerprint: MakeFingerprint, make_statistics: MakeStatistics
) -> None:
    model = make_fingerprint((3, 7, 11), rotary_dims=(4, 0, 4))
    shard = make_statistics(model).shard([7, 11], head_start=3, num_heads=1)
    assert shard.fingerprint.layer_indices == (7, 11)
    assert shard.fingerprint.rotary_dims == (0, 4)
    assert shard.fingerprint.num_heads == 1
    assert shard.centre_real.shape == (2, 1, 2)
    assert make_statistics(model).shard([7], 0, 4).centre_real.shape == (1, 4, 0)


def test_layers_that_are_missing_are_an_error_and_never_taken_from_another(
    make_statistics: MakeStatistics,
) -> None:
    with pytest.raises(StatisticsError, match=r"no statistics for layers \[3, 5\]; the file holds"):
        make_statistics().shard([2, 3, 5], 0, 4)


@pytest.mark.parametrize(("head_start", "num_heads"), [(0, 5), (4, 1), (3, 2), (-1, 2), (0, 0)])
def test_heads_outside_the_file_are_an_error(
    make_statistics: MakeStatistics, head_start: int, num_heads: int
) -> None:
    with pytest.raises(StatisticsError, match="the statistics hold heads 0 to 3"):
        make_statistics().shard([0, 1, 2], head_start, num_heads)
