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


def label(row: Json) -> str:
    """Method and variant."""
    return " ".join(filter(None, (row["method"], row["variant"])))


def figure(rows: list[Json], path: Path) -> None:
    """Share of right answers against budget: a panel per task and length, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["task"], row["length"]) for row in rows})
    picture, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.4), sharey=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if (row["task"], row["length"]) == panel]
        for name in dict.fromkeys(map(label, own)):
            line = [row for row in own if label(row) == name]
            if name == "full":
                axis.axhline(line[0]["exact"], linestyle="--", color="black", label="full")
                continue
            line.sort(key=lambda row: row["budget"])
            axis.plot(
                [row["budget"] for row in line],
                [row["exact"] for row in line],
                marker="o",
                label=name,
            )
        axis.set_title(f"{panel[0]}, {panel[1]} tokens")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("budget, tokens")
        axis.set_ylim(-0.03, 1.03)
    axes[0][0].set_ylabel("answers right to the last word")
    axes[0][-1].legend(fontsize="small")
    picture.tight_layout()
    picture.savefig(path, dpi=130)
