"""What all benchmarks say of their figures, and how they are called and write them."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Json = dict[str, Any]
HERE = Path(__file__).parent


def run_in_a_size(
    run: Callable[[Any, Path], None], normal: object, tiny: object, about: str, name: str
) -> None:
    """Parse the command line of a benchmark with two sizes, and run it."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a size for CI: no figure to quote")
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/{name}.json")
    args = parser.parse_args()
    output = args.output or HERE / "results" / f"{name}{'_tiny' if args.tiny else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    run(tiny if args.tiny else normal, output)
    print(f"wrote {output}")


def write_json(output: Path, value: Json) -> None:
    """Whole or not at all: whoever is killed meanwhile leaves what was there before."""
    beside = output.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, output)


def taken(commit: str | None = None) -> Json:
    """When, of what and where figures are taken."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or described_commit(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "load_average_at_start": os.getloadavg(),
    }


def described_commit() -> str | None:
    """Of this clone; None outside one, and where git is not installed."""
    return first_line("git", "-C", str(HERE), "describe", "--always", "--dirty")


def first_line(*command: str) -> str | None:
    """That a program prints; None where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else None


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def spread(values: Sequence[float]) -> Json:
    """Median, first and last tenth; none lies beyond the values."""
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}
