"""The model runner's rows: writing a round's new row, and whose row is where in a batch."""

from collections.abc import Sequence
from typing import Protocol

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunnerV1

from triattention_vllm.engine.kv_manager import RoundPlan


class Rows(Protocol):
    """The rows of one model runner."""

    def write(self, plans: Sequence[RoundPlan]) -> None:
        """Put each plan's row in the place of its request's old one, before the step runs."""

    def requests(self) -> list[str]:
        """The request id of each row of the batch whose attention metadata is built, in order."""


class RowsV1:
    """Model runner V1: block ids per request, and rows of the persistent batch."""

    def __init__(self, runner: ModelRunnerV1) -> None:
        self._runner = runner

    def write(self, plans: Sequence[RoundPlan]) -> None:
        """The requests' block ids, and their rows where they are in the batch.

        Under asynchronous scheduling the device may still be reading the rows of the step before:
        vLLM uploads them without waiting, and waits when a step begins, which is behind this call.
        """
        uploaded = self._runner.prepare_inputs_event
        if uploaded is not None:
            uploaded.synchronize()
        for plan in plans:
            self._write_one(plan)

    def _write_one(self, plan: RoundPlan) -> None:
        """A request that is running but not scheduled in this step is out of the batch; vLLM makes
        its row again from the block ids when it returns.
        """
        end = plan.row_start + len(plan.row_blocks)
        block_ids = self._runner.requests[plan.request_id].block_ids[plan.group_id]
        block_ids[plan.row_start : end] = plan.row_blocks
        row_idx = self._runner.input_batch.req_id_to_index.get(plan.request_id)
        if row_idx is not None:
            rows = self._runner.input_batch.block_table[plan.group_id].block_table.np
            rows[row_idx, plan.row_start : end] = plan.row_blocks

    def requests(self) -> list[str]:
        """The persistent batch, after it was condensed and reordered for this step."""
        return list(self._runner.input_batch.req_ids)


class RowsV2:
    """Model runner V2: staged writes into rows by request index.

    ``prepare_attn`` of ``runner`` is wrapped: vLLM calls it for every batch of requests, and no
    other, before metadata of the batch is built for the model and for drafts. The metadata itself
    names requests for some models and vLLM versions only.
    """

    def __init__(self, runner: ModelRunnerV2) -> None:
        self._runner = runner
        self._requests: list[str] = []
        prepare_attn = runner.prepare_attn

        def remember_requests(
            input_batch: InputBatch,
        ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            self._requests = input_batch.req_ids
            return prepare_attn(input_batch)

        runner.prepare_attn = remember_requests

    def write(self, plans: Sequence[RoundPlan]) -> None:
        """Staged writes, which vLLM applies with the step's own appends.

        Applying them here would turn vLLM's ring of upload buffers twice in one step, while the
        previous step may still read the older one.
        """
        for plan in plans:
            req_idx = self._runner.req_states.req_id_to_index[plan.request_id]
            table = self._runner.block_tables.block_tables[plan.group_id]
            table.stage_write(req_idx, plan.row_start, plan.row_blocks)

    def requests(self) -> list[str]:
        """The last batch of requests. A dummy batch may run behind it, in whose step no request has
        a null head or queries to be seen."""
        return self._requests
