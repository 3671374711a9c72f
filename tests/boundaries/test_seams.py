"""docs/seams.md names what this package touches in vLLM: all of it, and nothing that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from seams_installed import (
    KINDS,
    PLUGIN,
    installed_line,
    installed_source,
    is_assignment,
    is_parameter,
    is_there,
    named,
    overrides,
    owner_and_name,
)
from seams_table import Seam, lines_of, seams, versions

ROOT = PLUGIN.parent
UNPROVED = "name only"


@pytest.mark.parametrize("seam", seams(), ids=str)
def test_the_installed_vllm_has_the_symbols_of_its_line_and_no_other(seam: Seam) -> None:
    assert seam.kind in KINDS, f"kind {seam.kind!r} is unknown; known are {sorted(KINDS)}"
    listed = installed_line() in seam.lines
    assert is_there(seam) == listed, (
        f"{seam} is {'no' if listed else 'a'} {seam.kind} of vLLM {versions.vllm_version()}; "
        f"its row says {versions.names(seam.lines)}"
    )


@pytest.mark.parametrize("seam", seams(), ids=str)
def test_reading_the_source_finds_what_importing_finds(seam: Seam) -> None:
    """So that reading is enough for a release line that cannot be installed here."""
    assert installed_source().has(seam.kind, seam.module, seam.qualname) == is_there(seam)


def test_a_symbol_stands_in_the_table_once() -> None:
    listed = [(seam.kind, str(seam)) for seam in seams()]
    assert len(listed) > 200
    assert sorted(listed) == sorted(set(listed))


def test_a_symbol_that_is_gone_is_noticed() -> None:
    """Each check against a name that the class of the row does not have."""
    spec = ("vllm.v1.kv_cache_interface", "FullAttentionSpec")
    for kind in ("field", "attribute"):
        assert not KINDS[kind](Seam(kind, spec[0], f"{spec[1]}.is_gone", (), ""))
    for kind in ("method", "property"):
        gone = Seam(kind, spec[0], f"{spec[1]}.is_gone", (), "")
        assert not KINDS[kind](gone)
    merge = f"{spec[1]}.merge"
    assert not is_parameter(Seam("parameter", spec[0], f"{merge}.is_gone", (), ""))
    assert not is_assignment(Seam("assignment", spec[0], f"{merge}.is_gone", (), ""))
    assert not is_there(Seam("class", spec[0], "IsGone", (), ""))


@pytest.mark.parametrize("cell", ["0.27-0.33", "0.28, 0.29", "0.33-0.28", "all", "0.28-0.99"])
def test_release_lines_that_nobody_looked_at_are_no_range(cell: str) -> None:
    with pytest.raises(AssertionError, match="is no range of"):
        lines_of(cell)


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
    """All of them by name, or the first ones by name and all others to pass them on."""
    found = list(overrides())
    assert found
    for cls, base, name in found:
        ours, passes_on = named(getattr(cls, name))
        theirs, _ = named(getattr(base, name))
        assert ours == (theirs[: len(ours)] if passes_on else theirs), (
            f"{cls.__qualname__}.{name} overrides {base.__qualname__}.{name}"
        )
