"""Attention reads rows without their null head, from buffers that stay where they are."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunnerV2
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.utils import AttentionGroup

from triattention_vllm.config import Settings
from triattention_vllm.engine.attention import ShiftedRows, unquantised
from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS
from triattention_vllm.engine.drafts import draft_attention_groups
from triattention_vllm.engine.null_heads import NullHeads
from triattention_vllm.engine.rows import RowsV2
from triattention_vllm.engine.spec import CompressedAttentionSpec
from triattention_vllm.engine.worker import CompressionGPUWorker

BLOCK_SIZE = 4
CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))


class StockBuilder:
    """In the place of vLLM's builder: gives back the metadata that it would build from."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec = kv_cache_spec

    def build(self, prefix: int, metadata: CommonAttentionMetadata, fast_build: bool) -> Any:
        return metadata


class Builder(ShiftedRows, StockBuilder):
    """The mixin in front of it."""


@pytest.fixture
def builder() -> Builder:
    base = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    spec = CompressedAttentionSpec.from_full_attention(base, Settings(), 16)
    return Builder(spec, [], CONFIG, torch.device("cpu"))


def metadata(rows: list[list[int]], seq_lens: list[int]) -> CommonAttentionMetadata:
    """A batch of rows that end in stale entries (99)."""
    table = torch.full((len(rows), 8), 99, dtype=torch.int32)
    for table_row, row in zip(table, rows, strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    starts = torch.arange(len(rows) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(rows),
        num_actual_tokens=len(rows),
        max_query_len=1,
        max_seq_len=max(seq_lens),
        block_table_tensor=table,
        slot_mapping=torch.arange(len(rows)),
    )


def host_knows(builder: Builder, of_request: dict[str, int], names: list[str]) -> None:
    builder.null_heads = NullHeads(BLOCK_SIZE)
    builder.null_heads.read_rows_with(lambda: names)
    builder.null_heads.begin_step(of_request)


def test_each_row_loses_its_null_head_and_as_many_tokens(builder: Builder) -> None:
    """Regression: a request that started before its compressed neighbour got its row shifted,
    and the step's own token was missing from the shortened length."""
    host_knows(builder, {"a": 2}, ["a", "b"])
    before = metadata([[0, 0, 7, 8], [3, 4, 5, 6]], [14, 16])
    after = builder.build(0, before)
    assert after.seq_lens.tolist() == [6, 16]
    assert after.block_table_tensor[0, :2].tolist() == [7, 8]
    assert after.block_table_tensor[1, :4].tolist() == [3, 4, 5, 6]
    assert before.block_table_tensor[0, :4].tolist() == [0, 0, 7, 8]
    assert before.seq_lens.tolist() == [14, 16]
    assert after.slot_mapping is before.slot_mapping


def test_the_host_bounds_shrink_with_the_rows_and_stay_bounds(builder: Builder) -> None:
    host_knows(builder, {"a": 3, "b": 1, "gone": 5}, ["a", "b"])
    after = builder.build(0, metadata([[0, 0, 0, 7, 8], [0, 4, 5]], [18, 11]))
    assert after.seq_lens_cpu_upper_bound.tolist() == after.seq_lens.tolist() == [6, 7]
    assert after.max_seq_len == 7


def test_without_null_heads_every_value_is_vllms(builder: Builder) -> None:
    before = metadata([[1, 2], [3, 4]], [7, 8])
    after = builder.build(0, before)
    assert after.seq_lens.tolist() == [7, 8]
    assert after.max_seq_len == before.max_seq_len
    assert after.seq_lens_cpu_upper_bound is before.seq_lens_cpu_upper_bound


def test_captured_graphs_find_every_step_in_the_same_memory(builder: Builder) -> None:
    first = builder.build(0, metadata([[1], [2]], [4, 4]))
    second = builder.build(0, metadata([[0, 5], [6]], [8, 2]))
    assert first.block_table_tensor.data_ptr() == second.block_table_tensor.data_ptr()
    assert first.seq_lens.data_ptr() == second.seq_lens.data_ptr()
    assert first.seq_lens.tolist() == [4, 2]


def test_dummy_rows_of_a_capture_keep_at_least_one_token(builder: Builder) -> None:
    after = builder.build(0, metadata([[0, 0, 0, 0], [0]], [16, 1]))
    assert after.seq_lens.tolist() == [4, 1]
    assert after.max_seq_len == 16


def test_a_group_that_is_not_compressed_is_built_as_it_is() -> None:
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    builder = Builder(spec, [], CONFIG, torch.device("cpu"))
    before = metadata([[0, 5]], [7])
    assert builder.build(0, before) is before


def test_padding_rows_have_no_null_head_on_the_host(builder: Builder) -> None:
    host_knows(builder, {"a": 1}, ["a"])
    nulls = builder.null_heads.of_rows(metadata([[0, 5], [0], [0]], [7, 1, 1]))
    assert np.array_equal(nulls, [1, 0, 0])
    builder.null_heads.begin_step({})
    assert not builder.null_heads.of_rows(metadata([[0, 5]], [7])).any()


class SplittingBackend:
    """Takes kernel blocks of BLOCK_SIZE alone."""

    @staticmethod
    def get_supported_kernel_block_sizes(spec: Any) -> list[int]:
        return [BLOCK_SIZE]

    @staticmethod
    def get_builder_cls() -> type[StockBuilder]:
        return type("B", (Builder,), {"requires_block_table_width": False})


def split_group(manager_block_size: int) -> AttentionGroup:
    """vLLM's own, whose kernel takes smaller blocks than the manager's."""
    base = FullAttentionSpec(
        block_size=manager_block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    spec = CompressedAttentionSpec.from_full_attention(base, Settings(), 16)
    config = SimpleNamespace(
        scheduler_config=CONFIG.scheduler_config,
        model_config=SimpleNamespace(max_model_len=64),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    group = AttentionGroup(SplittingBackend, ["layer"], spec, 0)
    group.create_metadata_builders(config, torch.device("cpu"), kernel_block_size=BLOCK_SIZE)
    return group


@pytest.mark.skipif(
    not BLOCKS_ARE_SPLIT_IN_GROUPS, reason="refused before vLLM 0.32, whose rows differ"
)
def test_rows_of_blocks_that_vllm_splits_lose_every_part_of_a_null_block() -> None:
    """vLLM's own attention group maps rows of the manager's blocks to kernel blocks: a null block
    becomes entries 0 and 1, and block b becomes 2b and 2b + 1."""
    manager = 2 * BLOCK_SIZE
    group = split_group(manager)
    (split,) = group.metadata_builders
    assert split.kv_cache_spec.block_size == BLOCK_SIZE
    split.null_heads = NullHeads(manager)
    split.null_heads.read_rows_with(lambda: ["a", "b"])
    split.null_heads.begin_step({"a": 2})
    after = group.build_metadata(metadata([[0, 0, 3, 5], [1, 2]], [29, 10]))
    assert after.seq_lens.tolist() == after.seq_lens_cpu_upper_bound.tolist() == [13, 10]
    assert after.max_seq_len == 13
    assert after.block_table_tensor[0, :4].tolist() == [6, 7, 10, 11]
    assert after.block_table_tensor[1, :3].tolist() == [2, 3, 4]


@pytest.mark.skipif(
    not BLOCKS_ARE_SPLIT_IN_GROUPS, reason="refused before vLLM 0.32, whose rows differ"
)
def test_the_draft_model_of_model_runner_v2_loses_whole_null_blocks_too() -> None:
    """Regression: its groups were not told the size of the manager's blocks, so that it read the
    null block's second half as tokens. vLLM's classes without what needs a GPU."""
    manager = 2 * BLOCK_SIZE
    groups = [split_group(manager) for _ in ("model", "draft")]
    worker = CompressionGPUWorker.__new__(CompressionGPUWorker)
    worker.model_runner = ModelRunnerV2.__new__(ModelRunnerV2)
    worker.model_runner.attn_groups = [[groups[0]]]
    worker.model_runner.speculator = EagleSpeculator.__new__(EagleSpeculator)
    worker.model_runner.speculator.attn_groups = [[groups[1]]]
    worker.rows, worker.null_heads = RowsV2(worker.model_runner), {}
    worker._share_null_heads()
    worker.null_heads[0].begin_step({"a": 2})
    after = groups[1].build_metadata(metadata([[0, 0, 3, 5], [1, 2]], [29, 10]))
    assert after.seq_lens.tolist() == [13, 10]
    assert after.block_table_tensor[0, :4].tolist() == [6, 7, 10, 11]
    worker.model_runner.speculator = None
    assert draft_attention_groups(worker.model_runner) == []


def test_quantised_queries_are_observed_as_the_model_computed_them() -> None:
    """Statistics made while the KV cache is fp8 are those of any other."""
    query = torch.tensor([[[1.0, -2.0], [4.0, 8.0]]])
    assert unquantised(query, torch.tensor(5.0)) is query
    stored = query.to(torch.float8_e4m3fn)
    assert torch.equal(unquantised(stored, torch.tensor(0.5)), 0.5 * query)
    by_head = unquantised(stored, torch.tensor([0.5, 2.0]))
    assert by_head.tolist() == [[[0.5, -1.0], [8.0, 16.0]]]
