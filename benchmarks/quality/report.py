"""The figures as a table and as a picture."""

from pathlib import Path
from typing import Any

Json = dict[str, Any]
HEAD = (
    "task", "length", "method", "budget", "right", "95 %", "words", "output", "compressed",
    "rounds", "blocks", "tokens/s",
)  # fmt: skip


def table(rows: list[Json]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for row in rows:
        low, high = row["interval"]
        cells = (
            row["task"],
            row["length"],
            label(row),
            row["budget"] or "",
            f"{row['exact']:.3f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['right_words']:.3f}",
            f"{row['mean_output']:.0f}/{row['mean_expected']:.0f}",
            f"{row['compressed']:.2f}",
            row["rounds"],
            row["peak_blocks"],
            f"{row['tokens_per_second']:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(rows: list[Json]) -> str:
    """One line per method and budget, one column per task and length, as Markdown: share of answers
    right to the last word, and in brackets of words before the first wrong one."""
    columns = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    lines = [
        "| method | budget | " + " | ".join(f"{task} {length}" for task, length in columns) + " |",
        "|" + " --- |" * (2 + len(columns)),
    ]
    for name, budget in dict.fromkeys((label(row), row["budget"]) for row in rows):
        own = {
            (row["task"], row["length"]): f"{row['exact']:.2f} ({row['right_words']:.2f})"
            for row in rows
            if (label(row), row["budget"]) == (name, budget)
        }
        cells = [name, str(budget or ""), *(own.get(column, "") for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def label(row: Json) -> str:
    """Method and variant."""
    return " ".join(filter(None, (row["method"], row["variant"])))


def figure(rows: list[Json], path: Path) -> None:
    """Answers right against budget: a panel per task and length, a line per method, full dashed."""
    # Imported here: tables need no matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    panels = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    names = [name for name in dict.fromkeys(map(label, rows)) if name != "full"]
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    picture, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(2.2 * len(panels) + 2.2, 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if (row["task"], row["length"]) == panel]
        for row in own:
            if label(row) == "full":
                axis.axhline(row["exact"], linestyle="--", color="black", label="full")
        for idx, name in enumerate(names):
            line = sorted((row["budget"], row["exact"]) for row in own if label(row) == name)
            is_ours = name.startswith("triattention")
            axis.plot(
                *zip(*line, strict=True),
                marker="o" if is_ours else "x",
                linewidth=2.5 if is_ours else 1.2,
                color=colormaps["tab20"](idx),
                label=name,
            )
        axis.set_title(f"{panel[0]}, {panel[1]} tokens")
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, map(str, budgets))
        axis.set_xlabel("budget, tokens")
        axis.set_ylim(-0.03, 1.03)
    axes[0][0].set_ylabel("answers right to the last word")
    lines, labels = axes[0][0].get_legend_handles_labels()
    picture.legend(lines, labels, loc="outside right center", fontsize="small")
    picture.savefig(path, dpi=130)
