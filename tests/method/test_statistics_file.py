"""The statistics file: written whole or not at all, and nothing else is taken for one."""

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Fingerprint, Statistics
from triattention_vllm.method.statistics.file import content_hash

MakeFingerprint = Callable[..., Fingerprint]
MakeStatistics = Callable[..., Statistics]
NAMES = ("centre_real", "centre_imag", "magnitude", "unrotated_mean")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
        return metadata


def write_again(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file as somebody else's program may write it: whole, but not what ``save`` writes."""
    save_file(tensors, path, metadata | {"content_hash": content_hash(tensors, metadata)})


def assert_refused(path: Path, message: str) -> None:
    """Loading fails, names the path, and says how to get on."""
    with pytest.raises(StatisticsError, match=message) as caught:
        Statistics.load(path)
    assert str(path) in str(caught.value)
    assert "triattention calibrate" in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))


@pytest.fixture
def saved(tmp_path: Path, make_statistics: MakeStatistics) -> Path:
    path = tmp_path / "statistics.safetensors"
    make_statistics().save(path)
    return path


def test_a_file_gives_back_what_was_saved(
    tmp_path: Path, make_fingerprint: MakeFingerprint, make_statistics: MakeStatistics
) -> None:
    for idx, fingerprint in enumerate(
        [make_fingerprint(), make_fingerprint((3, 7), 6, None, 10, (4, 0), interleaved=True)]
    ):
        statistics = make_statistics(fingerprint)
        path = tmp_path / f"{idx}.safetensors"
        statistics.save(path)
        loaded = Statistics.load(str(path))
        assert loaded.fingerprint == statistics.fingerprint
        assert loaded.provenance == statistics.provenance
        for name in NAMES:
            assert getattr(loaded, name).equal(getattr(statistics, name))


def test_the_file_describes_itself(saved: Path) -> None:
    metadata = metadata_of(saved)
    assert metadata["format"] == "triattention-statistics"
    assert metadata["schema_version"] == "2"
    assert json.loads(metadata["fingerprint"])["num_heads"] == 4
    assert json.loads(metadata["provenance"])["tokens_seen"] == "10"


def test_a_file_is_replaced_whole_is_private_and_leaves_nothing_beside_it(
    saved: Path, make_statistics: MakeStatistics
) -> None:
    os.chmod(saved, 0o644)
    make_statistics(seed=1).save(saved)
    assert Statistics.load(saved).magnitude.equal(make_statistics(seed=1).magnitude)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert list(saved.parent.iterdir()) == [saved]


def test_a_write_that_fails_keeps_the_old_file(
    saved: Path, make_statistics: MakeStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", failing_disk)
    with pytest.raises(StatisticsError, match=r"could not be written.*no space left"):
        make_statistics(seed=1).save(saved)
    monkeypatch.undo()
    with full_disk(600), pytest.raises(StatisticsError, match=r"could not be written.*too large"):
        make_statistics(seed=1).save(saved)
    assert Statistics.load(saved).magnitude.equal(make_statistics().magnitude)
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_does_not_exist_cannot_be_written(
    tmp_path: Path, make_statistics: MakeStatistics
) -> None:
    with pytest.raises(StatisticsError, match="choose a file in a folder"):
        make_statistics().save(tmp_path / "absent" / "statistics.safetensors")


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.safetensors", "there is no such file")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert_refused(tmp_path, "not a whole safetensors file")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\0" * 100, b"PK\x03\x04" + b"x" * 100, b"\xff" * 5000]
)
def test_foreign_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    assert_refused(path, "not a whole safetensors file")


def test_a_published_pt_file_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "stats.pt"
    torch.save({"metadata": {}, "stats": {}}, path)
    assert_refused(path, r"triattention calibrate --import FILE\.pt")


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    truncated = saved.with_name("truncated")
    truncated.write_bytes(content[: int(share * len(content))])
    assert_refused(truncated, "not a whole safetensors file")


