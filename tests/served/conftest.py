"""One compressing ``vllm serve`` for all tests of this folder, as a user starts it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from triattention_vllm.tools.server import Server, serving
from triattention_vllm.tools.tiny_model import write_tiny_model

MAX_MODEL_LEN = 8192
POOL_TOKENS = 4096
BLOCK_SIZE = 32
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4  # 2 layers, keys and values, 2 KV heads of 32 float32


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A pool that is half as long as ``max_model_len``; rounds from 320 cached tokens on."""
    folder = tmp_path_factory.mktemp("served")
    model = write_tiny_model(folder / "model", num_layers=2, hidden_size=128, head_dim=32)
    arguments = [
        "--served-model-name=tiny",
        "--dtype=float32",
        "--enforce-eager",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--block-size={BLOCK_SIZE}",
        f"--kv-cache-memory-bytes={POOL_TOKENS * BYTES_PER_TOKEN}",
        "--max-num-batched-tokens=512",
        "--shutdown-timeout=20",  # without it vLLM kills its engine processes at once
        "--kv-compression=triattention",
        "--kv-compression-config.budget=256",
        "--kv-compression-config.interval=64",
        "--kv-compression-config.window=32",
    ]
    environment = {
        "TRIATTENTION_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "VLLM_LOG_STATS_INTERVAL": "1",
    }
    log_path = Path(folder / "server.log")
    with serving(model, arguments, log_path, environment=environment) as running:
        yield running
