"""One compressing ``vllm serve`` for all tests of this folder, as a user starts it."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from triattention_vllm.tools.reasoner import MODEL
from triattention_vllm.tools.server import Server, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of benchmarks/gpu by its name, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"gpu.{name}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The small reasoner and the configuration file that users find: a pool that is half as long as
    ``max_model_len``, rounds from 320 cached tokens on."""
    folder = tmp_path_factory.mktemp("served")
    arguments = ["--served-model-name=tiny", "--config", "configs/tiny-cpu.yaml"]
    environment = {
        "TRIATTENTION_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "VLLM_LOG_STATS_INTERVAL": "1",
        # vLLM kills workers that need longer than a few seconds, which a busy machine does.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",
    }
    log_path = Path(folder / "server.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the file names a text by its path in the clone
        with serving(MODEL, arguments, log_path, environment=environment) as running:
            yield running


@pytest.fixture
def server_to_end(server: Server) -> Server:
    """The same one, for the test that ends it."""
    return server


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """The test that ends the server comes behind the last one that asks it, however files are
    chosen and ordered."""
    ending = [item for item in items if "server_to_end" in item.fixturenames]
    others = [item for item in items if item not in ending]
    asking = [idx for idx, item in enumerate(others) if "server" in item.fixturenames]
    behind = asking[-1] + 1 if asking else len(others)
    items[:] = [*others[:behind], *ending, *others[behind:]]
