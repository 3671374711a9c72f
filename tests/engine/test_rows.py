"""A round's new row reaches the runner through the runner's own mechanism."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fresh_script import ON_TRITONS_INTERPRETER, answer_of
from table_arguments import kernel_block_sizes
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.rows import RowsV1


@pytest.fixture
def plan() -> RoundPlan:
    return RoundPlan(
        request_id="planned",
        group_id=0,
        nominal_boundary=20,
        source_blocks=(12, 13, 14),
        first_candidate=0,
        destination_blocks=(31,),
        row_start=0,
        row_blocks=(0, 0, 11, 31),
    )


def runner_with(rows: dict[str, list[int]], in_batch: list[str]) -> Any:
    """What ``write_row_v1`` uses of the V1 runner, around vLLM's own block tables."""
    tables = MultiGroupBlockTable(
        max_num_reqs=4,
        max_num_batched_tokens=8,
        pin_memory=False,
        device=torch.device("cpu"),
        block_sizes=[4],
        max_num_blocks=[8],
        **kernel_block_sizes([4]),
    )
    for i, request_id in enumerate(in_batch):
        tables.add_row((rows[request_id],), i)
    return SimpleNamespace(
        requests={key: SimpleNamespace(block_ids=(list(row),)) for key, row in rows.items()},
        input_batch=SimpleNamespace(
            req_id_to_index={key: i for i, key in enumerate(in_batch)}, block_table=tables
        ),
        prepare_inputs_event=None,
    )


def test_runner_v1_gets_the_row_in_its_state_and_in_its_batch(plan: RoundPlan) -> None:
    """Regression: row indices were computed before the batch was reordered."""
    rows = {"other": [21, 22], "planned": [11, 12, 13, 14, 15]}
    runner = runner_with(rows, ["other", "planned"])
    runner.input_batch.block_table.swap_row(0, 1)
    runner.input_batch.req_id_to_index = {"planned": 0, "other": 1}
    RowsV1(runner).write([plan])
    assert runner.requests["planned"].block_ids[0] == [0, 0, 11, 31, 15]
    assert runner.requests["other"].block_ids[0] == [21, 22]
    table = runner.input_batch.block_table[0].block_table.np
    assert np.array_equal(table[:2, :5], [[0, 0, 11, 31, 15], [21, 22, 0, 0, 0]])


def test_runner_v1_keeps_the_row_of_a_request_that_is_out_of_the_batch(plan: RoundPlan) -> None:
    rows = {"other": [21, 22], "planned": [11, 12, 13, 14, 15]}
    runner = runner_with(rows, ["other"])
    RowsV1(runner).write([plan])
    assert runner.requests["planned"].block_ids[0] == [0, 0, 11, 31, 15]
    assert runner.input_batch.block_table[0].block_table.np[0, :2].tolist() == [21, 22]


def test_runner_v1_waits_until_the_rows_of_the_step_before_are_uploaded(plan: RoundPlan) -> None:
    """Regression: a row was rewritten while the device could still be reading it."""
    runner = runner_with({"planned": [11, 12, 13, 14, 15]}, ["planned"])
    written = runner.input_batch.block_table[0].block_table.np
    waits: list[list[int]] = []
    runner.prepare_inputs_event = SimpleNamespace(
        synchronize=lambda: waits.append(written[0, :5].tolist())
    )
    RowsV1(runner).write([plan, plan])
    assert waits == [[11, 12, 13, 14, 15]], "one wait, before the first write"
    assert written[0, :5].tolist() == [0, 0, 11, 31, 15]


def test_runner_v1_records_that_event_behind_its_own_uploads() -> None:
    """vLLM's own method; what it yields to fills and uploads the rows."""
    calls: list[str] = []
    event = SimpleNamespace(
        synchronize=lambda: calls.append("wait"), record=lambda: calls.append("record")
    )
    runner: Any = SimpleNamespace(prepare_inputs_event=event)
    with GPUModelRunner.synchronize_input_prep(runner):
        calls.append("upload")
    assert calls == ["wait", "upload", "record"]


@pytest.mark.skipif(
    not BLOCKS_ARE_SPLIT_IN_GROUPS,
    reason="vLLM's staged rows need Triton, which its CPU build switches off through 0.31",
)
@pytest.mark.feature("Model runner V2", "not yet run on a GPU")
def test_runner_v2_applies_the_row_with_the_steps_own_appends() -> None:
    """And the requests of its rows are known from the batch itself. Regression: they were read from
    the metadata, which names none for hybrid models, nor before vLLM 0.30."""
    script = Path(__file__).with_name("rows_v2_script.py")
    one_group, two_groups = answer_of(script, environment=ON_TRITONS_INTERPRETER)
    for result in (one_group, two_groups):
        assert result["rows"] == [
            [91, 92, 93, 94, 95, 96],
            [0, 0, 11, 31, 15, 16],
            [0, 0, 51, 71, 55, 56],
        ]
        assert result["num_blocks"] == [6, 6, 6]
        assert result["slots"] == [96 * 4, 16 * 4 + 1, 56 * 4 + 2, -1]
        assert result["requests"] == [[], ["s", "q", "r"]]
    assert two_groups["other_group"][1] == [11, 12, 13, 14, 15, 16]
