"""The picture of the dashboard: its panels, drawn from scrapes of a real server under load.

``python benchmarks/dashboard.py`` serves a tiny random model, lets clients come and go, scrapes
``/metrics`` twice a second and writes docs/images/dashboard.png.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny_model import write_tiny_model

from triattention_vllm.tools.server import Server, serving

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "configs" / "grafana" / "kv-compression.json"
RATE_SECONDS = 6.0
OURS = "triattention:"
PAPER, PANEL, GRID, TEXT = "#111217", "#181b1f", "#2c3235", "#d8d9da"
COLOURS = ("#73bf69", "#5794f2")
SERVER_ARGUMENTS = (
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--distributed-executor-backend=uni",
    "--max-model-len=8192",
    "--block-size=32",
    "--kv-cache-memory-bytes=3M",
    "--max-num-batched-tokens=512",
    "--max-num-seqs=8",
    "--kv-compression=triattention",
    "--kv-compression-config.budget=256",
    "--kv-compression-config.interval=64",
    "--kv-compression-config.window=32",
)


@dataclass(frozen=True)
class Scrape:
    """seconds: since the first one. values: sample, with ``<=bound`` behind a bucket's name, ->
    sum over engines."""

    seconds: float
    values: dict[str, float]


def scrape(server: Server, start: float) -> Scrape:
    """One scrape of the server's /metrics."""
    values: dict[str, float] = {}
    text = server.metrics()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith((OURS, "vllm:")):
                bound = f"<={sample.labels['le']}" if "le" in sample.labels else ""
                key = sample.name + bound
                values[key] = values.get(key, 0.0) + sample.value
    return Scrape(time.monotonic() - start, values)


Series = Callable[[Sequence[Scrape], int], float]


def value(name: str) -> Series:
    """A gauge as it was scraped."""
    return lambda scrapes, idx: scrapes[idx].values[name]


def rate(name: str) -> Series:
    """Increase per second over the last RATE_SECONDS, as PromQL's ``rate``."""

    def at(scrapes: Sequence[Scrape], idx: int) -> float:
        now = scrapes[idx]
        then = next(s for s in scrapes if now.seconds - s.seconds <= RATE_SECONDS)
        seconds = now.seconds - then.seconds
        return (now.values[name] - then.values[name]) / seconds if seconds else 0.0

    return at


def ratio(above: Series, below: Series) -> Series:
    """``above / (below > 0)``."""

    def at(scrapes: Sequence[Scrape], idx: int) -> float:
        divisor = below(scrapes, idx)
        return above(scrapes, idx) / divisor if divisor > 0 else float("nan")

    return at


def quantile(q: float, name: str) -> Series:
    """PromQL's ``histogram_quantile`` over rates: linear within a bucket."""

    def at(scrapes: Sequence[Scrape], idx: int) -> float:
        prefix = f"{name}_bucket<="
        bounds = sorted(
            (float(key.removeprefix(prefix)), rate(key)(scrapes, idx))
            for key in scrapes[idx].values
            if key.startswith(prefix)
        )
        wanted = q * bounds[-1][1]
        lower, count = 0.0, 0.0
        for bound, so_far in bounds:
            if so_far >= wanted > 0 and so_far > count:
                top = lower if bound == float("inf") else bound
                return lower + (top - lower) * (wanted - count) / (so_far - count)
            lower, count = bound, so_far
        return float("nan")

    return at


def _quantiles(name: str) -> list[Series]:
    return [quantile(0.5, name), quantile(0.99, name)]


