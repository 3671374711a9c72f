"""What a wheel of vLLM has of the table in docs/seams.md: ``make seams-033`` writes it down.

For a release line that has no CPU build. One line of JSON says which wheel was read; each of
the others is one row's symbol: whether it is there, and the parameters of a function.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from seams_table import seams
from vllm_source import Source

RECORD = Path(__file__).parents[1] / "boundaries" / "vllm_0.33.jsonl"


@dataclass(frozen=True)
class Reading:
    """Of one symbol: whether the wheel has it, and a function's parameters."""

    found: bool
    parameters: tuple[str, ...] | None


def read(source: Source) -> dict[tuple[str, str], Reading]:
    """(kind, symbol) of every row -> what ``source`` has of it."""
    readings = {}
    for seam in seams():
        parameters = None
        if seam.kind in ("method", "function"):
            parameters = source.parameters(seam.module, seam.qualname)
        found = source.has(seam.kind, seam.module, seam.qualname)
        readings[seam.kind, str(seam)] = Reading(found, parameters)
    return readings


def recorded() -> dict[tuple[str, str], Reading]:
    """What the record says."""
    rows = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()[1:]]
    return {
        (row["kind"], row["symbol"]): Reading(
            row["found"], tuple(row["parameters"]) if "parameters" in row else None
        )
        for row in rows
    }


def write(wheel: Path) -> None:
    """Read ``wheel`` and write the record anew."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    rows: list[dict[str, object]] = [{"wheel": wheel.name, "sha256": digest}]
    for (kind, symbol), reading in sorted(read(Source(wheel)).items()):
        row: dict[str, object] = {"kind": kind, "symbol": symbol, "found": reading.found}
        if reading.parameters is not None:
            row["parameters"] = reading.parameters
        rows.append(row)
    RECORD.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    missing = [str(row["symbol"]) for row in rows[1:] if not row["found"]]
    print(f"{len(rows) - 1} symbols of {wheel.name}; not there: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
