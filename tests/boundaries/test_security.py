"""Nothing in the packages runs code from outside, listens, or leaves files that others may read."""

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_statistics import MODEL, some_statistics

from triattention_vllm.engine import cache_folder
from triattention_vllm.engine.metrics_file import MetricsFile
from triattention_vllm.engine.metrics_folder import share_metrics_folder
from triattention_vllm.engine.trace import Lines
from triattention_vllm.environment import METRICS_FOLDER
from triattention_vllm.method.statistics import Statistics
from triattention_vllm.metrics import METRICS

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "triattention_vllm").rglob("*.py")),
    *sorted((ROOT / "kernels").rglob("*.py")),
]
PUBLISHED = "triattention_vllm/method/statistics/published.py"
SERVER = "triattention_vllm/tools/server.py"
RANKS = "triattention_vllm/engine/ranks.py"
CONFIGURATIONS = "triattention_vllm/tools/model_shape.py"

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "joblib.load", "yaml.load", "numpy.load", "np.load"),
}
LISTENING = {"listen", "bind", "create_server", "start_server", "serve_forever", "run_server"}
PICKLING = {
    *("all_gather_object", "gather_object", "broadcast_object", "broadcast_object_list"),
    *("scatter_object_list", "send_object", "recv_object", "send_object_list", "recv_object_list"),
}
FETCHING = {"from_pretrained", "snapshot_download", "hf_hub_download", "urlretrieve"}
LISTENERS = {"socketserver", "http.server", "xmlrpc", "multiprocessing.managers", "aiohttp", "zmq"}


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_no_file_runs_code_that_comes_from_outside(path: Path) -> None:
    """The published statistics are the one place that reads a pickle, and only its tensors."""
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in FORBIDDEN, f"line {call.lineno}: {name}"
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert arguments.get("shell", "False") == "False", f"line {call.lineno}: a shell"
        assert arguments.get("trust_remote_code", "False") == "False", f"line {call.lineno}"
        if name == "torch.load":
            assert shown(path) == PUBLISHED, f"line {call.lineno}: torch.load"
            assert arguments.get("weights_only") == "True"
    # Its name is needed to catch the error that torch.load raises.
    assert "pickle" not in imports(path) or shown(path) == PUBLISHED


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_objects_are_sent_and_models_fetched_in_one_place_each(path: Path) -> None:
    """Between the ranks of one engine, over vLLM's own groups; and a configuration by its name."""
    called = {call.func.attr for call in calls(path) if isinstance(call.func, ast.Attribute)}
    assert not called & PICKLING or shown(path) == RANKS
    assert not called & FETCHING or shown(path) == CONFIGURATIONS


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_no_file_opens_a_listener(path: Path) -> None:
    """The commands that start a `vllm serve` ask the system for a free port of loopback first."""
    found = [
        (call.func.attr, [ast.unparse(argument) for argument in call.args])
        for call in calls(path)
        if isinstance(call.func, ast.Attribute) and call.func.attr in LISTENING
    ]
    expected = [("bind", ["('127.0.0.1', 0)"])] if shown(path) == SERVER else []
    assert found == expected
    assert not imports(path) & LISTENERS
    assert "socket" not in imports(path) or shown(path) == SERVER


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("no_umask")
def test_files_and_folders_are_their_owners_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("TRIATTENTION_CACHE", str(folder))
    kept = cache_folder.keep(some_statistics())
    metrics = MetricsFile(folder, {"engine": "0"}, METRICS)
    Lines(folder / "rounds.jsonl", 0).append("end", {})
    files = list(folder.iterdir())
    assert len(files) == 5
    assert {mode(path) for path in files} == {0o600}
    assert mode(kept) == 0o600
    assert {mode(path) for path in (folder, folder.parent)} == {0o700}
    metrics.close()
    for name in ("PROMETHEUS_MULTIPROC_DIR", METRICS_FOLDER):
        monkeypatch.setenv(name, "")  # remembered, so that what is set below is undone
        monkeypatch.delenv(name)
    share_metrics_folder(log_stats=True)
    assert mode(Path(os.environ[METRICS_FOLDER])) == 0o700


def test_links_in_the_cache_folder_are_replaced_and_never_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who may write there leaves links to files of this user under every name that is
    known beforehand."""
    folder, victim, absent = tmp_path / "cache", tmp_path / "victim", tmp_path / "absent"
    folder.mkdir()
    victim.write_text("mine")
    monkeypatch.setenv("TRIATTENTION_CACHE", str(folder))
    place = cache_folder.cached_file(MODEL)
    for target in (victim, absent):
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        (folder / f".writable-{os.getpid()}").unlink(missing_ok=True)
        (folder / f".writable-{os.getpid()}").symlink_to(absent)
        assert cache_folder.keep(some_statistics()) == place
        assert not place.is_symlink()
        assert Statistics.load(place).fingerprint == MODEL
    assert victim.read_text() == "mine"
    assert not absent.exists()


def test_links_in_a_shared_metrics_folder_are_replaced_and_never_followed(tmp_path: Path) -> None:
    folder, victim = tmp_path / "metrics", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    for number in range(200):
        for kind in ("counter", "gauge_livesum", "histogram"):
            owner = f"triattention-{os.getpid()}-{number}"
            (folder / f"{kind}_{owner}.db").symlink_to(victim)
            (folder / f"{owner}.{kind}").symlink_to(victim)
    metrics = MetricsFile(folder, {"engine": "0"}, METRICS)
    metrics.add(METRICS[0], 3)
    assert victim.read_text() == "mine"
    made = [path for path in folder.iterdir() if not path.is_symlink()]
    assert len(made) == 3
    assert all(path.suffix == ".db" for path in made)
    metrics.close()
