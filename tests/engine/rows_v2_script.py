"""Run vLLM's V2 BlockTables under the Triton interpreter; prints the rows after a round.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import vllm.platforms

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

from table_arguments import kernel_block_sizes  # noqa: E402
from vllm.v1.worker.gpu import buffer_utils  # noqa: E402
from vllm.v1.worker.gpu.block_table import BlockTables  # noqa: E402
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: E402

from triattention_vllm.engine.kv_manager import RoundPlan  # noqa: E402
from triattention_vllm.engine.rows import RowsV2  # noqa: E402

# vLLM's own fallback for platforms without pinned memory.
buffer_utils.is_uva_available = lambda: False


def plan_of(request_id: str, group_id: int, first: int) -> RoundPlan:
    """One round of a row of five blocks from ``first`` on: two of them go."""
    return RoundPlan(
        request_id=request_id,
        group_id=group_id,
        nominal_boundary=20,
        source_blocks=(first + 1, first + 2, first + 3),
        first_candidate=0,
        destination_blocks=(first + 20,),
        row_start=0,
        row_blocks=(0, 0, first, first + 20),
    )


def rows_after_rounds(num_groups: int) -> dict[str, Any]:
    """Rounds of two requests in the last group, and a new block of every request in the same step:
    more staged writes than the table has rows. Slots are of the step's own tokens."""
    tables = BlockTables(
        block_sizes=[4] * num_groups,
        max_num_reqs=3,
        max_num_batched_tokens=8,
        max_num_blocks_per_group=[8] * num_groups,
        device=torch.device("cpu"),
        **kernel_block_sizes([4] * num_groups),
    )
    for index, first in ((0, 11), (1, 51), (2, 91)):
        tables.append_block_ids(index, ([*range(first, first + 5)],) * num_groups, overwrite=True)
    tables.apply_staged_writes()
    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.block_tables, runner.pcp_manager = tables, None
    runner.req_states = SimpleNamespace(req_id_to_index={"q": 0, "r": 1, "s": 2})
    rows = RowsV2(runner)
    requests = [rows.requests()]
    rows.write([plan_of("q", num_groups - 1, 11), plan_of("r", num_groups - 1, 51)])
    for index, block in ((0, 16), (1, 56), (2, 96)):
        tables.append_block_ids(index, ([block],) * num_groups, overwrite=False)
    tables.apply_staged_writes()
    batch = replace(
        InputBatch.make_dummy(3, 3, InputBuffers(3, 8, torch.device("cpu"))),
        req_ids=["s", "q", "r"],
        idx_mapping=torch.tensor([2, 0, 1]),
        positions=torch.tensor([20, 21, 22]),
        num_tokens_after_padding=4,
    )
    gathered, slots = runner.prepare_attn(batch)
    requests.append(rows.requests())
    return {
        "rows": [row[:6].tolist() for row in gathered[-1]],
        "other_group": [row[:6].tolist() for row in gathered[0]],
        "num_blocks": tables.num_blocks.np[-1].tolist(),
        "slots": slots[-1].tolist(),
        "requests": requests,
    }


print(json.dumps([rows_after_rounds(1), rows_after_rounds(2)]))
