"""Compile Triton kernels for GPUs that are not here, exactly as their launchers launch them."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Resources:
    """What one program takes. Registers per thread, the others in bytes."""

    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @cached_property
    def source(self) -> ASTSource:
        """The kernel specialised for these arguments by Triton's rules: 1 becomes a constant,
        multiples of 16 are known as such, and pointers to them (allocations are 256-byte aligned).
        """
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: dict[tuple[int, ...], Any] = {}
        names = self.kernel.arg_names
        by_name = dict(zip(names, self.arguments, strict=False)) | self.options
        for idx, name in enumerate(names):
            value = by_name[name]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTER_TYPES[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
                continue
            elif self.kernel.params[idx].do_not_specialize:
                signature[name] = "i32"
                continue
            elif self.kernel.params[idx].is_constexpr or value == 1:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
            if _place(value) % 16 == 0:
                divisible[idx,] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, divisible)

    @property
    def key(self) -> str:
        """The same for launches that compile to the same code."""
        return f"{self.source.hash()}-{self.options['num_warps']}"

    def program(self, target: GPUTarget) -> Any:
        """The compiled kernel."""
        options = {"num_warps": self.options["num_warps"]}
        return triton.compile(self.source, target=target, options=options)

    def compiled(self, target: GPUTarget) -> Resources:
        """Compile for ``target`` and read what the program takes."""
        program = self.program(target)
        if target.backend == "hip":
            return _of_amdgcn(program.asm["amdgcn"], program.metadata.shared)
        return _of_cubin(program.asm["cubin"], program.metadata.shared)


def _place(value: torch.Tensor | int) -> int:
    """Of a tensor, bytes from the start of its allocation."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size()
    return value


@dataclass
class _Recorder:
    kernel: Any
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return record


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Inside, launches of the modules' kernels (functions ``*_kernel``) are recorded only."""
    launches: list[Launch] = []
    found = [
        (module, name, getattr(module, name))
        for module in modules
        for name in vars(module)
        if name.endswith("_kernel")
    ]
    assert found
    for module, name, kernel in found:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)


def _of_cubin(cubin: bytes, shared: int) -> Resources:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing)
    assert usage is not None, listing
    registers, stack, local = map(int, usage.groups())
    return Resources(registers, shared, stack + local)


def _of_amdgcn(assembly: str, shared: int) -> Resources:
    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    # Scalars that do not fit lie in lanes of vector registers, which are counted as such.
    spilled = 4 * count("vgpr_spill_count") + count("private_segment_fixed_size")
    return Resources(count("vgpr_count"), shared, spilled)
