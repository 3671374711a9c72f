"""Every kernel compiles for every GPU that we name, and none of them spills.

The launchers run on tensors without memory (device "meta"), which also proves that nothing on
the host depends on what is on the device.
"""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from triattention_kernels import PagedKV, Repeats, RoundBatch, fill_holes

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import TARGETS, Launch, recorded
from triattention_kernels import (
    compact_triton,
    fill_holes_triton,
    score_triton,
    select_triton,
    shift_triton,
    statistics_triton,
)

KERNEL_MODULES = (
    compact_triton,
    fill_holes_triton,
    score_triton,
    select_triton,
    shift_triton,
    statistics_triton,
)
MODES = ("per_head", "per_layer_per_head", "union")

# Layers, query heads, KV heads, head dim.
MODELS = {
    "Qwen3-8B": (36, 32, 8, 128),
    "Qwen3-32B": (64, 64, 8, 128),
    "Llama-3.1-8B": (32, 32, 8, 128),
    "gpt-oss-20b": (12, 64, 8, 64),
}
NUM_REQUESTS, BLOCK_SIZE = 64, 16
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99, "gfx942": 64}
"""Shared memory that one program may have."""


def make_kv(shape: tuple[int, int, int, int], block_size: int = BLOCK_SIZE) -> PagedKV:
    num_layers, _, num_kv_heads, head_dim = shape
    size = (num_layers, 1000, block_size, num_kv_heads, 2 * head_dim)
    return PagedKV.from_blocks(torch.empty(size, dtype=torch.bfloat16).transpose(2, 3))


def quantised_kvs(shape: tuple[int, int, int, int]) -> list[PagedKV]:
    """fp8 keys and values without scales, and int8 ones with a scale of every token and head."""
    num_layers, _, num_kv_heads, head_dim = shape
    size = (num_layers, 1000, BLOCK_SIZE, num_kv_heads)
    fp8 = torch.empty(*size, 2 * head_dim, dtype=torch.float8_e4m3fn)
    int8 = torch.empty(*size, 2 * (head_dim + 4), dtype=torch.int8)
    return [
        PagedKV.from_blocks(fp8.transpose(2, 3)),
        PagedKV.from_scaled_blocks(int8.transpose(2, 3), torch.int8),
    ]


def make_batch(num_requests: int = NUM_REQUESTS, num_blocks: int = 136) -> RoundBatch:
    return RoundBatch(
        torch.empty(num_requests, num_blocks, dtype=torch.int64),
        torch.empty(num_requests, max(1, num_blocks - 8), dtype=torch.int64),
        (num_blocks,) * num_requests,
        (max(1, num_blocks - 8),) * num_requests,
        (0,) * num_requests,
        moves_forward=True,
    )


