"""Where the processes of a server leave what they count, and how ``/metrics`` finds it."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from triattention_vllm.engine.metrics_file import OWNER, owning_process
from triattention_vllm.environment import METRICS_FOLDER

VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's own variable. vLLM sets it where several API servers share an engine; each
of them then answers with everything in that folder."""


def share_metrics_folder(log_stats: bool) -> None:
    """Name the folder in the environment, which every process of the server inherits.

    vLLM's own folder where there is one; otherwise a folder of this process, which the default
    registry reads from now on. Without statistics (``--disable-log-stats``) there is none.
    """
    if not log_stats:
        os.environ.pop(METRICS_FOLDER, None)
    elif VLLM_FOLDER in os.environ:
        os.environ[METRICS_FOLDER] = os.environ[VLLM_FOLDER]
    else:
        os.environ[METRICS_FOLDER] = str(_own_folder(os.getpid()))


@cache
def _own_folder(pid: int) -> Path:
    """A folder that only this user can enter, for as long as process ``pid`` lives.

    By process: one that was forked must not take the folder of the other for its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="triattention-metrics-"))
    collector = FolderCollector(folder)
    weakref.finalize(collector, _remove, folder, pid)
    REGISTRY.register(collector)
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


class FolderCollector(Collector):
    """Everything that the engines counted into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> list[Metric]:
        """Nothing: the names are ours alone, so the registry needs not know them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per metric; gauges of processes that ended are removed first."""
        for file in self._folder.glob(f"gauge_live*_{OWNER}*.db"):
            if not _is_alive(owning_process(file)):
                mark_process_dead(file.stem.split("_")[-1], str(self._folder))
        yield from MultiProcessCollector(None, str(self._folder)).collect()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
