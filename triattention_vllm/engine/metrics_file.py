"""What one process counts, in files that prometheus_client's own multiprocess collector reads.

The scheduler and a worker count; the process that answers ``/metrics`` is another one, or several.
prometheus_client decides when it is imported whether its own metrics go to such files, and that
belongs to vLLM; so the same files are written here, beside vLLM's where it has some.
"""

import itertools
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.utils import floatToGoString

from triattention_vllm.environment import METRICS_FOLDER
from triattention_vllm.errors import MetricsError
from triattention_vllm.metrics import LABELS, Metric

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OWNER = "triattention-"
"""Begins the part of a file's name that says whose it is: prometheus_client's own files, with
which they may share a folder, have the bare process id there."""

_FILE_TYPES = {"counter": "counter", "gauge": "gauge_livesum", "histogram": "histogram"}
"""Kind -> beginning of the file's name; a ``live`` gauge goes when its process goes."""

_numbers = itertools.count()

_FILE_SIZE = 1 << 16
"""Bytes of a file; prometheus_client makes more where its keys need more."""


class MetricsFile:
    """Writes ``metrics`` of one engine; each is there with value 0 from the beginning.

    A write is a few bytes in a memory map: no system call, no lock, one thread only.
    Raises MetricsError where the files cannot be made.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        self._folder = folder
        self._labels = dict(labels)
        self._owner = f"{OWNER}{os.getpid()}-{next(_numbers)}"
        self._files: dict[str, MmapedDict] = {}
        self._keys = {metric: list(self._keys_of(metric)) for metric in metrics}
        self._values: dict[str, float] = {}
        by_kind: dict[str, list[str]] = {}
        for metric, keys in self._keys.items():
            by_kind.setdefault(metric.kind, []).extend(keys)
        for kind, keys in by_kind.items():
            self._files[kind] = self._create(_FILE_TYPES[kind], keys)
            self._values.update(dict.fromkeys(keys, 0.0))

    def add(self, metric: Metric, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        key = self._keys[metric][0]
        self._write(metric, key, self._values[key] + amount)

    def set(self, metric: Metric, value: float) -> None:
        """A gauge's value now."""
        self._write(metric, self._keys[metric][0], value)

    def observe(self, metric: Metric, value: float) -> None:
        """One observation of a histogram: its bucket and the sum; the reader accumulates."""
        total, *buckets = self._keys[metric]
        self._write(metric, total, self._values[total] + value)
        bucket = buckets[bisect_left(metric.buckets, value)]
        self._write(metric, bucket, self._values[bucket] + 1)

    def close(self) -> None:
        """Take the gauges away; what was counted stays for as long as the server does."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        mark_process_dead(self._owner, str(self._folder))

    def _write(self, metric: Metric, key: str, value: float) -> None:
        self._values[key] = value
        self._files[metric.kind].write_value(key, value, 0.0)

    def _keys_of(self, metric: Metric) -> Iterator[str]:
        """The value's key; of a histogram the sum's, then one for each bucket, in order."""
        names, values = list(self._labels), list(self._labels.values())
        if metric.kind != "histogram":
            yield mmap_key(metric.name, metric.shown_name, names, values, metric.help)
            return
        yield mmap_key(metric.name, f"{metric.name}_sum", names, values, metric.help)
        for bound in (*metric.buckets, float("inf")):
            bounded = [*values, floatToGoString(bound)]
            yield mmap_key(
                metric.name, f"{metric.name}_bucket", [*names, "le"], bounded, metric.help
            )

    def _create(self, file_type: str, keys: Sequence[str]) -> MmapedDict:
        """A complete file under its final name at once: a scrape may come at any moment.

        Its blocks are taken from the disk here: a memory map of a full disk ends the process
        at the first write. Only this user may read it, and a link in its place is not followed.
        """
        try:
            handle, unfinished = tempfile.mkstemp(prefix=f".{self._owner}.", dir=self._folder)
            with ExitStack() as undo:
                undo.callback(os.unlink, unfinished)
                with os.fdopen(handle, "wb") as reserved:
                    os.posix_fallocate(reserved.fileno(), 0, _FILE_SIZE)
                file = MmapedDict(unfinished)
                for key in keys:
                    file.write_value(key, 0.0, 0.0)
                os.rename(unfinished, self._folder / f"{file_type}_{self._owner}.db")
                undo.pop_all()
        except OSError as error:
            raise MetricsError(
                f"metrics cannot be kept in {self._folder} ({error}); make room there, set TMPDIR "
                "to a folder that this user may write, or start with --disable-log-stats"
            ) from error
        return file


def metrics_file(vllm_config: "VllmConfig", metrics: Sequence[Metric]) -> MetricsFile | None:
    """The file for ``metrics`` of the engine that ``vllm_config`` describes, or None where vLLM
    keeps no statistics."""
    if METRICS_FOLDER not in os.environ:
        return None
    labels = (
        vllm_config.model_config.served_model_name,
        str(vllm_config.parallel_config.data_parallel_index),
    )
    folder = Path(os.environ[METRICS_FOLDER])
    return MetricsFile(folder, dict(zip(LABELS, labels, strict=True)), metrics)


def owning_process(file: Path) -> int:
    """The process that writes ``file``, from its name."""
    return int(file.stem.rpartition(OWNER)[2].partition("-")[0])
