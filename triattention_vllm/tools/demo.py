"""``triattention demo``: the same long answers in a small pool, without and with compression.

Serves the small reasoner of this package with the real ``vllm serve`` on loopback and shows what
happens at the wall, and what it does to the answers. Needs no GPU, no network and no other model.
"""

import argparse
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from triattention_vllm.errors import SettingsError, TriAttentionError
from triattention_vllm.tools.blocks_plot import plot_blocks
from triattention_vllm.tools.demo_display import Display, comparison
from triattention_vllm.tools.load import Timeline, put_under_load
from triattention_vllm.tools.reasoner import (
    LONGEST_PROMPT,
    MAX_MODEL_LEN,
    MODEL,
    POOL_MEBIBYTES,
    SERVE_ARGUMENTS,
    compression,
    environment,
    problems,
    right_share,
)
from triattention_vllm.tools.server import serving

SHORT_MAX_LEN = 2048
LONG_MAX_LEN = MAX_MODEL_LEN


@dataclass(frozen=True)
class Run:
    """One server of the demo: its name in the table, and the flags that differ."""

    name: str
    max_model_len: int
    arguments: tuple[str, ...] = ()

    @property
    def log_name(self) -> str:
        """File name of the server's output."""
        return f"{self.name.replace(' ', '-')}.log"

    @property
    def all_arguments(self) -> list[str]:
        """Everything behind ``vllm serve MODEL``."""
        return [
            *SERVE_ARGUMENTS,
            "--max-num-seqs=16",
            "--stream-interval=16",
            f"--max-model-len={self.max_model_len}",
            *self.arguments,
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The defaults take about two minutes on two CPU cores."""
    parser.usage = "%(prog)s [options]"
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="folder to write (demo-output)",
    )
    add("--clients", type=int, default=4, metavar="N", help="answers streamed at once (4)")
    add("--answer-tokens", type=int, default=1600, metavar="TOKENS", help="per answer (1600)")
    add("--budget", type=int, default=512, metavar="TOKENS", help="kept per request (512)")


def run(args: argparse.Namespace) -> int:
    """Serve with and without compression, show both, write the picture; 0 when all is done,
    130 when it was interrupted."""
    longest = SHORT_MAX_LEN - LONGEST_PROMPT
    if not (1 <= args.clients <= 16 and 1 <= args.answer_tokens <= longest):
        raise SettingsError(
            f"--clients is {args.clients} and --answer-tokens is {args.answer_tokens}; allowed are "
            f"1 to 16 clients and 1 to {longest} tokens."
        )
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"A small model that follows programs step by step, a KV pool of {POOL_MEBIBYTES} MiB, and "
        f"{args.clients} clients that each stream an answer of {args.answer_tokens} tokens. "
        f"Everything goes to {args.output}/.",
        highlight=False,
    )
    runs = [
        Run("full attention", SHORT_MAX_LEN),
        Run(f"budget {args.budget}", LONG_MAX_LEN, compression(args.budget)),
    ]
    try:
        with _ended_like_ctrl_c():
            _show_refusal(console, args.output)
            timelines = [_measure(console, one, args) for one in runs]
    except KeyboardInterrupt:
        console.print("\ninterrupted; the server is stopped")
        return 130
    console.print()
    given = problems()[: args.clients]
    shares = [right_share(given, timeline.answers) for timeline in timelines]
    console.print(comparison(timelines, [one.max_model_len for one in runs], shares))
    for file in _write_results(timelines, args):
        console.print(f"wrote {file}", highlight=False)
    return 0


def _show_refusal(console: Console, output: Path) -> None:
    """Full attention does not even start with a context that is longer than its pool."""
    refused = Run("full attention long context", LONG_MAX_LEN)
    _announce(console, refused)
    try:
        with serving(MODEL, refused.all_arguments, output / refused.log_name) as server:
            console.print(f"  started, although the pool is small: see {server.log_path}")
    except TriAttentionError:
        log = (output / refused.log_name).read_text(encoding="utf-8", errors="replace")
        reasons = [line for line in log.splitlines() if "max seq len" in line]
        if not reasons:
            raise
        reason = reasons[-1]
        console.print(f"  refused: {reason[reason.index('To serve') :]}", highlight=False)


def _measure(console: Console, one: Run, args: argparse.Namespace) -> Timeline:
    """Start one server, put it under load, stop it."""
    _announce(console, one)
    log_path, variables = args.output / one.log_name, environment(args.output)
    with serving(MODEL, one.all_arguments, log_path, environment=variables) as server:
        for line in server.log().splitlines():
            _, found, line_of_ours = line.partition("KV compression is on")
            if found:
                console.print(f"  {found}{line_of_ours}", highlight=False)
        prompts = [problem.prompt for problem in problems()[: args.clients]]
        with Display(console, one.name, args.clients * args.answer_tokens) as display:
            timeline = put_under_load(server, one.name, prompts, args.answer_tokens, display.show)
    console.print(
        f"  {timeline.num_tokens} tokens in {timeline.seconds:.0f} s, at most "
        f"{timeline.peak_held} of {timeline.num_blocks} blocks held, "
        f"{timeline.num_preemptions} preemptions",
        highlight=False,
    )
    return timeline


def _announce(console: Console, one: Run) -> None:
    flags = " ".join([f"--max-model-len={one.max_model_len}", *one.arguments])
    console.print(f"\n[bold]{one.name}[/bold]: vllm serve reasoner {flags}", highlight=False)


def _write_results(timelines: Sequence[Timeline], args: argparse.Namespace) -> list[Path]:
    """The picture and the numbers behind it."""
    title = f"{args.clients} answers of {args.answer_tokens} tokens from one small pool"
    numbers = args.output / "blocks.json"
    numbers.write_text(json.dumps([asdict(t) for t in timelines], indent=1), encoding="utf-8")
    return [*plot_blocks(timelines, args.output / "blocks", title=title), numbers]


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that its server is stopped first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
