"""The picture of a plan: requests that fit, by their length, with and without compression."""

from pathlib import Path

from triattention_vllm.tools.figure import drawn_to
from triattention_vllm.tools.plan import Plan

_FULL, _COMPRESSED = "#D55E00", "#0072B2"


def plot_plan(plan: Plan, path: Path) -> None:
    """Write the picture. Raises SettingsError where ``path`` cannot be written."""
    with drawn_to(path, 8, 4.5) as figure:
        axes = figure.subplots()
        full = [row.full_requests for row in plan.fits]
        compressed = [row.compressed_requests for row in plan.fits]
        places = range(len(plan.fits))
        for side, counts, colour, label in (
            (-0.2, full, _FULL, f"full attention, one request up to {plan.wall_tokens} tokens"),
            (0.2, compressed, _COMPRESSED, f"budget {plan.budget}"),
        ):
            bars = axes.bar([p + side for p in places], counts, 0.36, color=colour, label=label)
            axes.bar_label(bars, padding=2)
        axes.set_xticks(places, [str(row.num_tokens) for row in plan.fits])
        axes.set_ylim(0, 1.12 * max(1, *full, *compressed))
        axes.set_xlabel("tokens of each request")
        axes.set_ylabel("requests that decode at once")
        axes.set_title(
            f"{plan.model}, {plan.kv_bytes / (1 << 30):.1f} GiB of KV blocks", loc="left"
        )
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