SERIES: dict[str, list[Series]] = {
    "Tokens of running requests": [value(f"{OURS}logical_tokens"), value(f"{OURS}cached_tokens")],
    "Fewer cached tokens": [ratio(value(f"{OURS}logical_tokens"), value(f"{OURS}cached_tokens"))],
    "KV cache in use": [value("vllm:kv_cache_usage_perc")],
    "Blocks freed": [rate(f"{OURS}freed_blocks_total"), rate(f"{OURS}copy_on_write_blocks_total")],
    "Rounds": [rate(f"{OURS}rounds_total"), rate(f"{OURS}deferred_rounds_total")],
    "Tokens evicted": [rate(f"{OURS}evicted_tokens_total"), rate("vllm:generation_tokens_total")],
    "Seconds per round": _quantiles(f"{OURS}round_time_seconds"),
    "Time spent in rounds": [rate(f"{OURS}round_time_seconds_sum")],
    "Most tokens cached by a request": _quantiles(f"{OURS}request_max_cached_tokens"),
    "Requests": [value("vllm:num_requests_running"), value("vllm:num_requests_waiting")],
    "Compressed and preempted": [
        rate(f"{OURS}compressed_requests_total"),
        rate("vllm:num_preemptions_total"),
    ],
}
"""Title of a panel -> what its queries ask for, in their order."""


def draw(scrapes: Sequence[Scrape], path: Path) -> None:
    """Write the dashboard's panels, where it has them, as they show ``scrapes``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    num_rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    style = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    with matplotlib.rc_context({**style, "font.size": 8, "axes.edgecolor": GRID}):
        figure = Figure(figsize=(13, num_rows * 0.28), layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(num_rows, 24)
        for panel in panels:
            at = panel["gridPos"]
            cell = grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]]
            axes = figure.add_subplot(cell, facecolor=PANEL)
            axes.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
            for target, series, colour in zip(
                panel["targets"], SERIES[panel["title"]], COLOURS, strict=False
            ):
                axes.plot(
                    [s.seconds for s in scrapes],
                    [series(scrapes, idx) for idx in range(len(scrapes))],
                    color=colour,
                    linewidth=1.4,
                    label=target["legendFormat"],
                )
            _finish(axes, panel["fieldConfig"]["defaults"]["unit"])
        figure.savefig(path, dpi=110, facecolor=PAPER)


def _finish(axes: "matplotlib.axes.Axes", unit: str) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if unit == "percentunit":
        axes.yaxis.set_major_formatter(lambda number, _: f"{number:.0%}")
    if unit == "s":
        axes.yaxis.set_major_formatter(lambda number, _: f"{1000 * number:g} ms")
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g} s")
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.1), frameon=False, fontsize=7.5, ncols=2
    )


def load(server: Server, num_clients: int, answer_tokens: int) -> list[Scrape]:
    """Clients that come one after another, each with an answer, scraped twice a second."""
    start = time.monotonic()
    done = threading.Event()

    def ask(client_idx: int) -> None:
        done.wait(2.0 * client_idx)
        client = OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=900)
        for turn in range(2):
            client.completions.create(
                model="tiny",
                prompt=f"Client {client_idx} thinks for the {turn}. time.",
                max_tokens=answer_tokens // (1 + client_idx % 3),
                extra_body={"ignore_eos": True},
            )

    scrapes = [scrape(server, start)]
    with ThreadPoolExecutor(num_clients) as threads:
        answers = [threads.submit(ask, idx) for idx in range(num_clients)]
        while not all(answer.done() for answer in answers):
            time.sleep(0.5)
            scrapes.append(scrape(server, start))
    for answer in answers:
        answer.result()
    return [*scrapes, scrape(server, start)]


def main() -> None:
    """Serve, load, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "dashboard.png")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--answer-tokens", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model", num_layers=2, hidden_size=128, head_dim=32)
        environment = {"TRIATTENTION_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        with serving(model, SERVER_ARGUMENTS, folder / "log", environment=environment) as server:
            scrapes = load(server, args.clients, args.answer_tokens)
    draw(scrapes, args.output)
    print(f"{len(scrapes)} scrapes in {scrapes[-1].seconds:.0f} s, drawn in {args.output}")


if __name__ == "__main__":
    main()
