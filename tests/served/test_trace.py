"""``triattention trace`` from its own server to its pictures."""

from pathlib import Path

import pytest

from triattention_vllm.errors import SettingsError
from triattention_vllm.tools.main import main
from triattention_vllm.tools.recording import read_recording, request_recording
from triattention_vllm.tools.trace import record_example


def test_a_live_run_is_recorded_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "trace"
    arguments = ["trace", "--output", str(output), "--budget", "256", "--answer-tokens", "900"]
    assert main(arguments) == 0
    recording = request_recording(read_recording(output / "rounds.jsonl"))
    said = capsys.readouterr().out
    assert f"{recording.num_tokens:,} tokens in {recording.most_held} blocks" in said
    assert recording.num_tokens > 900
    assert recording.most_held <= (256 + 64) // 32 + 1
    evicted = sum(one.num_freed for one in recording.rounds) * 32
    assert 0 <= recording.num_tokens - evicted <= 256 + 64
    for head in recording.evicted_at:
        assert sum(at >= 0 for at in head) == evicted
    assert recording.evicted_at[0] != recording.evicted_at[1]
    assert (output / "garage.html").stat().st_size > 10000
    assert (output / "garage.png").read_bytes().startswith(b"\x89PNG")
    svg = tmp_path / "picture.svg"
    assert main(["trace", str(output / "rounds.jsonl"), "--plot", str(svg)]) == 0
    assert svg.is_file()
    assert main(["trace", str(output / "rounds.jsonl"), "--list"]) == 0
    assert recording.request in capsys.readouterr().out


def test_an_answer_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--answer-tokens is 20000"):
        record_example(tmp_path, 256, 20000)


def test_a_recording_that_is_missing_ends_with_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["trace", str(tmp_path / "gone.jsonl")]) == 1
    assert "is not a file" in capsys.readouterr().err
