"""Build vLLM's own GPU attention metadata from compressed rows, without a GPU.

vLLM's CPU build switches Triton off when it is imported, so this runs in its own process, under
the Triton interpreter. Prints what each builder made, in the order of the names given.
"""

import json
import sys
from typing import Any

import torch
import vllm.platforms
from torch.utils._python_dispatch import TorchDispatchMode

assert vllm.platforms.current_platform.is_cpu()
vllm.platforms.vllm_version_matches_substr = lambda _: False

import fake_flashinfer  # noqa: E402
from ahead_of_time import recorded  # noqa: E402
from triattention_kernels import shift, shift_triton  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.config.compilation import CUDAGraphMode  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends import flash_attn  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from triattention_vllm.config import Settings  # noqa: E402
from triattention_vllm.engine.attention import BACKENDS  # noqa: E402
from triattention_vllm.engine.null_heads import NullHeads  # noqa: E402
from triattention_vllm.engine.spec import CompressedAttentionSpec  # noqa: E402

ROWS = [[0, 0, 0, 5, 6], [7, 8], [0, 9, 10]]
SEQ_LENS = [79, 30, 48, 0]
NULL_HEADS = {"a": 3, "c": 1}
FA3_SCHEDULES: list[dict[str, Any]] = []


def batch(device: str = "cpu", query_lens: tuple[int, ...] = (1, 1, 1, 0)) -> Any:
    """Three requests, two of them compressed, and a row of padding.

    On device "meta" nothing can be read from the tensors that would be on a GPU.
    """
    table = torch.full((4, 8), 99, dtype=torch.int32)
    for table_row, row in zip(table, [*ROWS, [0] * 8], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=4,
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=79,
        block_table_tensor=table.to(device),
        slot_mapping=torch.arange(sum(query_lens)).to(device),
        is_prefilling=torch.tensor(query_lens) > 1,
    )


class Layer(AttentionLayerBase):
    """What FlashInfer's builder asks of a layer."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.num_heads = backend, 4
        self.impl = backend.get_impl_cls()(4, 64, 0.125, 2, None, None, "auto")

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None


def make_builder(builder_class: type, config: Any, device: str) -> Any:
    """A builder of a compressed group."""
    dtype = config.model_config.dtype
    base = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=dtype)
    spec = CompressedAttentionSpec.from_full_attention(base, Settings(), 64)
    return builder_class(spec, ["layer"], config, torch.device(device))


def knowing_null_heads(builder: Any) -> Any:
    """Ours, in a step whose null heads are known."""
    builder.null_heads = NullHeads(16)
    builder.null_heads.read_rows_with(lambda: ["a", "b", "c"])
    builder.null_heads.begin_step(NULL_HEADS)
    return builder


class Allocations(TorchDispatchMode):
    """Counts new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata
            for tensor in (*args, *(kwargs or {}).values())
            if isinstance(tensor, torch.Tensor)
        }
        outputs = made if isinstance(made, tuple | list) else [made]
        for tensor in outputs:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.device.type == "meta"
                and tensor.untyped_storage()._cdata not in given
            ):
                self.names.append(str(function))
        return made


def allocated(builder: Any) -> list[str]:
    """What a second build allocates on the device."""
    builder.build(0, batch("meta"))
    again, allocations = batch("meta"), Allocations()
    with allocations:
        builder.build(0, again)
    return allocations.names


def without_reading(ours: type, plain: type, config: Any) -> dict[str, Any]:
    """Build twice and for a capture where nothing on the device can be read: launches of a build,
    and what it allocates beside vLLM's own."""
    original, shift.choose = shift.choose, lambda *_: "triton"
    with recorded(shift_triton) as launches:
        builder = knowing_null_heads(make_builder(ours, config, "meta"))
        allocations = allocated(builder)
        num_launches = len(launches) / 2
        builder.null_heads.begin_step({})
        builder.build_for_cudagraph_capture(batch("meta"))
    shift.choose = original
    vllms = allocated(make_builder(plain, config, "meta"))
    return {"launches": num_launches, "allocations": allocations, "vllms_allocations": vllms}


def built(name: str, config: Any, plans: list[Any]) -> dict[str, Any]:
    """What the backend's builder makes of the batch; built twice, as for two steps."""
    backend = resolve_obj_by_qualname(BACKENDS[AttentionBackendEnum[name]])
    if name == "FLASHINFER":
        config.compilation_config.static_forward_context["layer"] = Layer(backend)
    ours = backend.get_builder_cls()
    builder = knowing_null_heads(make_builder(ours, config, "cpu"))
    plain = backend.__mro__[2].get_builder_cls()
    spec = builder.kv_cache_spec
    result: dict[str, Any] = {
        "cudagraph_support_kept": builder.get_cudagraph_support(config, spec)
        == plain.get_cudagraph_support(config, spec),
        "goes_around_build": builder.supports_update_block_table,
        "fused_drafts": builder.supports_draft_decode_metadata_update,
    }
    plans.clear()
    FA3_SCHEDULES.clear()
    first, second = builder.build(0, batch()), builder.build(0, batch())
    if name == "FLASHINFER":
        result["decode"] = plans[-1]
        plans.clear()
        builder.build(0, batch(query_lens=(1, 1, 7, 0)))
        result["mixed"] = list(plans)
        return result
    drafted = builder.build_for_drafting(batch(), 1)
    rows = second.block_table
    result |= {
        "rows": [row[:2].tolist() for row in rows[:3]],
        "seq_lens": second.seq_lens.tolist(),
        "max_seq_len": second.max_seq_len,
        "slots": second.slot_mapping.tolist(),
        "same_memory": len({m.block_table.data_ptr() for m in (first, second, drafted)}) == 1
        and len({m.seq_lens.data_ptr() for m in (first, second, drafted)}) == 1,
        "drafted": drafted.seq_lens.tolist(),
        "fa3": [
            (s["max_seqlen_k"], s["cache_seqlens"].data_ptr() == second.seq_lens.data_ptr())
            for s in FA3_SCHEDULES
        ],
    }
    builder.null_heads.begin_step({})
    captured = builder.build_for_cudagraph_capture(batch())
    result["captured_same_memory"] = captured.block_table.data_ptr() == rows.data_ptr()
    return result | without_reading(ours, plain, config)


def schedule(**arguments: Any) -> torch.Tensor:
    """In the place of FlashAttention 3's compiled scheduler."""
    FA3_SCHEDULES.append(arguments)
    return torch.zeros(5, dtype=torch.int32, device=arguments["cache_seqlens"].device)


names = sys.argv[2:]
plans = fake_flashinfer.install()
config = EngineArgs(sys.argv[1], max_model_len=2048).create_engine_config()
config.scheduler_config.max_num_seqs = 4
config.cache_config.kv_cache_layout = "LBNHC"
config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
config.compilation_config.cudagraph_capture_sizes = [1, 2, 4]
config.compilation_config.max_cudagraph_capture_size = 4
# What the builders ask of a device and of its libraries that are not there.
vllm.platforms.current_platform.num_compute_units = lambda *_: 108
flash_attn.get_flash_attn_version = lambda **_: 3
flash_attn.get_scheduler_metadata = schedule
config.attention_config.use_trtllm_attention = False  # asks the network otherwise
with set_current_vllm_config(config):
    results = {name: built(name, config, plans) for name in names}
    for version in (2, 4):
        flash_attn.get_flash_attn_version = lambda version=version, **_: version
        results[f"FLASH_ATTN {version}"] = built("FLASH_ATTN", config, plans)
    print(json.dumps(results, default=str))
