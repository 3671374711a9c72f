"""Two servers that start together on one cache folder, and then lose a process each."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from processes import left_after
from tiny_model import write_tiny_model

from triattention_vllm.method.statistics import Statistics
from triattention_vllm.tools.server import Server, serving

ARGUMENTS = [
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--block-size=32",
    "--kv-cache-memory-bytes=4M",
    "--max-model-len=2048",
    "--max-num-batched-tokens=512",
    "--kv-compression=triattention",
    "--kv-compression-config.budget=256",
    "--kv-compression-config.interval=64",
    "--kv-compression-config.window=32",
]
TENSOR_PARALLEL = ["--tensor-parallel-size=2", "--distributed-executor-backend=mp"]
SECONDS_TO_END = 120.0

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need a core each"),
    pytest.mark.timeout(1800),
]


class Running:
    """The two servers; the one of two ranks is called ``ranks``, the other ``alone``."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.cache = folder, folder / "cache"
        model = write_tiny_model(folder / "model", num_layers=2, hidden_size=128, head_dim=32)
        cores = sorted(os.sched_getaffinity(0))[:2]
        environment = {
            "TRIATTENTION_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
        }

        def start(name: str) -> Server:
            arguments, binding = ARGUMENTS, "nobind"
            if name == "ranks":
                arguments, binding = [*ARGUMENTS, *TENSOR_PARALLEL], "|".join(map(str, cores))
            (folder / name).mkdir()
            own = {"VLLM_CPU_OMP_THREADS_BIND": binding, "TMPDIR": str(folder / name)}
            log = folder / f"{name}.log"
            return stack.enter_context(
                serving(model, arguments, log, environment=environment | own, timeout=900.0)
            )

        with ThreadPoolExecutor(2) as threads:
            self.servers = dict(
                zip(("ranks", "alone"), threads.map(start, ("ranks", "alone")), strict=True)
            )
        # Before any test ends one of them.
        self.answers = {name: list(stream(own, 400)) for name, own in self.servers.items()}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with ExitStack() as stack:
        yield Running(tmp_path_factory.mktemp("killed"), stack)


def stream(server: Server, num_tokens: int) -> Iterator[str]:
    """Lines of a streamed answer, until it ends or breaks off."""
    body = {"model": "tiny", "prompt": "A story.", "max_tokens": num_tokens, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.api_url}/completions", data, headers)
    with urllib.request.urlopen(request, timeout=SECONDS_TO_END) as response:
        for line in response:
            yield line.decode()


def process_named(server: Server, name: str) -> psutil.Process:
    """The one process of the server that calls itself so."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [child for child in children if name in " ".join(child.cmdline())]
    return found


def test_servers_that_start_together_share_one_whole_statistics_file(running: Running) -> None:
    (kept,) = running.cache.iterdir()
    assert int(Statistics.load(kept).provenance["tokens_seen"]) > 256
    for name, server in running.servers.items():
        assert "statistics: made from the shipped text" in server.log() or str(kept) in server.log()
        assert running.answers[name][-2].strip() == "data: [DONE]"


@pytest.mark.parametrize(("name", "victim"), [("ranks", "Worker_TP1"), ("alone", "EngineCore")])
def test_a_server_that_loses_a_process_tells_its_clients_and_ends(
    running: Running, name: str, victim: str
) -> None:
    server = running.servers[name]
    others = psutil.Process(server.process.pid).children(recursive=True)
    lines = stream(server, 1900)
    for _ in range(20):
        next(lines)
    process_named(server, victim).send_signal(signal.SIGKILL)
    try:
        rest = "".join(lines)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        rest = f"error: {error}"
    assert "error" in rest
    assert "[DONE]" not in rest.split("error")[0]
    # Its status is vLLM's own, which is 0 here.
    server.process.wait(SECONDS_TO_END)
    assert "EngineDeadError" in server.log() or "died unexpectedly" in server.log()
    assert not left_after(others, SECONDS_TO_END)
    assert list((running.folder / name).glob("triattention-*")) == [], "a folder of metrics is left"
    # The next start finds the statistics, and nothing that is in its way.
    (kept,) = running.cache.iterdir()
    assert int(Statistics.load(kept).provenance["tokens_seen"]) > 256
