"""Run vLLM's V2 BlockTables under the Triton interpreter; prints the rows after a round.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process.
"""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import vllm.platforms

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

from table_arguments import kernel_block_sizes  # noqa: E402
from vllm.v1.worker.gpu import buffer_utils  # noqa: E402
from vllm.v1.worker.gpu.block_table import BlockTables  # noqa: E402

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
    names = {0: "q", 1: "r", 2: "s"}
    runner = SimpleNamespace(
        block_tables=tables,
        req_states=SimpleNamespace(
            req_id_to_index={name: index for index, name in names.items()}, index_to_req_id=names
        ),
    )
    rows = RowsV2(runner)
    rows.write([plan_of("q", num_groups - 1, 11), plan_of("r", num_groups - 1, 51)])
    for index, block in ((0, 16), (1, 56), (2, 96)):
        tables.append_block_ids(index, ([block],) * num_groups, overwrite=False)
    tables.apply_staged_writes()
    order = torch.tensor([2, 0, 1])
    gathered = tables.gather_block_tables(order, num_reqs_padded=3)
    slots = tables.compute_slot_mappings(
        order, torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([20, 21, 22]), 4
    )
    metadata = SimpleNamespace(req_idx=order.numpy().astype(np.int32))
    return {
        "rows": [row[:6].tolist() for row in gathered[-1]],
        "other_group": [row[:6].tolist() for row in gathered[0]],
        "num_blocks": tables.num_blocks.np[-1].tolist(),
        "slots": slots[-1].tolist(),
        "requests": rows.requests(metadata),
    }


print(json.dumps([rows_after_rounds(1), rows_after_rounds(2)]))
