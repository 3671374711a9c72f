"""Run vLLM's V2 BlockTables under the Triton interpreter; prints the rows after a round.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process.
"""

import json
from types import SimpleNamespace

import numpy as np
import torch
import vllm.platforms

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

from vllm.v1.worker.gpu import buffer_utils  # noqa: E402
from vllm.v1.worker.gpu.block_table import BlockTables  # noqa: E402

from triattention_vllm.engine.kv_manager import RoundPlan  # noqa: E402
from triattention_vllm.engine.rows import RowsV2  # noqa: E402

# vLLM's own fallback for platforms without pinned memory.
buffer_utils.is_uva_available = lambda: False
tables = BlockTables(
    block_sizes=[4],
    max_num_reqs=3,
    max_num_batched_tokens=8,
    max_num_blocks_per_group=[8],
    device=torch.device("cpu"),
)
tables.append_block_ids(1, ([11, 12, 13, 14, 15],), overwrite=True)
tables.append_block_ids(2, ([21, 22],), overwrite=True)
tables.apply_staged_writes()
plan = RoundPlan(
    request_id="r",
    group_id=0,
    nominal_boundary=20,
    source_blocks=(12, 13, 14),
    first_candidate=0,
    destination_blocks=(31,),
    row_start=0,
    row_blocks=(0, 0, 11, 31),
)
runner = SimpleNamespace(
    block_tables=tables,
    req_states=SimpleNamespace(req_id_to_index={"r": 1}, index_to_req_id={1: "r", 2: "s"}),
)
rows = RowsV2(runner)
rows.write(plan)
tables.append_block_ids(1, ([16],), overwrite=False)
tables.apply_staged_writes()
(table,) = tables.gather_block_tables(torch.tensor([2, 1]), num_reqs_padded=2)
metadata = SimpleNamespace(req_idx=np.array([2, 1], dtype=np.int32))
print(
    json.dumps(
        {
            "rows": table.tolist(),
            "num_blocks": tables.num_blocks.np[0].tolist(),
            "requests": rows.requests(metadata),
        }
    )
)
