"""The installed vLLM against the table of docs/seams.md: what is there, what we override."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_flashinfer
from seams_table import KNOWN_LINES, Seam, versions
from vllm_source import Source

PLUGIN = Path(__file__).parents[2] / "triattention_vllm"

with fake_flashinfer.installed():
    # Imports the package flashinfer, which is not there; everything else in it is vLLM's own.
    importlib.import_module("vllm.v1.attention.backends.flashinfer")


def resolve(module: str, qualname: str) -> Any:
    """The object behind a dotted name, walked attribute by attribute."""
    target: Any = importlib.import_module(module)
    for name in qualname.split(".") if qualname else []:
        target = getattr(target, name)
    return target


def owner_and_name(seam: Seam) -> tuple[Any, str]:
    parent, _, name = seam.qualname.rpartition(".")
    return resolve(seam.module, parent), name


def own_members(cls: type, name: str) -> list[object]:
    """What the class and its bases define under a name, nearest first."""
    return [vars(base)[name] for base in cls.__mro__ if name in vars(base)]


@cache
def syntax_of(source: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(source)))


def assigned_attributes(source: Any) -> Iterator[tuple[str, str]]:
    """(object, attribute) of every assignment and annotation to an attribute in the source."""
    for node in ast.walk(syntax_of(source)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                    yield part.value.id, part.attr


def registered_buffers(source: Any) -> Iterator[str]:
    for node in ast.walk(syntax_of(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value)


def is_instance_attribute(cls: type, name: str) -> bool:
    """Whether a method of the class or of a base sets ``self.name``, or the class annotates it."""
    for base in cls.__mro__:
        if not base.__module__.startswith("vllm"):
            continue
        if name in inspect.get_annotations(base) or name in registered_buffers(base):
            return True
        if ("self", name) in assigned_attributes(base):
            return True
    return False


def is_class(seam: Seam) -> bool:
    return inspect.isclass(resolve(seam.module, seam.qualname))


def is_function(seam: Seam) -> bool:
    target = resolve(seam.module, seam.qualname)
    return callable(target) and not inspect.isclass(target)


def is_constant(seam: Seam) -> bool:
    target = resolve(seam.module, seam.qualname)
    return not callable(target) and not isinstance(target, ModuleType)


def is_method(seam: Seam) -> bool:
    cls, name = owner_and_name(seam)
    return inspect.isclass(cls) and bool(own_members(cls, name)) and callable(getattr(cls, name))


def is_property(seam: Seam) -> bool:
    cls, name = owner_and_name(seam)
    return isinstance(next(iter(own_members(cls, name)), None), property | cached_property)


def is_field(seam: Seam) -> bool:
    cls, name = owner_and_name(seam)
    return name in {field.name for field in dataclasses.fields(cls)}


def is_attribute(seam: Seam) -> bool:
    return is_instance_attribute(*owner_and_name(seam))


def is_parameter(seam: Seam) -> bool:
    function, name = owner_and_name(seam)
    return name in inspect.signature(function).parameters


def is_assignment(seam: Seam) -> bool:
    function, name = owner_and_name(seam)
    return any(attr == name and of != "self" for of, attr in assigned_attributes(function))


KINDS: dict[str, Callable[[Seam], bool]] = {
    "class": is_class,
    "function": is_function,
    "constant": is_constant,
    "method": is_method,
    "property": is_property,
    "field": is_field,
    "attribute": is_attribute,
    "parameter": is_parameter,
    "assignment": is_assignment,
}


def is_there(seam: Seam) -> bool:
    """Whether the installed vLLM has the symbol, and it is what its row says."""
    try:
        return KINDS[seam.kind](seam)
    except (AttributeError, ModuleNotFoundError):
        return False


def installed_line() -> tuple[int, int]:
    """A line that nobody knows yet is held against the rows of the newest known one."""
    line = versions.line_of_behaviour(versions.vllm_version())
    return line if line in KNOWN_LINES else max(KNOWN_LINES)


@cache
def installed_source() -> Source:
    return Source(Path(str(importlib.util.find_spec("vllm").origin)).parents[1])


def overrides() -> Iterator[tuple[type, type, str]]:
    """(our class, the class of vLLM, name) of every method of vLLM that we override."""
    for path in sorted((PLUGIN / "engine").rglob("*.py")):
        inner = path.relative_to(PLUGIN.parent).with_suffix("")
        module = importlib.import_module(".".join(inner.parts))
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            foreign = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]
            # A class of ours in front of one of vLLM's overrides for it.
            ours = [base for base in cls.__mro__ if base.__module__.startswith(PLUGIN.name)]
            members = {
                name: member for base in reversed(ours) for name, member in vars(base).items()
            }
            for name, member in members.items():
                base = next((base for base in foreign if name in vars(base)), None)
                written = inspect.isroutine(member) and not name.startswith("__")
                if base is not None and written:
                    yield cls, base, name


def named(function: Callable[..., Any]) -> tuple[list[tuple[str, int]], bool]:
    """(name and kind of each named parameter, whether it also takes all others)."""
    kinds = [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
    others = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    passes_on = others <= {kind for _, kind in kinds}
    return [pair for pair in kinds if not passes_on or pair[1] not in others], passes_on
