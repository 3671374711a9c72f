"""docs/seams.md names what this package touches in vLLM: all of it, and nothing that is gone."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the seams are those of an installed vLLM")

ROOT = Path(__file__).parents[2]
SEAMS = ROOT / "docs" / "seams.md"
PLUGIN = ROOT / "triattention_vllm"
COLUMNS = ["kind", "symbol", "what we do with it, and why", "verified", "proved by", "goes"]
UNPROVED = "name only"


@dataclass(frozen=True)
class Seam:
    """One symbol of one row: ``module:qualname``, and the row's other columns."""

    kind: str
    module: str
    qualname: str
    verified: str
    proved_by: str

    def __str__(self) -> str:
        return f"{self.module}:{self.qualname}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def symbols(cell: str) -> Iterator[tuple[str, str]]:
    """(module, qualname) of each backticked name; ``.name`` is a sibling of the first."""
    first, *others = re.findall(r"`([^`]+)`", cell)
    module, qualname = first.split(":")
    yield module, qualname
    parent = qualname.rpartition(".")[0]
    for other in others:
        assert other.startswith("."), f"{other} in {cell!r}: give siblings of the first name"
        yield module, f"{parent}{other}" if parent else other.removeprefix(".")


@cache
def seams() -> list[Seam]:
    """Every symbol in the table of docs/seams.md."""
    lines = [line for line in SEAMS.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = map(cells, lines)
    assert header == COLUMNS
    found = []
    for row in rows:
        assert len(row) == len(COLUMNS), f"this row has {len(row)} columns: {row[:2]}"
        kind, cell, why, verified, proved_by, goes = row
        assert why, f"{cell}: say what is done with it and why"
        assert goes, f"{cell}: say when it can go"
        found += [Seam(kind, *symbol, verified, proved_by) for symbol in symbols(cell)]
    return found


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


@pytest.mark.parametrize("seam", seams(), ids=str)
def test_every_symbol_of_the_table_is_in_the_installed_vllm(seam: Seam) -> None:
    assert seam.kind in KINDS, f"kind {seam.kind!r} is unknown; known are {sorted(KINDS)}"
    assert KINDS[seam.kind](seam), f"{seam} is no {seam.kind} of the installed vLLM"


def test_a_symbol_stands_in_the_table_once() -> None:
    listed = [(seam.kind, str(seam)) for seam in seams()]
    assert len(listed) > 200
    assert sorted(listed) == sorted(set(listed))


def test_a_symbol_that_is_gone_is_noticed() -> None:
    """Each check against a name that the class of the row does not have."""
    spec = ("vllm.v1.kv_cache_interface", "FullAttentionSpec")
    for kind in ("field", "attribute"):
        assert not KINDS[kind](Seam(kind, spec[0], f"{spec[1]}.is_gone", "", ""))
    for kind in ("method", "property"):
        gone = Seam(kind, spec[0], f"{spec[1]}.is_gone", "", "")
        assert not KINDS[kind](gone)
    merge = f"{spec[1]}.merge"
    assert not is_parameter(Seam("parameter", spec[0], f"{merge}.is_gone", "", ""))
    assert not is_assignment(Seam("assignment", spec[0], f"{merge}.is_gone", "", ""))
    with pytest.raises(AttributeError):
        is_class(Seam("class", spec[0], "IsGone", "", ""))


def test_the_verified_versions_are_those_that_the_plugin_accepts() -> None:
    from triattention_vllm.engine.versions import VERIFIED

    lines = ", ".join(f"{major}.{minor}" for major, minor in VERIFIED)
    assert {seam.verified for seam in seams()} == {lines}


def test_every_row_names_its_test_or_says_that_there_is_none() -> None:
    for seam in seams():
        named = re.fullmatch(r"`test_\w+`", seam.proved_by)
        assert named or seam.proved_by == UNPROVED, f"{seam}: proved by {seam.proved_by!r}"


def vllm_imports() -> Iterator[tuple[Path, str, str]]:
    """(file, module, name) of every import of vLLM; the name is empty for a whole module."""
    for path in sorted(PLUGIN.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((path, str(node.module), alias.name) for alias in node.names)
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                yield from ((path, name, "") for name in names if name.split(".")[0] == "vllm")


def test_every_import_of_vllm_has_a_row() -> None:
    modules = {seam.module for seam in seams()}
    names = {(seam.module, seam.qualname) for seam in seams()}
    imports = list(vllm_imports())
    assert len(imports) > 50
    missing = [
        f"{path.relative_to(ROOT)}: {module}:{name}"
        for path, module, name in imports
        if (module not in modules if not name else (module, name) not in names)
    ]
    assert missing == []


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


def test_every_method_that_is_overridden_has_a_row() -> None:
    rows = [owner_and_name(seam) for seam in seams() if seam.kind == "method"]
    found = list(overrides())
    assert len(found) >= 14
    missing = [
        f"{cls.__qualname__}.{name} overrides {base.__module__}:{base.__qualname__}.{name}"
        for cls, base, name in found
        if not any(name == listed and issubclass(cls, owner) for owner, listed in rows)
    ]
    assert missing == []


def test_every_override_takes_the_parameters_of_vllms_own_method() -> None:
    for cls, base, name in overrides():
        ours, theirs = (
            [
                (parameter.name, parameter.kind)
                for parameter in inspect.signature(getattr(owner, name)).parameters.values()
            ]
            for owner in (cls, base)
        )
        assert ours == theirs, f"{cls.__qualname__}.{name} overrides {base.__qualname__}.{name}"
