"""The picture of a statistics file: concentration by layer and head, and curves of chosen heads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triattention_vllm.method.statistics import Statistics
from triattention_vllm.tools.figure import drawn_to
from triattention_vllm.tools.head_kinds import LOCAL_REACH, SINKS_REACH, kinds, preference

_LONGEST = 1 << 16


def plot_statistics(
    statistics: Statistics,
    frequencies: Tensor | None,
    reaches: Tensor | None,
    heads: Sequence[tuple[int, int]],
    path: Path,
) -> None:
    """Write ``path``: R as a heatmap [layers, heads]; beside it, where the frequencies are known,
    what a matching key keeps of its score at a distance, for each of ``heads`` (layer, head).

    Raises SettingsError where the file cannot be written.
    """
    model = statistics.fingerprint
    has_curves = frequencies is not None and reaches is not None
    with drawn_to(path, 11 if has_curves else 6, 5) as figure:
        left, *right = figure.subplots(1, 2 if has_curves else 1, squeeze=False)[0]
        values = statistics.concentration().mean(-1)
        shown = left.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        step = max(1, model.num_layers // 12)
        rows = range(0, model.num_layers, step)
        left.set_yticks(rows, [str(model.layer_indices[row]) for row in rows])
        left.set_xlabel("query head")
        left.set_ylabel("layer")
        left.set_title("concentration R", loc="left")
        figure.colorbar(shown, ax=left)
        if frequencies is not None and reaches is not None:
            _plot_curves(right[0], statistics, frequencies, reaches, heads)


def _plot_curves(
    axes: Any,
    statistics: Statistics,
    frequencies: Tensor,
    reaches: Tensor,
    heads: Sequence[tuple[int, int]],
) -> None:
    distances = torch.logspace(0, 16, 400, base=2).round()
    curves = preference(statistics, frequencies, distances)
    names = kinds(statistics, reaches)
    for layer_idx, head_idx in heads:
        row = statistics.fingerprint.layer_indices.index(layer_idx)
        label = f"{layer_idx}.{head_idx} ({names[row][head_idx]})"
        axes.plot(distances, curves[row, head_idx], linewidth=1.6, label=label)
    axes.axhline(0.5, color="#666666", linestyle="--", linewidth=1)
    axes.axvspan(1, LOCAL_REACH, color="#666666", alpha=0.08)
    axes.axvspan(SINKS_REACH, _LONGEST, color="#666666", alpha=0.08)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, _LONGEST)
    axes.set_xlabel("distance, tokens")
    axes.set_title("share of its score that a matching key keeps", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