def make_weights(
    num_requests: int, num_layers: int, num_heads: int, head_dim: int, rotary_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    turns = torch.empty(num_requests, 1, rotary_dim // 2, dtype=torch.complex64)
    return (
        torch.empty(num_layers, num_heads, head_dim),
        torch.empty(num_layers, num_heads, rotary_dim // 2),
        turns.expand(-1, num_layers, -1),
    )


def round_launches(
    kv: PagedKV, batch: RoundBatch, num_heads: int, mode: str, fills_holes: bool = False
) -> list[Launch]:
    """The launches of one batch of rounds, and nothing else; with redundancy where order stays."""
    repeats = None if fills_holes else Repeats(kv, 0.5)
    sizes = (batch.num_requests, kv.num_layers, num_heads, kv.head_dim)
    weights = make_weights(*sizes, rotary_dim=kv.head_dim // 2 * 2)
    with recorded(*KERNEL_MODULES) as launches:
        scores = score_triton.score(kv, batch, *weights, False, kv.head_dim // 2 * 2)
        size = (kv.block_size, kv.num_kv_heads)
        kept = select_triton.select(scores, batch, *size, mode, repeats)
        if fills_holes:
            kept = fill_holes(kept, batch, kv.block_size)
        compact_triton.compact(kv, batch, kept)
    return launches


def shift_launches(num_rows: int, num_columns: int) -> list[Launch]:
    tables = [torch.empty(num_rows, num_columns, dtype=torch.int32) for _ in range(2)]
    lengths = [torch.empty(num_rows, dtype=torch.int32) for _ in range(2)]
    with recorded(shift_triton) as launches:
        shift_triton.shift_rows(tables[0], lengths[0], BLOCK_SIZE, tables[1], lengths[1], 1)
    return launches


def all_launches(model: str) -> list[Launch]:
    shape = MODELS[model]
    launches = shift_launches(256, 8192)
    for mode, fills_holes in product(MODES, (False, True)):
        launches += round_launches(make_kv(shape), make_batch(), shape[1], mode, fills_holes)
    through_scratch = replace(make_batch(), moves_forward=False)
    launches += round_launches(make_kv(shape), through_scratch, shape[1], "per_head")
    if model == "Qwen3-8B":
        for kv in quantised_kvs(shape):
            launches += round_launches(kv, make_batch(), shape[1], "per_head")
    return launches


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    """Tensors have shapes only; what is compiled stays in this repository's cache folder."""
    folder = Path(__file__).parents[2] / ".cache" / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with torch.device("meta"):
        yield


@pytest.fixture
def for_target(request, monkeypatch):
    """The target of that name; launchers ask torch which vendor's GPU they run on."""
    target = TARGETS[request.param]
    monkeypatch.setattr(torch.version, "hip", "6.4" if target.backend == "hip" else None)
    return target


@pytest.mark.parametrize("for_target", TARGETS, indirect=True)
def test_every_kernel_compiles_without_a_spill(for_target, record_property):
    seen = {}
    for model in MODELS:
        for launch in all_launches(model):
            seen.setdefault(launch.key, (model, launch))
    assert {launch.kernel.__name__ for _, launch in seen.values()} == {
        "compact_kernel",
        "fill_kernel",
        "keep_kernel",
        "ranking_kernel",
        "score_kernel",
        "shift_kernel",
        "statistics_and_redundancy_kernel",
        "statistics_kernel",
    }
    for model, launch in seen.values():
        found = launch.compiled(for_target)
        name = launch.kernel.__name__
        record_property(f"{name} {model}", str(found))
        assert found.spilled == 0, (name, model, found)
        assert found.shared <= SHARED_KIB[for_target.arch] * 1024, (name, model, found)
        assert 0 < found.registers <= 255, (name, model, found)


@pytest.mark.parametrize("for_target", ["sm_90"], indirect=True)
def test_sizes_of_one_compile_too(for_target):
    """Triton makes an argument of 1 a constant, which is another type inside a kernel."""
    kv = make_kv((1, 1, 1, 1), block_size=1)
    batch = make_batch(1, 1)
    launches = shift_launches(1, 1)
    for mode, fills_holes in product(MODES, (False, True)):
        launches += round_launches(kv, batch, 1, mode, fills_holes)
    launches += round_launches(kv, replace(batch, moves_forward=False), 1, "union")
    for launch in {launch.key: launch for launch in launches}.values():
        assert launch.compiled(for_target).spilled == 0


def small_kv(dtype: torch.dtype, head_dim: int) -> PagedKV:
    """Two layers of 8 KV heads; int8 with scales."""
    if dtype == torch.int8:
        blocks = torch.empty(2, 100, 8, BLOCK_SIZE, 2 * (head_dim + 4), dtype=dtype)
        return PagedKV.from_scaled_blocks(blocks, dtype)
    return PagedKV.from_blocks(torch.empty(2, 100, 8, BLOCK_SIZE, 2 * head_dim, dtype=dtype))


def score_launch(
    dtype: torch.dtype, group: int, head_dim: int, rotary_dim: int, interleaved: bool
) -> Launch:
    kv = small_kv(dtype, head_dim)
    weights = make_weights(NUM_REQUESTS, 2, 8 * group, head_dim, rotary_dim)
    with recorded(score_triton) as launches:
        score_triton.score(kv, make_batch(), *weights, interleaved, rotary_dim)
    return launches[0]


# NVIDIA and AMD write e4m3 differently.
E4M3 = {"cuda": torch.float8_e4m3fn, "hip": torch.float8_e4m3fnuz}


@pytest.mark.parametrize("for_target", TARGETS, indirect=True)
@pytest.mark.parametrize(
    "key",
    [torch.float32, torch.bfloat16, torch.float16, "e4m3", torch.float8_e5m2, torch.int8],
)
@pytest.mark.parametrize(
    ("group", "head_dim", "rotary_dim", "interleaved"),
    [(1, 64, 64, False), (3, 80, 32, True), (5, 96, 0, False), (16, 256, 64, True)],
)
def test_every_kind_of_score_compiles(for_target, key, group, head_dim, rotary_dim, interleaved):
    dtype = E4M3[for_target.backend] if key == "e4m3" else key
    launch = score_launch(dtype, group, head_dim, rotary_dim, interleaved)
    assert launch.compiled(for_target).spilled == 0


@pytest.mark.parametrize("for_target", ["sm_90", "sm_100"], indirect=True)
@pytest.mark.parametrize(("group", "head_dim"), [(16, 256), (64, 128), (64, 256)])
def test_many_query_heads_of_large_head_dims_compile(for_target, group, head_dim):
    """Regression: on sm_100, 64 heads of head dim 256 took 784 of 512 columns of the memory of
    tensor cores, and spilled elsewhere."""
    launch = score_launch(torch.bfloat16, group, head_dim, head_dim, interleaved=False)
    assert launch.compiled(for_target).spilled == 0
    assert launch.program(for_target).metadata.tmem_size <= 512


@pytest.mark.parametrize("for_target", TARGETS, indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float32, 64),
        (torch.float16, 80),
        ("e4m3", 256),
        (torch.int8, 128),
    ],
)
def test_every_kind_of_redundancy_compiles(for_target, dtype, head_dim):
    dtype = E4M3[for_target.backend] if dtype == "e4m3" else dtype
    kv, batch = small_kv(dtype, head_dim), make_batch()
    scores = torch.empty(NUM_REQUESTS, 2, 8, 136 * BLOCK_SIZE)
    with recorded(statistics_triton) as launches:
        statistics_triton.statistics(scores, batch, BLOCK_SIZE, 8, Repeats(kv, 0.5))
    (launch,) = launches
    found = launch.compiled(for_target)
    assert found.spilled == 0, found
    assert found.shared <= SHARED_KIB[for_target.arch] * 1024, found


@pytest.mark.parametrize("for_target", ["gfx942"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fnuz])
def test_the_layout_of_rocm_compiles(for_target, dtype):
    size = (36, 1000, 2, BLOCK_SIZE, 8 * 128)
    kv = PagedKV.from_rocm_layout(torch.empty(size, dtype=dtype), 8)
    for launch in round_launches(kv, make_batch(), 32, "per_head"):
        if launch.kernel.__name__ not in ("ranking_kernel", "keep_kernel"):
            assert launch.compiled(for_target).spilled == 0


@pytest.mark.parametrize("for_target", ["sm_90"], indirect=True)
def test_keys_and_moved_tokens_travel_sixteen_bytes_at_a_time(for_target):
    for launch in round_launches(make_kv(MODELS["Qwen3-8B"]), make_batch(), 32, "per_head"):
        code = launch.program(for_target).asm["ptx"]
        if launch.kernel.__name__ == "score_kernel":
            assert code.count("ld.global.v4.b32") >= 8
            assert "tf32" in code  # on tensor cores
        if launch.kernel.__name__ == "statistics_and_redundancy_kernel":
            assert "cp.async.cg.shared.global" in code  # sixteen bytes each
            assert "wgmma" in code
        if launch.kernel.__name__ == "compact_kernel":
            assert code.count("ld.global.v2.b64") == code.count("st.global.v2.b64") > 0
            assert "bar.sync" in code


@pytest.mark.parametrize("for_target", ["sm_90"], indirect=True)
def test_keys_of_one_byte_are_read_several_at_a_time(for_target):
    for kv in quantised_kvs(MODELS["Qwen3-8B"]):
        launch = round_launches(kv, make_batch(), 32, "per_head")[0]
        assert launch.kernel.__name__ == "score_kernel"
        assert "ld.global.b8" not in launch.program(for_target).asm["ptx"]


def test_rounds_of_every_size_run_the_same_code():
    """Otherwise some round would wait for a compiler while requests are served."""
    kv, keys = make_kv(MODELS["Qwen3-8B"]), set()
    for num_requests, num_blocks in ((1, 1), (1, 2), (2, 16), (3, 137), (16, 2048), (1, 4096)):
        batch = make_batch(num_requests, num_blocks)
        launches = round_launches(kv, batch, 32, "per_head", fills_holes=True)
        launches += round_launches(kv, batch, 32, "per_head")
        keys.add(tuple(launch.key for launch in launches))
    assert len(keys) == 1
    assert len({shift_launches(16, width)[0].key for width in (16, 8192)}) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fills_holes", [False, True])
def test_a_round_of_many_requests_is_at_most_six_launches(mode, fills_holes):
    kv = make_kv(MODELS["Qwen3-8B"])
    launches = round_launches(kv, make_batch(), 32, mode, fills_holes)
    assert len(launches) == (6 if fills_holes else 5)
    through_scratch = replace(make_batch(), moves_forward=False)
    assert len(round_launches(kv, through_scratch, 32, mode)) == 6
    assert len(shift_launches(256, 8192)) == 1


def test_the_number_of_launches_does_not_grow_with_requests_or_layers():
    few = round_launches(make_kv((1, 32, 8, 128)), make_batch(1), 32, "per_head")
    many = round_launches(make_kv((64, 32, 8, 128)), make_batch(128), 32, "per_head")
    assert len(few) == len(many)
