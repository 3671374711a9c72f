"""One ``vllm serve`` subprocess on loopback, and what its metrics say about the block pool."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from triattention_vllm.config import ENVIRONMENT_PREFIX
from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, AUTHORS_ENABLE, AUTHORS_PREFIX
from triattention_vllm.errors import TriAttentionError
from triattention_vllm.tools.cpu_install import INSTALL_VLLM

_OWN_PREFIXES = (ENVIRONMENT_PREFIX, AUTHORS_PREFIX, AUTHORS_ENABLE)
_SECONDS_TO_STOP = 30.0


@dataclass(frozen=True)
class PoolState:
    """The block pool at one moment, from vLLM's own metrics.

    seconds: monotonic clock. num_blocks: the pool without vLLM's null block. num_held: blocks that
    requests hold. num_preemptions: since the server started.
    """

    seconds: float
    num_blocks: int
    num_held: int
    num_running: int
    num_waiting: int
    num_preemptions: int


def pool_state(metrics: str, seconds: float) -> PoolState:
    """The pool in a text of Prometheus metrics of a server with one engine.

    Raises TriAttentionError where a metric is missing.
    """
    values: dict[str, float] = {}
    labels: Mapping[str, str] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            values[sample.name] = sample.value
            if sample.name == "vllm:cache_config_info":
                labels = sample.labels
    try:
        num_blocks = int(labels["num_gpu_blocks"]) - 1
        return PoolState(
            seconds=seconds,
            num_blocks=num_blocks,
            num_held=round(values["vllm:kv_cache_usage_perc"] * num_blocks),
            num_running=int(values["vllm:num_requests_running"]),
            num_waiting=int(values["vllm:num_requests_waiting"]),
            num_preemptions=int(values["vllm:num_preemptions_total"]),
        )
    except KeyError as missing:
        raise TriAttentionError(
            f"The server's /metrics has no {missing}; start it without --disable-log-stats, on a "
            "vLLM version that this package supports."
        ) from missing


class Server:
    """A running ``vllm serve``, in a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
        self.process = process
        self.log_path = log_path
        self.root_url = f"http://127.0.0.1:{port}"

    @property
    def api_url(self) -> str:
        """Base address of the OpenAI API."""
        return f"{self.root_url}/v1"

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> str:
        """What a scrape returns; blocks for one request on loopback."""
        with urllib.request.urlopen(f"{self.root_url}/metrics", timeout=30) as response:
            text: str = response.read().decode()
            return text

    def pool_state(self) -> PoolState:
        """The pool now, from a scrape."""
        return pool_state(self.metrics(), time.monotonic())

    def wait_until_ready(self, timeout: float) -> None:
        """Return once the server answers; raise TriAttentionError with the end of its log where it
        exits first or ``timeout`` seconds pass."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise TriAttentionError(
                    f"vllm serve ended with exit code {self.process.returncode} before it was "
                    f"ready; the end of {self.log_path}:\n{self.log_end()}"
                )
            try:
                with urllib.request.urlopen(f"{self.root_url}/health", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.25)
        raise TriAttentionError(
            f"vllm serve was not ready after {timeout:.0f} s; the end of {self.log_path}:\n"
            f"{self.log_end()}"
        )

    def stop(self) -> int:
        """Ask the server to end, wait for it, and return its exit code. What is left of its own
        process group after 30 s is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                self._kill_group()
                self.process.wait()
        deadline = time.monotonic() + _SECONDS_TO_STOP
        while self.has_processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.has_processes():
            self._kill_group()
        return self.process.returncode

    def has_processes(self) -> bool:
        """Whether any process of the server's group is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _kill_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def log_end(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-25:])


@contextmanager
def serving(
    model: Path,
    arguments: Sequence[str],
    log_path: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> Iterator[Server]:
    """``vllm serve model arguments...`` on a free port of 127.0.0.1, ready; stopped at the end.

    The server sees this process' environment without this package's variables, plus
    ``environment``; it needs no network. That untested versions are accepted is no setting but
    the user's word about this machine, and reaches it. Its output goes to ``log_path``.
    Raises TriAttentionError where it does not become ready within ``timeout`` seconds.
    """
    port = free_port()
    command = [str(vllm_command()), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), *arguments]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == ALLOW_UNTESTED_VLLM or not name.startswith(_OWN_PREFIXES)
    }
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | offline | dict(environment or {}),
            # Not a session of its own: Linux shares the cores between sessions, and a busy server
            # would keep the clients that watch it from running for seconds.
            process_group=0,
        )
    server = Server(process, port, log_path)
    try:
        server.wait_until_ready(timeout)
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def vllm_command() -> Path:
    """The ``vllm`` command of this Python environment."""
    command = Path(sys.executable).with_name("vllm")
    if not command.is_file():
        raise TriAttentionError(f"There is no {command}; {INSTALL_VLLM}")
    return command
