"""The table of docs/seams.md: every symbol of vLLM that this package touches."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

versions = pytest.importorskip(
    "triattention_vllm.engine.versions", reason="the seams are those of an installed vLLM"
)
KNOWN_LINES: tuple[tuple[int, int], ...] = (*versions.VERIFIED, *versions.SOURCE_CHECKED)
"""Release lines that a row speaks of, in order."""

ROOT = Path(__file__).parents[2]
SEAMS = ROOT / "docs" / "seams.md"
COLUMNS = ["kind", "symbol", "what we do with it, and why", "verified", "proved by", "goes"]


@dataclass(frozen=True)
class Seam:
    """One symbol of one row: ``module:qualname``, and the row's other columns."""

    kind: str
    module: str
    qualname: str
    lines: tuple[tuple[int, int], ...]
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


def lines_of(cell: str) -> tuple[tuple[int, int], ...]:
    """Release lines of a cell such as ``0.29-0.33``, or ``0.28`` alone."""
    first, _, last = cell.partition("-")
    numbers = [versions.release_line(word) for word in (first, last or first)]
    ends = [KNOWN_LINES.index(line) for line in numbers if line in KNOWN_LINES]
    written = len(ends) == 2 and ends[0] <= ends[1] and re.fullmatch(r"[\d.]+(-[\d.]+)?", cell)
    assert written, (
        f"{cell!r} is no range of {versions.names(KNOWN_LINES)}; write the first and "
        "the last line that have the symbol, as in 0.28-0.33"
    )
    return KNOWN_LINES[ends[0] : ends[1] + 1]


@cache
def seams() -> list[Seam]:
    """Every symbol in the table of docs/seams.md."""
    lines = [line for line in SEAMS.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = map(cells, lines)
    assert header == COLUMNS
    found = []
    for row in rows:
        assert len(row) == len(COLUMNS), f"this row has {len(row)} columns: {row[:2]}"
        kind, cell, why, lines, proved_by, goes = row
        assert why, f"{cell}: say what is done with it and why"
        assert goes, f"{cell}: say when it can go"
        found += [Seam(kind, *symbol, lines_of(lines), proved_by) for symbol in symbols(cell)]
    return found
