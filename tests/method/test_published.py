"""Import of .pt files of the public reference: the real one, and everything that is not one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Fingerprint, Statistics, import_published

MakeFingerprint = Callable[..., Fingerprint]


def published(layers: tuple[int, ...] = (0, 1), num_heads: int = 2) -> dict[str, Any]:
    """The content of a small published file, head_dim 8."""
    stats = {}
    for layer_idx in layers:
        for head_idx in range(num_heads):
            value = torch.full((4,), 1.0 + layer_idx + 10 * head_idx)
            stats[f"layer{layer_idx:02d}_head{head_idx:02d}"] = {
                "q_mean_real": value,
                "q_mean_imag": -value,
                "q_abs_mean": 2 * value,
            }
    metadata = {"head_dim": 8, "rope_style": "half", "model_name": "Tiny"}
    metadata["sampled_heads"] = [[layer, head] for layer in layers for head in range(num_heads)]
    return {"metadata": metadata, "stats": stats}


def import_content(tmp_path: Path, content: object) -> Statistics:
    path = tmp_path / "published.pt"
    torch.save(content, path)
    return import_published(path)


def test_the_published_file_of_qwen3_8b_is_imported_and_fits_that_model(
    shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "reference_stats" / "qwen3_8b.pt"
    statistics = import_published(path)
    running = Fingerprint(
        "Qwen3ForCausalLM", tuple(range(36)), 32, 8, 128, (128,) * 36, False, "frequencies", "w"
    )
    statistics.check_fits(running)
    assert statistics.centre_real.shape == (36, 32, 64)
    assert statistics.concentration().mean().item() == pytest.approx(0.643, abs=1e-3)
    assert "Qwen/Qwen3-8B" in statistics.provenance["text"]

    raw = torch.load(path, weights_only=True)["stats"]["layer20_head07"]
    assert statistics.centre_real[20, 7].equal(raw["q_mean_real"])
    assert statistics.centre_imag[20, 7].equal(raw["q_mean_imag"])
    assert statistics.magnitude[20, 7].equal(raw["q_abs_mean"])

    converted = tmp_path / "qwen3_8b.safetensors"
    statistics.save(converted)
    assert Statistics.load(converted).fingerprint == statistics.fingerprint
    with pytest.raises(StatisticsError, match="the file has 36, the running model has 28"):
        Statistics.load(converted).check_fits(
            replace(running, layer_indices=tuple(range(28)), rotary_dims=(128,) * 28)
        )


def test_each_head_lands_in_its_own_row(tmp_path: Path) -> None:
    statistics = import_content(tmp_path, published(layers=(3, 7, 101), num_heads=3))
    assert statistics.fingerprint.layer_indices == (3, 7, 101)
    assert statistics.centre_real[:, :, 0].tolist() == [
        [4, 14, 24],
        [8, 18, 28],
        [102, 112, 122],
    ]
    assert statistics.centre_imag.equal(-statistics.centre_real)
    assert not statistics.unrotated_mean.any()


def test_pairing_comes_from_the_metadata(tmp_path: Path) -> None:
    content = published()
    assert not import_content(tmp_path, content).fingerprint.interleaved
    content["metadata"]["rope_style"] = "interleaved"
    assert import_content(tmp_path, content).fingerprint.interleaved


def test_the_running_model_supplies_what_the_file_does_not_know(
    tmp_path: Path, make_fingerprint: MakeFingerprint
) -> None:
    path = tmp_path / "published.pt"
    torch.save(published(), path)
    running = make_fingerprint((0, 1), num_heads=2, num_kv_heads=1)
    assert import_published(path).fingerprint.inv_freq_hash is None
    assert import_published(path, running).fingerprint == running
    with pytest.raises(StatisticsError, match=r"published\.pt.*the running model has 4"):
        import_published(path, make_fingerprint((0, 1), num_heads=4))


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    del content["stats"][key]
    return content


def with_metadata(**members: object) -> dict[str, Any]:
    content = published()
    content["metadata"].update(members)
    return content


def with_value(name: str, value: object) -> dict[str, Any]:
    content = published()
    content["stats"]["layer01_head00"][name] = value
    return content


def with_head(key: str) -> dict[str, Any]:
    content = published()
    content["stats"][key] = content["stats"]["layer00_head00"]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds list; it must hold 'metadata' and 'stats'"),
        ({"stats": {}}, r"it holds \['stats'\]"),
        ({"metadata": {}, "stats": {}}, "'stats' not empty"),
        ({"metadata": [], "stats": {"a": 1}}, "must be dictionaries"),
        (without(published(), "layer01_head00"), "1 of 4 heads are missing, first layer 1 head 0"),
        (with_head("layer02_head00"), "1 of 6 heads are missing, first layer 2 head 1"),
        (with_head("layer00_head02"), "1 of 6 heads are missing, first layer 1 head 2"),
        (with_head("layer000_head00"), "names a layer and head twice"),
        (with_head("layer0_head0"), "not of the form layerLL_headHH"),
        (with_head("layer00_head00_old"), "not of the form layerLL_headHH"),
        (with_metadata(sampled_heads=[[0, 0]]), "lists other heads in 'sampled_heads'"),
        (with_metadata(sampled_heads="all"), "lists other heads in 'sampled_heads'"),
        (with_metadata(rope_style="neox"), "rope_style 'neox'; it must be one of"),
        (with_metadata(rope_style=None), "rope_style None"),
        (with_metadata(head_dim="8"), "head_dim '8'; it must be an even number"),
        (with_metadata(head_dim=16), "Partly rotated heads cannot be imported"),
        (with_value("q_abs_mean", torch.ones(3)), "q_abs_mean of layer 1 head 0 has 3 frequencies"),
        (with_value("q_abs_mean", torch.ones(4).double()), r"is torch.float64 \[4\]"),
        (with_value("q_mean_real", torch.ones(1, 4)), r"is torch.float32 \[1, 4\]"),
        (with_value("q_mean_real", 3.0), "q_mean_real of layer01_head00 is float"),
        (with_value("extra", torch.ones(4)), "layer01_head00 holds"),
        (with_value("q_mean_real", torch.full((4,), float("nan"))), "centre_real contains NaN"),
        (
            with_value("q_abs_mean", torch.full((4,), 0.1)),
            "below .centre. 2.82843, which no queries give",
        ),
    ],
)
def test_contents_that_are_no_published_statistics_are_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(StatisticsError, match=message) as caught:
        import_content(tmp_path, content)
    assert str(tmp_path / "published.pt") in str(caught.value)
    assert "triattention calibrate" in str(caught.value)


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    with pytest.raises(StatisticsError, match="more than tensors and plain values"):
        import_content(tmp_path, {"metadata": Malicious(witness), "stats": {}})
    assert not witness.exists()


def test_files_that_torch_did_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    with pytest.raises(StatisticsError, match="it cannot be read"):
        import_published(path)
    for content in (b"", b"text", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match=r"published\.pt: it is not a file written"):
            import_published(path)
    with pytest.raises(StatisticsError, match="it cannot be read"):
        import_published(tmp_path)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 0.999), flipped_bits=st.integers(1, 255), share=st.floats(0.3, 1))
def test_a_damaged_file_gives_statistics_or_a_clear_error(
    tmp_path: Path, place: float, flipped_bits: int, share: float
) -> None:
    path = tmp_path / "damaged.pt"
    torch.save(published(), path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= flipped_bits
    path.write_bytes(content[: int(share * len(content))] if share < 0.9 else content)
    try:
        outcome: Statistics | str = import_published(path)
    except StatisticsError as error:
        outcome = str(error)
    if isinstance(outcome, Statistics):
        assert outcome.centre().isfinite().all()
    else:
        assert outcome.startswith(f"published statistics file {path}: ")
