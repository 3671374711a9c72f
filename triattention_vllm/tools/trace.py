"""``triattention trace``: one request's rounds, as a picture and as a page.

Draws a recording of your own server (``--kv-compression-config.trace FILE``), or serves the small
reasoner of this package, lets it answer once and draws that.
"""

import argparse
from pathlib import Path

from triattention_vllm.errors import SettingsError
from triattention_vllm.tools.garage_page import write_page
from triattention_vllm.tools.reasoner import (
    LONGEST_PROMPT,
    MAX_MODEL_LEN,
    MODEL,
    SERVE_ARGUMENTS,
    SERVED_NAME,
    compression,
    environment,
    problems,
)
from triattention_vllm.tools.recording import read_recording, request_recording, requests_of
from triattention_vllm.tools.terminal import console, say, table

_MOST_TOKENS = MAX_MODEL_LEN - LONGEST_PROMPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without a recording one is made, which takes about a minute on two CPU cores."""
    parser.usage = "%(prog)s [RECORDING] [options]"
    add = parser.add_argument
    add("recording", type=Path, nargs="?", metavar="RECORDING", help="file that `trace` wrote")
    add("--request", metavar="ID", help="request to draw (the one with the most rounds)")
    add("--list", action="store_true", help="list the requests of the recording and stop")
    add("--html", type=Path, metavar="FILE", help="page (garage.html beside the recording)")
    add(
        "--plot",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="pictures, .png, .svg, .pdf (garage.png beside the recording)",
    )
    new = parser.add_argument_group("a new recording, where none is given").add_argument
    new(
        "--output", type=Path, default=Path("trace-output"), metavar="FOLDER", help="(trace-output)"
    )
    new("--budget", type=int, default=384, metavar="TOKENS", help="(384)")
    new("--answer-tokens", type=int, default=3000, metavar="TOKENS", help="(3000)")


def run(args: argparse.Namespace) -> int:
    """Record if no recording is named, then draw; 0 when all files are written."""
    out = console()
    recorded = args.recording
    if recorded is None:
        say(out, "Serving the small reasoner and recording one answer; this takes a minute.")
        recorded = record_example(args.output, args.budget, args.answer_tokens)
        say(out, f"wrote {recorded}")
    lines = read_recording(recorded)
    if args.list:
        rows = [(name, str(count)) for name, count in requests_of(lines).items()]
        table(out, str(recorded), ("request", "rounds"), rows)
        return 0
    recording = request_recording(lines, args.request)
    # Imported here: `--list` needs no pictures.
    from triattention_vllm.tools.garage_plot import plot_garage

    page = args.html or recorded.with_name("garage.html")
    write_page(recording, page)
    pictures = args.plot or [recorded.with_name("garage.png")]
    for picture in pictures:
        plot_garage(recording, picture)
    say(
        out,
        f"Request {recording.request}: {recording.num_tokens:,} tokens in {recording.most_held} "
        f"blocks at most instead of {recording.num_full}; {len(recording.rounds)} rounds freed "
        f"{recording.num_freed} blocks.",
    )
    for file in (page, *pictures):
        say(out, f"wrote {file}")
    return 0


def record_example(folder: Path, budget: int, answer_tokens: int) -> Path:
    """Serve the small reasoner, let it answer once; returns the recording in ``folder``."""
    if not 1 <= answer_tokens <= _MOST_TOKENS:
        raise SettingsError(f"--answer-tokens is {answer_tokens}; allowed are 1 to {_MOST_TOKENS}.")
    from openai import OpenAI

    from triattention_vllm.tools.server import serving

    folder.mkdir(parents=True, exist_ok=True)
    recorded = folder / "rounds.jsonl"
    recorded.unlink(missing_ok=True)
    arguments = [
        *SERVE_ARGUMENTS,
        f"--max-model-len={MAX_MODEL_LEN}",
        *compression(budget),
        "--kv-compression-config.interval=64",
        f"--kv-compression-config.trace={recorded.resolve()}",
    ]
    log_path, variables = folder / "server.log", environment(folder)
    with serving(MODEL, arguments, log_path, environment=variables) as server:
        client = OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=900)
        client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": problems()[0].prompt}],
            max_tokens=answer_tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
    return recorded
