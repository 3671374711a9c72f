"""An engine of the GPU benchmarks on the CPU, with async scheduling and an fp8 cache: what it
reported, and what its scheduler was given back.
"""

from typing import Any

import torch
from cpu_engine import keep_async_scheduling

Json = dict[str, Any]


def run(job: Json) -> Json:
    """Rounds of every decode step; then requests that begin while others decode."""
    keep_async_scheduling()
    from gpu.side import GpuSide

    side = GpuSide(job["model"], job["arguments"], job["settings"])
    returned: list[Json] = []
    update = side.scheduler.update_from_output

    def update_from_output(output: Any, *args: Any) -> Any:
        plans = vars(output).get("round_plans", ())
        returned.append({"tokens": output.total_num_scheduled_tokens, "rounds": len(plans)})
        return update(output, *args)

    side.scheduler.update_from_output = update_from_output
    side.prefill(200, 2, 200)
    returned.clear()
    decoded = side.decode(80)
    rounds = [step["rounds"] for step in returned]
    stored = share_of_stored_keys(side)
    side.finish()
    returned.clear()
    for num_prompt in (40, 300):
        side.request_ids.append(side.add(num_prompt, 20))
    served = side.serve(600.0)
    return {
        "async": side.describe()["async_scheduling"],
        "rounds": [len(step) for step in decoded["rounds"]],
        "planned": rounds,
        "stored": stored,
        "served": served,
        "returned": [step["tokens"] for step in returned],
    }


def share_of_stored_keys(side: Any) -> float:
    """Of the numbers of keys in blocks that requests hold, those that are not zero."""
    worker = side.engine.engine_core.engine_core.model_executor.driver_worker.worker
    (rounds,) = worker.rounds.values()
    (manager,) = side.scheduler.kv_cache_manager.coordinator.single_type_managers
    rows = manager.req_to_blocks.values()
    blocks = [block.block_id for row in rows for block in row if not block.is_null]
    keys = rounds.kv.keys[:, torch.tensor(blocks)].contiguous().view(torch.uint8)
    return float((keys & 0x7F).count_nonzero() / keys.numel())
