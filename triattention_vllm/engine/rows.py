"""Writing a round's new row into the model runner, through each runner's own mechanism."""

from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from triattention_vllm.engine.kv_manager import RoundPlan


def write_row_v1(runner: GPUModelRunner, plan: RoundPlan) -> None:
    """Model runner V1: the request's block ids, and its row where it is in the batch.

    A request that is running but not scheduled in this step is out of the batch; vLLM makes
    its row again from the block ids when it returns.
    """
    end = plan.row_start + len(plan.row_blocks)
    block_ids = runner.requests[plan.request_id].block_ids[plan.group_id]
    block_ids[plan.row_start : end] = plan.row_blocks
    row_idx = runner.input_batch.req_id_to_index.get(plan.request_id)
    if row_idx is not None:
        rows = runner.input_batch.block_table[plan.group_id].block_table.np
        rows[row_idx, plan.row_start : end] = plan.row_blocks


def write_row_v2(block_tables: BlockTables, req_idx: int, plan: RoundPlan) -> None:
    """Model runner V2: a staged write, which vLLM applies with the step's own appends.

    Applying it here would turn vLLM's ring of upload buffers twice in one step, while the
    previous step may still read the older one.
    """
    block_tables.block_tables[plan.group_id].stage_write(req_idx, plan.row_start, plan.row_blocks)
