"""The picture of the demo: blocks held over time, full attention against compression."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triattention_vllm.tools.figure import drawn_to
from triattention_vllm.tools.load import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2")
_GREY = "#666666"


def plot_blocks(timelines: Sequence[Timeline], path: Path, *, title: str) -> list[Path]:
    """Write ``path`` as PNG and SVG: blocks held above, requests running below, both over time;
    the size of the pool as a wall, preemptions as crosses. Returns the files.
    """
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        with drawn_to(file, 9, 5.5) as figure:
            _draw(figure, timelines, title)
    return files


def _draw(figure: "Figure", timelines: Sequence[Timeline], title: str) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    wall = timelines[0].num_blocks
    above.axhline(wall, color=_GREY, linestyle="--", linewidth=1)
    above.annotate(
        f"the pool: {wall} blocks",
        (0, wall),
        xytext=(4, 4),
        textcoords="offset points",
        color=_GREY,
    )
    for timeline, colour in zip(timelines, _COLOURS, strict=True):
        seconds = [state.seconds for state in timeline.states]
        held = [state.num_held for state in timeline.states]
        label = f"{timeline.name}: {timeline.seconds:.0f} s"
        above.plot(seconds, held, color=colour, linewidth=1.8, label=label)
        crosses = timeline.preemption_seconds
        if crosses:
            above.plot(
                crosses,
                [wall] * len(crosses),
                linestyle="none",
                marker="x",
                markersize=8,
                markeredgewidth=2,
                color=colour,
                clip_on=False,
                label=f"{timeline.num_preemptions} preemptions",
            )
        running = [state.num_running for state in timeline.states]
        below.step(seconds, running, color=colour, linewidth=1.8, where="post")
    above.set_ylabel("KV blocks held")
    above.set_ylim(0, wall * 1.15)
    above.set_xlim(left=0)
    above.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    below.set_ylabel("requests running")
    below.set_ylim(0, max(timeline.num_clients for timeline in timelines) + 0.5)
    below.set_xlabel("seconds since the clients asked")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
