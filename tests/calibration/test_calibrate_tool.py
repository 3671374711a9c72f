"""``triattention calibrate``, from the command line to the file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_process import run_script
from tiny_model import write_tiny_model

from triattention_vllm.method.statistics import Statistics
from triattention_vllm.tools.main import main

ENGINE = {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 2048, "dtype": "float32"}
TEXT = " ".join(f"Sentence {number} has its own number." for number in range(200))


def calibrate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "triattention_vllm.tools.main", "calibrate"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_layers=2, hidden_size=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    output = tmp_path_factory.mktemp("made") / "tiny.safetensors"
    arguments = ["--model", model, "--text", text, "--output", output, "--json"]
    process = calibrate(*arguments, "--engine-args", json.dumps(ENGINE))
    assert process.returncode == 0, process.stderr[-4000:]
    summary = json.loads(process.stdout)
    statistics = Statistics.load(output)
    assert summary["output"] == str(output)
    assert summary["architecture"] == "Qwen3ForCausalLM"
    assert summary["tokens_seen"] == statistics.provenance["tokens_seen"]
    assert summary["text"].startswith("numbers.txt (sha256 ")
    assert list(summary["mean_concentration"]) == ["0", "1"]
    assert all(0.2 < mean < 1.0 for mean in summary["mean_concentration"].values())
    return statistics


def test_a_model_is_calibrated_from_the_command_line(made: Statistics) -> None:
    assert made.fingerprint.layer_indices == (0, 1)
    assert made.fingerprint.weights_hash is not None
    assert int(made.provenance["tokens_seen"]) > 1000


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processor cores")
def test_two_tensor_parallel_ranks_make_the_same_file(
    made: Statistics, model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two-ranks.safetensors"
    arguments = ["--model", model, "--text", text, "--output", output]
    process = calibrate(
        *arguments,
        *("--tensor-parallel-size", 2, "--engine-args", json.dumps(ENGINE)),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "2 layers of 4 query heads" in process.stdout
    two_ranks = Statistics.load(output)
    assert two_ranks.fingerprint == made.fingerprint
    assert torch.allclose(two_ranks.centre(), made.centre(), atol=1e-5)
    assert torch.allclose(two_ranks.magnitude, made.magnitude, atol=1e-5)


def published_file(folder: Path, num_layers: int = 2) -> Path:
    generator = torch.Generator().manual_seed(0)
    stats = {}
    for layer_idx in range(num_layers):
        for head_idx in range(4):
            centre = torch.randn(2, 32, generator=generator)
            stats[f"layer{layer_idx:02d}_head{head_idx:02d}"] = {
                "q_mean_real": centre[0],
                "q_mean_imag": centre[1],
                "q_abs_mean": centre.norm(dim=0) + 1.0,
            }
    path = folder / "published.pt"
    torch.save({"metadata": {"head_dim": 64, "rope_style": "half"}, "stats": stats}, path)
    return path


def test_a_published_file_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published, output = published_file(tmp_path), tmp_path / "imported.safetensors"
    assert main(["calibrate", "--import", str(published), "--output", str(output), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_layers"], summary["num_heads"]) == (2, 4)
    original = torch.load(published, weights_only=True)["stats"]["layer01_head03"]
    imported = Statistics.load(output)
    assert torch.equal(imported.centre_real[1, 3], original["q_mean_real"])
    assert torch.equal(imported.magnitude[1, 3], original["q_abs_mean"])


@pytest.fixture(scope="module")
def refused(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """A folder, and what became of command lines that were to write into it, in one process."""
    folder = tmp_path_factory.mktemp("refused")
    published, engine = published_file(folder, num_layers=3), json.dumps(ENGINE)
    commands = {
        "gone": ["--model", folder / "gone", "--output", folder / "gone.safetensors"],
        "of another model": [
            *("--import", published, "--model", model),
            *("--output", folder / "imported.safetensors", "--engine-args", engine),
        ],
    }
    job = {"commands": {name: [*map(str, words)] for name, words in commands.items()}}
    return folder, run_script(Path(__file__).with_name("refused_calibrations.py"), job)


def test_a_published_file_of_another_model_is_refused(
    refused: tuple[Path, dict[str, tuple[int, str, str]]],
) -> None:
    folder, ended = refused
    status, _, error = ended["of another model"]
    assert status == 1
    assert "belong to another model" in error
    assert not (folder / "imported.safetensors").exists()


def test_a_model_that_vllm_cannot_start_is_one_sentence(
    refused: tuple[Path, dict[str, tuple[int, str, str]]],
) -> None:
    folder, ended = refused
    status, output, error = ended["gone"]
    assert status == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"triattention calibrate: vLLM cannot start {folder / 'gone'}")
    assert "Traceback" not in output + error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "new"], "neither --model nor --import"),
        (["--model", "m", "--output", "there"], "there exists; .* --force"),
        (["--model", "m", "--output", "no/where"], "folder .*no of --output does not exist"),
        (["--model", "m", "--output", "new", "--text", "missing"], "which is not a file"),
        (["--import", "a.pt", "--output", "new", "--text", "there"], "--text has no meaning"),
        (["--import", "missing.pt", "--output", "new"], "missing.pt"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("precious")
    assert main(["calibrate", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("triattention calibrate: ")
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert Path("there").read_text() == "precious"
    assert not Path("new").exists()


def test_an_existing_file_is_overwritten_with_force(tmp_path: Path) -> None:
    output = tmp_path / "imported.safetensors"
    output.write_text("old")
    published = str(published_file(tmp_path))
    assert main(["calibrate", "--import", published, "--output", str(output)]) == 1
    assert output.read_text() == "old"
    assert main(["calibrate", "--import", published, "--output", str(output), "--force"]) == 0
    assert Statistics.load(output).fingerprint.num_layers == 2


@pytest.mark.parametrize("engine_args", ["{", "[1]", "3"])
def test_engine_arguments_must_be_a_json_object(
    engine_args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--output", "o", "--engine-args", engine_args])
    assert stopped.value.code == 2
    assert "--engine-args" in capsys.readouterr().err
