"""``triattention doctor``: what is right, what is wrong, and what to do about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model
from torch import Tensor
from triattention_kernels import PagedKV, RoundBatch, compact, select

from triattention_vllm.child_report import run_child
from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Fingerprint, Statistics
from triattention_vllm.tools import doctor, try_operations
from triattention_vllm.tools.doctor import check_engine, check_operations, check_vllm
from triattention_vllm.tools.main import main

OPERATIONS = "triattention_vllm.tools.try_operations"
HEALTHY = {"step": "done", "vllm": "0.32.0", "platform": "cpu"}
HEALTHY |= {"is_verified": True, "is_installed": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("doctor") / "model", num_layers=2)


@pytest.fixture(scope="module")
def operations() -> dict[str, Any]:
    """What one run of the operations reports."""
    return run_child(OPERATIONS)


@pytest.fixture
def operations_tried(operations: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor is handed that report instead of a run of its own: other checks are looked at."""

    def child(module: str, *given: Any) -> dict[str, Any]:
        return operations if module == OPERATIONS else run_child(module, *given)

    monkeypatch.setattr(doctor, "run_child", child)


def examine(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and name -> check."""
    status = main(["doctor", "--json", *arguments])
    checks = json.loads(capsys.readouterr().out)
    return status, {check["name"]: check for check in checks}


def test_a_healthy_environment_and_model_pass(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM's own parser and configuration, in a process of their own."""
    status, checks = examine(capsys, str(model), "--dtype", "float32", "--port", "8001")
    assert status == 0, checks
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert list(checks) == [
        "versions",
        "vLLM",
        "plugin",
        "operations",
        "model and flags",
        "attention backend",
        "statistics",
    ]
    assert "budget 2048" in checks["model and flags"]["found"]
    assert "CompressionCPUWorker" in checks["model and flags"]["found"]


@pytest.mark.usefixtures("operations_tried")
def test_flags_that_are_refused_are_reported_with_the_reason(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, checks = examine(capsys, str(model), "--kv-compression-config.budget=100")
    assert status == 1
    assert checks["plugin"]["status"] == "ok"
    assert checks["model and flags"]["status"] == "wrong"
    assert "budget 100 is below window 25" in checks["model and flags"]["found"]


@pytest.mark.usefixtures("operations_tried")
def test_a_plugin_that_vllm_leaves_out_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another_plugin")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "wrong  plugin" in shown
    assert "leave VLLM_PLUGINS unset, or let it name triattention_vllm" in shown
    assert "1 of 4 checks found something wrong." in shown


def test_a_vllm_that_cannot_be_imported_is_named_with_what_to_install() -> None:
    (check,) = check_vllm({"step": "import vllm", "error": "No module named 'vllm'"})
    assert (check.status, "triattention cpu-install" in check.todo) == ("wrong", True)
    assert "No module named 'vllm'" in check.found


def test_a_plugin_whose_function_raises_is_found() -> None:
    report = {"step": "load plugins", "vllm": "0.32.0", "platform": "cpu", "error": "a\n seam"}
    assert [check.status for check in check_vllm(report)] == ["ok", "wrong"]
    assert "a seam" in check_vllm(report)[1].found


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"is_verified": False}, "the tests have not run on it"),
        ({"platform": "cuda"}, "compression has not run on a GPU yet"),
    ],
)
def test_a_version_or_a_device_that_is_not_verified_is_wrong_unless_it_is_accepted(
    changed: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIATTENTION_ALLOW_UNTESTED_VLLM", raising=False)
    wrong, plugin = check_vllm({**HEALTHY, **changed})
    assert (wrong.status, plugin.status) == ("wrong", "ok")
    assert found in wrong.found
    assert "TRIATTENTION_ALLOW_UNTESTED_VLLM=1" in wrong.todo
    monkeypatch.setenv("TRIATTENTION_ALLOW_UNTESTED_VLLM", "1")
    note, plugin = check_vllm({**HEALTHY, **changed})
    assert (note.status, note.todo, plugin.status) == ("note", "", "ok")
    assert note.found.endswith("accepted with TRIATTENTION_ALLOW_UNTESTED_VLLM=1")


def test_operations_that_fail_or_differ_are_wrong() -> None:
    failed = check_operations({"step": "score", "error": "no kernel image"})
    assert (failed.status, failed.found) == ("wrong", "score failed: no kernel image")
    different = {"implementation": "triton", "device": "a GPU", "is_right": False}
    assert check_operations(different).status == "wrong"


def test_the_operations_are_tried_in_a_process_of_their_own(operations: dict[str, Any]) -> None:
    assert (operations["step"], operations["is_right"]) == ("done", True)
    assert operations["score_error"] < 1e-4


def test_the_operations_tried_are_those_of_a_default_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redundancy and both ways of moving are kernels of their own, which a GPU has to compile."""
    weights: list[float] = []
    moved: list[tuple[Any, ...]] = []

    def selecting(*arguments: Any) -> Tensor:
        kept = select(*arguments)
        repeats = arguments[-1]
        weights.append(repeats.weight)
        assert not torch.equal(kept, select(*arguments[:-1])), "redundancy changes nothing here"
        return kept

    def moving(kv: PagedKV, batch: RoundBatch, *arguments: Any) -> None:
        moved.append((*arguments[1:], batch.moves_forward))
        compact(kv, batch, *arguments)

    monkeypatch.setattr(try_operations, "select", selecting)
    monkeypatch.setattr(try_operations, "compact", moving)
    report: dict[str, Any] = {}
    try_operations.try_round(report, "cpu")
    assert report["is_right"]
    assert weights == [Settings().redundancy / 100] * 2
    assert moved == [(True,), ("torch", True), (False,), ("torch", False)]


def test_the_error_of_a_child_is_reported(tmp_path: Path) -> None:
    """An exception by its message, an exit by the last line on standard error."""
    (tmp_path / "raises.py").write_text(
        "import sys\nfrom triattention_vllm.child_report import begin_report\n"
        "begin_report(sys.argv[1])['step'] = 'half way'\nraise RuntimeError('broken')\n"
    )
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('usage: something')\n")
    path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    assert run_child("raises", (), path) == {"step": "half way", "error": "broken"}
    assert run_child("leaves", (), path) == {"error": "usage: something"}


def engine_report(model: Path, **changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": "triattention", **changed.pop("settings", {})}
    return {
        **HEALTHY,
        "settings": settings,
        "model": str(model),
        "architecture": "Qwen3ForCausalLM",
        "max_model_len": 32768,
        "block_size": 128,
        "worker": "triattention_vllm.engine.worker_cpu.CompressionCPUWorker",
        "attention_backend": None,
        "supported_backends": ["CPU_ATTN"],
        **changed,
    }


def test_an_attention_backend_that_reads_the_null_head_is_wrong(model: Path) -> None:
    checks = check_engine(engine_report(model, attention_backend="FLEX_ATTENTION"), ["m"])
    assert [check.status for check in checks] == ["ok", "wrong", "ok"]


def test_compression_that_the_flags_turn_off_is_a_note(model: Path) -> None:
    report = {**engine_report(model), "settings": None}
    (check,) = check_engine(report, ["m", "--kv-compression=off"])
    assert check.status == "note"


def statistics_of(num_layers: int, file: Path) -> str:
    shape = (num_layers, 4, 32)
    Statistics(
        fingerprint=Fingerprint(
            None, tuple(range(num_layers)), 4, None, 64, (64,) * num_layers, False, None, None
        ),
        centre_real=torch.zeros(shape),
        centre_imag=torch.zeros(shape),
        magnitude=torch.ones(shape),
        unrotated_mean=torch.zeros(num_layers, 4, 64),
        provenance={},
    ).save(file)
    return str(file)


def test_statistics_are_held_against_the_models_configuration(model: Path, tmp_path: Path) -> None:
    for num_layers, status in ((2, "ok"), (3, "wrong")):
        file = statistics_of(num_layers, tmp_path / f"{num_layers}.safetensors")
        checks = check_engine(engine_report(model, settings={"statistics": file}), ["m"])
        assert checks[-1].status == status, checks[-1]
    gone = str(tmp_path / "gone.safetensors")
    check = check_engine(engine_report(model, settings={"statistics": gone}), ["m"])[-1]
    assert (check.status, "there is no such file" in check.found) == ("wrong", True)


def test_flags_that_may_turn_compression_on_or_off_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def child(module: str, arguments: Any = (), environment: Any = None) -> dict[str, Any]:
        seen.append(list(arguments))
        return {"error": "not run"}

    monkeypatch.setattr(doctor, "run_child", child)
    doctor.examine(["m", "--kv-compression", "off"])
    doctor.examine(["m", "--config=file.yaml"])
    doctor.examine(["m", "--kv_compression_config.budget=9"])
    assert seen[0] == ["m", "--kv-compression", "off"]
    assert seen[2] == ["m", "--config=file.yaml"]
    assert seen[4][-1] == "--kv-compression=triattention"
