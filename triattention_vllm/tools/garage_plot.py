"""A recorded request as a picture: blocks over time, who survived, and one round's garage."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from triattention_vllm.tools.figure import drawn_to
from triattention_vllm.tools.recording import RequestRecording

_FULL, _HELD, _FREED = "#d55e00", "#0072b2", "#009e73"
_KINDS = {
    "free": "#ffffff",
    "protected": "#8250b8",
    "survivor": "#5b9fc9",
    "evicted in this round": "#d55e00",
    "window and newer": "#b4bcc5",
}


def plot_garage(recording: RequestRecording, path: Path) -> None:
    """Write the picture. Raises SettingsError where ``path`` cannot be written."""
    with matplotlib.rc_context({"font.size": 9}), drawn_to(path, 9, 9.5) as figure:
        heights = (3, 1, 4, 1.3, 1.3)
        held, freed, survivors, before, after = figure.subplots(5, 1, height_ratios=heights)
        _plot_held(held, recording)
        _plot_freed(freed, recording)
        _plot_survivors(survivors, recording)
        last = len(recording.rounds) - 1
        _plot_cells(before, recording, last, is_after=False)
        _plot_cells(after, recording, last, is_after=True)
        after.legend(
            handles=[Patch(facecolor=c, edgecolor="#999999", label=k) for k, c in _KINDS.items()],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.25),
            ncols=len(_KINDS),
            frameon=False,
        )
        for axes in (held, freed, survivors):
            axes.set_xlim(0, recording.num_tokens)
            axes.spines[["top", "right"]].set_visible(False)


def _plot_held(axes: Axes, recording: RequestRecording) -> None:
    tokens, held = zip(*recording.rows, strict=True)
    full = recording.num_full
    title = (
        f"{recording.num_tokens:,} tokens in {recording.most_held} blocks at most, "
        f"{full} with full attention"
    )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.plot([0, recording.num_tokens], [0, full], "--", color=_FULL, label="full attention")
    axes.step(tokens, held, where="post", color=_HELD, linewidth=1.6, label="held")
    axes.set_ylabel("blocks")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(axis="y", alpha=0.25)


def _plot_freed(axes: Axes, recording: RequestRecording) -> None:
    boundaries = [one.boundary for one in recording.rounds]
    width = 0.6 * float(recording.settings["interval"])
    axes.bar(boundaries, [one.num_freed for one in recording.rounds], width=width, color=_FREED)
    axes.set_ylabel("freed")
    axes.set_title(
        f"{len(recording.rounds)} rounds freed {recording.num_freed} blocks", loc="left", fontsize=9
    )


def _plot_survivors(axes: Axes, recording: RequestRecording) -> None:
    """A column per round: the share of KV heads that hold each token from it to the next."""
    evicted_at = numpy.array(recording.evicted_at)  # [heads, tokens]
    num_rounds = len(recording.rounds)
    edges = [0, *[one.boundary for one in recording.rounds], recording.num_tokens]
    position = numpy.arange(evicted_at.shape[1])
    share = numpy.full((evicted_at.shape[1], num_rounds + 1), numpy.nan)
    for column in range(num_rounds + 1):
        alive = (evicted_at < 0) | (evicted_at >= column)
        computed = position < edges[column + 1]
        share[computed, column] = alive.mean(axis=0)[computed]
    rows = numpy.arange(evicted_at.shape[1] + 1)
    mesh = axes.pcolormesh(edges, rows, share, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    figure: Any = axes.figure
    figure.colorbar(mesh, ax=axes, label="share of KV heads", pad=0.01)
    axes.set_ylabel("token")
    axes.set_xlabel("tokens computed")
    axes.set_title("who survived", loc="left", fontsize=9)


def _plot_cells(axes: Axes, recording: RequestRecording, index: int, *, is_after: bool) -> None:
    """The blocks of one head around a round, a column each, oldest token at the bottom left."""
    kinds = garage(recording, 0, index, is_after=is_after)
    block_size = recording.block_size
    filled = [*kinds, *[0] * (-len(kinds) % block_size)]
    cells = numpy.array(filled).reshape(-1, block_size).T
    colours = ListedColormap(list(_KINDS.values()))
    axes.pcolormesh(
        cells, cmap=colours, vmin=0, vmax=len(_KINDS) - 1, edgecolors="#ffffff", linewidth=0.15
    )
    for x in range(cells.shape[1] + 1):
        axes.axvline(x, color="#555555", linewidth=0.6)
    for side in axes.spines.values():
        side.set_color("#555555")
    when = "after" if is_after else "before"
    axes.set_ylabel(when)
    axes.set_xticks([])
    axes.set_yticks([])
    if not is_after:
        one = recording.rounds[index]
        axes.set_title(
            f"the garage of one KV head, a block per column, round {index + 1} at "
            f"{one.boundary:,} tokens: {one.num_freed} blocks become free",
            loc="left",
            fontsize=9,
        )


def garage(recording: RequestRecording, head: int, index: int, *, is_after: bool) -> list[int]:
    """Kind of each slot, an index into the kinds above, of round ``index`` in ``head``: freed
    blocks first, then the cached tokens in order of time."""
    one = recording.rounds[index]
    end = one.region_start + one.num_source * recording.block_size
    evicted_at = recording.evicted_at[head]
    cached = [p for p in range(one.boundary) if evicted_at[p] < 0 or evicted_at[p] >= index]
    slots = []
    for slot, position in enumerate(cached):
        if slot < one.first_candidate:
            slots.append(1)
        elif slot >= end:
            slots.append(4)
        elif evicted_at[position] != index:
            slots.append(2)
        elif not is_after:
            slots.append(3)
    return [0] * (len(cached) - len(slots)) + slots