@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 0.999), flipped_bits=st.integers(1, 255))
def test_a_damaged_byte_gives_the_same_statistics_or_a_clear_error(
    saved: Path, place: float, flipped_bits: int
) -> None:
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= flipped_bits
    damaged = saved.with_name("damaged")
    damaged.write_bytes(content)
    try:
        outcome: Statistics | str = Statistics.load(damaged)
    except StatisticsError as error:
        outcome = str(error)
    if isinstance(outcome, Statistics):
        intact = Statistics.load(saved)
        assert all(getattr(outcome, name).equal(getattr(intact, name)) for name in NAMES)
        assert (outcome.fingerprint, outcome.provenance) == (intact.fingerprint, intact.provenance)
    else:
        assert outcome.startswith(f"statistics file {damaged}: ")


def test_another_schema_version_is_refused(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    save_file(tensors, saved, metadata | {"schema_version": "1"})
    assert_refused(saved, "schema version is '1'; this version of triattention-vllm reads '2'")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    assert_refused(path, r"metadata \[\], not statistics")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("fingerprint", "{", "the model fingerprint is not JSON"),
        ("fingerprint", "{}", r"fingerprint has members \[\]"),
        ("provenance", "nothing", "its provenance is not JSON"),
        ("provenance", '{"tokens_seen": 3}', "is not a JSON object of strings"),
        ("provenance", "[" * 100_000, "its provenance is not JSON"),
    ],
)
def test_damaged_metadata_is_refused(saved: Path, name: str, text: str, message: str) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    write_again(saved, tensors, metadata | {name: text})
    assert_refused(saved, message)


@pytest.mark.parametrize("name", ["fingerprint", "provenance", "content_hash"])
def test_absent_metadata_is_refused(saved: Path, name: str) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    del metadata[name]
    save_file(tensors, saved, metadata)
    assert_refused(saved, rf"metadata lacks \['{name}'\]")


def test_missing_and_extra_tensors_are_refused(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    save_file({**tensors, "other": torch.ones(1)}, saved, metadata)
    assert_refused(saved, "it holds the tensors .*'other'")
    del tensors["magnitude"]
    save_file(tensors, saved, metadata)
    assert_refused(saved, "it must hold .*'magnitude'")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_cannot_be_statistics_are_refused(saved: Path, name: str) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    not_finite = tensors[name].clone()
    not_finite[0, 0, 0] = float("nan")
    for wrong, message in (
        (not_finite, f"{name} contains NaN"),
        (tensors[name][:2].contiguous(), f"{name} is torch.float32"),
        (tensors[name].to(torch.float16), f"{name} is torch.float16"),
        (tensors[name].to(torch.float8_e4m3fn), f"{name} is torch.float8"),
    ):
        write_again(saved, {**tensors, name: wrong}, metadata)
        assert_refused(saved, message)


def test_a_value_that_was_changed_by_hand_is_refused(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    for name in ("fingerprint", "provenance"):
        save_file(tensors, saved, metadata | {name: metadata[name] + " "})
        assert_refused(saved, "its content is not what was written")
    tensors["magnitude"] *= 1.5
    save_file(tensors, saved, metadata)
    assert_refused(saved, "its content is not what was written")


@pytest.mark.parametrize("pickled", [pickle.dumps({"a": 1}), b"cos\nsystem\n(S'false'\ntR."])
def test_a_pickle_is_refused_and_not_read(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(pickled)
    assert_refused(path, "not a whole safetensors file")


def test_a_huge_header_is_refused_in_few_words(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    many = {f"tensor {i}": torch.zeros(1) for i in range(3000)}
    save_file(tensors | many, saved, metadata)
    assert_refused(saved, "it holds the tensors")
    save_file(tensors, saved, {f"key {i}": "x" * 1000 for i in range(3000)})
    assert_refused(saved, "not statistics")
    saved.write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")
    assert_refused(saved, "not a whole safetensors file")


def test_a_fingerprint_of_absurd_counts_is_refused_in_few_words(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    fingerprint = json.loads(metadata["fingerprint"])
    for absurd in (
        {"num_heads": 10**15, "num_kv_heads": None},
        {"layer_indices": list(range(100_000)), "rotary_dims": [4] * 100_000},
        {"layer_indices": list(range(100_000, 0, -1))},
        {"rotary_dims": list(range(0, 100_000, 2))},
        {"head_dim": "x" * 100_000},
        {"a" * 100_000: 1},
    ):
        described = metadata | {"fingerprint": json.dumps(fingerprint | absurd)}
        write_again(saved, tensors, described)
        assert_refused(saved, "statistics file")
