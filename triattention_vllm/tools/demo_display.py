"""What the demo shows: progress while a server is under load, and the table at the end."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from triattention_vllm.tools.load import Timeline
from triattention_vllm.tools.server import PoolState

_SECONDS_BETWEEN_LINES = 3.0


class Display:
    """Progress of one run: bars in a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, name: str, num_tokens: int) -> None:
        self.console = console
        self.name = name
        self.num_tokens = num_tokens
        self.progress = Progress(
            TextColumn("  {task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tokens = self.progress.add_task("answer tokens", total=num_tokens)
        self.blocks = self.progress.add_task("blocks held", total=None)
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, state: PoolState, num_streamed: int) -> None:
        """Bring the display up to date."""
        described = f"{state.num_running} running, {state.num_preemptions} preempted"
        self.progress.update(self.tokens, completed=num_streamed)
        self.progress.update(
            self.blocks,
            completed=state.num_held,
            total=state.num_blocks,
            description=f"blocks, {described}",
        )
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.console.print(
                f"  {self.name}: {num_streamed} of {self.num_tokens} tokens, {state.num_held} of "
                f"{state.num_blocks} blocks held, {described}",
                highlight=False,
            )


def comparison(
    timelines: Sequence[Timeline], longest_contexts: Sequence[int], right_shares: Sequence[float]
) -> Table:
    """The table at the end: one column per run. ``right_shares``: of the words of the answers,
    those before the first wrong one."""
    rows = {
        "pool, blocks": [f"{t.num_blocks}" for t in timelines],
        "most blocks held": [
            f"{t.peak_held} ({t.peak_held / t.num_blocks:.0%})" for t in timelines
        ],
        "preemptions": [f"{t.num_preemptions}" for t in timelines],
        "requests running, median": [f"{t.median_running:g} of {t.num_clients}" for t in timelines],
        "served with max_model_len": [f"{length}" for length in longest_contexts],
        "answer tokens": [f"{t.num_tokens}" for t in timelines],
        "right before the first mistake": [f"{share:.0%}" for share in right_shares],
        "seconds": [f"{t.seconds:.1f}" for t in timelines],
        "tokens per second": [f"{t.num_tokens / t.seconds:.0f}" for t in timelines],
    }
    table = Table(title="The same load in the same pool")
    table.add_column("")
    for timeline in timelines:
        table.add_column(timeline.name, justify="right")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table
