"""One compressing ``vllm serve`` for all tests of this folder, as a user starts it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from triattention_vllm.tools.server import Server, serving
from triattention_vllm.tools.tiny_model import write_tiny_model

CONFIG_FILE = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The configuration file that users find: a pool that is half as long as ``max_model_len``,
    rounds from 320 cached tokens on."""
    folder = tmp_path_factory.mktemp("served")
    model = write_tiny_model(folder / "model", num_layers=2, hidden_size=128, head_dim=32)
    arguments = ["--served-model-name=tiny", "--config", str(CONFIG_FILE)]
    environment = {
        "TRIATTENTION_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "VLLM_LOG_STATS_INTERVAL": "1",
        # vLLM kills workers that need longer than a few seconds, which a busy machine does.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",
    }
    log_path = Path(folder / "server.log")
    with serving(model, arguments, log_path, environment=environment) as running:
        yield running
