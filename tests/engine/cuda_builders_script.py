"""Build vLLM's own CUDA attention metadata from compressed rows, without a GPU.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process, under
the Triton interpreter. Prints what each builder made.
"""

import json
import sys

import torch
import vllm.platforms

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from triattention_vllm.config import Settings  # noqa: E402
from triattention_vllm.engine.backends.flash_attn import (  # noqa: E402
    CompressedFlashAttentionBackend,
)
from triattention_vllm.engine.backends.triton_attn import CompressedTritonBackend  # noqa: E402
from triattention_vllm.engine.null_heads import NullHeads  # noqa: E402
from triattention_vllm.engine.spec import CompressedAttentionSpec  # noqa: E402


def batch() -> CommonAttentionMetadata:
    """Three decoding requests, two of them compressed, and a row of padding."""
    rows = [[0, 0, 0, 5, 6], [7, 8], [0, 9, 10]]
    table = torch.full((4, 8), 99, dtype=torch.int32)
    for table_row, row in zip(table, [*rows, [0] * 8], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor([79, 30, 48, 0], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=4,
        num_actual_tokens=3,
        max_query_len=1,
        max_seq_len=79,
        block_table_tensor=table,
        slot_mapping=torch.arange(3),
    )


def built(backend: type, config: object) -> dict[str, object]:
    """What the backend's builder makes of the batch; built twice, as for two steps."""
    base = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = CompressedAttentionSpec.from_full_attention(base, Settings(), 64)
    builder = backend.get_builder_cls()(spec, [], config, torch.device("cpu"))
    builder.null_heads = NullHeads(16)
    builder.null_heads.read_rows_with(lambda _: ["a", "b", "c"])
    builder.null_heads.begin_step({"a": 3, "c": 1})
    first, second = builder.build(0, batch()), builder.build(0, batch())
    needed = [2, 2, 2]
    return {
        "name": backend.get_name(),
        "rows": [row[:n].tolist() for row, n in zip(second.block_table, needed, strict=False)],
        "seq_lens": second.seq_lens.tolist(),
        "max_seq_len": second.max_seq_len,
        "slots": second.slot_mapping.tolist(),
        "same_memory": first.block_table.data_ptr() == second.block_table.data_ptr(),
        "goes_around_build": builder.supports_update_block_table,
        "fused_drafts": builder.supports_draft_decode_metadata_update,
    }


config = EngineArgs(sys.argv[1], max_model_len=2048).create_engine_config()
# What the CUDA builders ask of a device that is not there.
vllm.platforms.current_platform.num_compute_units = lambda *_: 108
config.scheduler_config.max_num_seqs = 4
with set_current_vllm_config(config):
    results = [
        built(backend, config)
        for backend in (CompressedTritonBackend, CompressedFlashAttentionBackend)
    ]
print(json.dumps(results))
