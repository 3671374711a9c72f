"""Pictures of what ``benchmarks/gpu/decode.py`` found: nothing in them but its files.

    python benchmarks/plot.py FILE... --into FOLDER

``throughput.png``: tokens per second against the budget, one line for each load, from cases
``batches`` of several budgets; full attention is dashed. ``running_*.png``, ``blocks_*.png``:
requests that run and blocks that they hold over time, of each file with a backlog.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from triattention_vllm.tools.figure import drawn_to

Json = dict[str, Any]
# (load in words, budget) -> tokens per second of full attention and of compression
Rates = dict[tuple[str, int], tuple[float, float]]


def rates_of(reports: Sequence[Json]) -> Rates:
    """Every load that both sides ran, of every report."""
    found: Rates = {}
    for report in reports:
        for result in report["results"]:
            if "speedup" in result:
                usual = report["case"]["sides"]["compressed"]["settings"]["budget"]
                budget = result.get("budget") or usual
                load = f"{result['num_requests']} x {result['context']}"
                sides = (result[name]["tokens_per_s"] for name in ("full", "compressed"))
                found[load, budget] = tuple(sides)  # type: ignore[assignment]
    return found


def moments_of(report: Json) -> Iterator[tuple[str, list[list[float]]]]:
    """Of each engine that served a backlog: seconds, requests running, blocks held."""
    for name, served in report["backlogs"].items():
        yield name, list(zip(*served["moments"]["rows"], strict=True))


def device_of(reports: Sequence[Json]) -> str:
    """What every picture says of its figures."""
    named = {(r["conditions"]["device"], str(r["conditions"]["commit"])) for r in reports}
    return "; ".join(f"{device}, {commit}" for device, commit in sorted(named))


def draw_rates(rates: Rates, title: str, path: Path) -> None:
    """One colour for each load."""
    with drawn_to(path, 7, 4.5) as figure:
        axes = figure.subplots()
        for load in sorted({load for load, _ in rates}):
            own = sorted((budget, *both) for (name, budget), both in rates.items() if name == load)
            budgets, full, compressed = zip(*own, strict=True)
            (line,) = axes.plot(budgets, compressed, marker="o", label=load)
            axes.plot(budgets, full, linestyle="--", color=line.get_color())
        axes.set(xlabel="budget (dashed: full attention)", ylabel="tokens/s", title=title)
        axes.legend(title="requests x context")


def draw_moments(
    served: Mapping[str, list[list[float]]], column: int, label: str, title: str, path: Path
) -> None:
    """One line for each engine."""
    with drawn_to(path, 7, 4) as figure:
        axes = figure.subplots()
        for name, columns in served.items():
            axes.plot(columns[0], columns[column], label=name)
        axes.set(xlabel="seconds", ylabel=label, title=title)
        axes.set_ylim(bottom=0)
        axes.legend()


def draw(files: Sequence[Path], folder: Path) -> list[Path]:
    """All pictures that the files have figures for. Raises ValueError where there are none."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    rates = rates_of(reports)
    if rates:
        written.append(folder / "throughput.png")
        draw_rates(rates, device_of(reports), written[-1])
    for file, report in zip(files, reports, strict=True):
        served = dict(moments_of(report))
        for column, name, label in ((1, "running", "requests"), (2, "blocks", "blocks held")):
            if served:
                written.append(folder / f"{name}_{file.stem}.png")
                draw_moments(served, column, label, device_of([report]), written[-1])
    if not written:
        raise ValueError(
            f"{', '.join(map(str, files))} have no load that both sides ran and no backlog; give"
            " results of benchmarks/gpu/decode.py"
        )
    return written


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    try:
        written = draw(args.files, args.into)
    except ValueError as error:
        parser.error(str(error))
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
