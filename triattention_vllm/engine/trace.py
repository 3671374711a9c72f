"""Records rounds and what they left, one JSON line each, for ``triattention trace``.

The scheduler knows blocks and moments, the first worker of an engine knows who survived; both
append to one file. Recording waits for the device in every round, so it is off by default.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from triattention_vllm.config import Settings
from triattention_vllm.engine.kv_manager import CompressedKVCacheManager, RoundPlan
from triattention_vllm.errors import RecordingError
from triattention_vllm.log import logger


class Lines:
    """Appends to the file of a recording; several processes may.

    Where a line cannot be written, as on a full disk, the recording ends and serving goes on.
    """

    def __init__(self, path: Path, engine: int) -> None:
        """Raises RecordingError where the file cannot be opened."""
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise RecordingError(
                f"rounds cannot be recorded to {path} ({error}); name a file that this user may "
                "write with the setting `trace`, or leave it out"
            ) from error
        self._file: int | None = file
        self._path = path
        self._engine = engine

    def append(self, event: str, values: Mapping[str, object]) -> None:
        """One line in one write, so that lines of other processes do not cut it."""
        if self._file is None:
            return
        line = {"event": event, "engine": self._engine, "time": time.time(), **values}
        try:
            os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            os.close(self._file)
            self._file = None
            logger.warning("The recording of rounds to %s ends here: %s", self._path, error)


class StepTrace:
    """The scheduler's part: how many blocks each request holds, its rounds and its end."""

    def __init__(
        self, lines: Lines, settings: Settings, managers: Sequence[CompressedKVCacheManager]
    ) -> None:
        self._lines = lines
        self._managers = managers
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        block_size = {manager.kv_cache_group_id: manager.block_size for manager in managers}
        pool = managers[0].block_pool.num_gpu_blocks
        self._lines.append(
            "engine",
            {"settings": settings.to_mapping(), "block_size": block_size, "num_blocks": pool},
        )

    def record(
        self, output: SchedulerOutput, plans: Sequence[RoundPlan], running: Sequence[Request]
    ) -> None:
        """A step that was scheduled: its rounds, then every row that has changed."""
        for plan in plans:
            self._lines.append("round", _round(plan))
        for request_id in output.finished_req_ids:
            self._lines.append("end", {"request": request_id})
            for manager in self._managers:
                self._last.pop((request_id, manager.kv_cache_group_id), None)
        for manager in self._managers:
            for request in running:
                self._record_row(manager, request)

    def _record_row(self, manager: CompressedKVCacheManager, request: Request) -> None:
        request_id, group_id = request.request_id, manager.kv_cache_group_id
        num_null = manager.num_null_blocks.get(request_id, 0)
        num_held = len(manager.req_to_blocks[request_id]) - num_null
        if self._last.get((request_id, group_id)) == (num_null, num_held):
            return
        self._last[request_id, group_id] = (num_null, num_held)
        row = {
            "request": request_id,
            "group": group_id,
            "tokens": request.num_computed_tokens,
            "null": num_null,
            "held": num_held,
        }
        self._lines.append("blocks", row)


def _round(plan: RoundPlan) -> dict[str, object]:
    num_prefix = len(plan.row_blocks) - plan.num_freed_blocks - len(plan.destination_blocks)
    return {
        "request": plan.request_id,
        "group": plan.group_id,
        "boundary": plan.nominal_boundary,
        "null_before": plan.row_start,
        "prefix_blocks": num_prefix,
        "first_candidate": plan.first_candidate,
        "source": plan.source_blocks,
        "destination": plan.destination_blocks,
    }


class SurvivorTrace:
    """The worker's part: which tokens of each round's region were evicted, for each KV head.

    Where every layer keeps its own tokens, those of the group's first layer. block_size: of the
    plans as ``Rounds`` carries them out.
    """

    def __init__(self, lines: Lines, block_size: int) -> None:
        self._lines = lines
        self._block_size = block_size

    def record(self, plans: Sequence[RoundPlan], kept: torch.Tensor) -> None:
        """kept: [R, L, H_kv, tokens] as ``Rounds.run_batch`` returns it; waits for the device."""
        first_layer = kept[:, 0].cpu()
        for plan, heads in zip(plans, first_layer, strict=True):
            num_region = len(plan.source_blocks) * self._block_size
            num_kept = len(plan.destination_blocks) * self._block_size
            is_evicted = torch.ones(len(heads), num_region, dtype=torch.bool)
            is_evicted.scatter_(1, heads[:, :num_kept], False)
            evicted = [row.nonzero().flatten().tolist() for row in is_evicted]
            values = {
                "request": plan.request_id,
                "group": plan.group_id,
                "boundary": plan.nominal_boundary,
                "heads": evicted,
            }
            self._lines.append("evicted", values)


def step_trace(
    vllm_config: VllmConfig, settings: Settings, managers: Sequence[CompressedKVCacheManager]
) -> StepTrace | None:
    """The scheduler's part, where the settings name a file."""
    lines = _lines(vllm_config, settings)
    return None if lines is None else StepTrace(lines, settings, managers)


def survivor_trace(
    vllm_config: VllmConfig, settings: Settings, block_size: int
) -> SurvivorTrace | None:
    """The first worker's part, where the settings name a file."""
    lines = _lines(vllm_config, settings)
    return None if lines is None else SurvivorTrace(lines, block_size)


def _lines(vllm_config: VllmConfig, settings: Settings) -> Lines | None:
    if settings.trace_path is None:
        return None
    return Lines(settings.trace_path, vllm_config.parallel_config.data_parallel_index)
