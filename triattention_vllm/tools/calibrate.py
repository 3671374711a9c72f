"""``triattention calibrate``: make the statistics file of a model, or import a published one."""

import argparse
import json
from pathlib import Path
from typing import Any

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Statistics, import_published


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.add_argument("--model", help="model name or folder, as for `vllm serve`")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="statistics file to write"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read instead of the shipped one"
    )
    parser.add_argument(
        "--import",
        dest="published",
        type=Path,
        metavar="FILE.pt",
        help="convert a published file; with --model, start the model to check that it fits",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--engine-args",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"max_model_len\": 8192}'",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output file")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the file and print a summary on standard output. Returns the exit status, 0.

    Raises StatisticsError for arguments that contradict each other, an output file that exists,
    or whatever keeps the statistics from being made.
    """
    from triattention_vllm.engine.offline import calibrate_model, check_statistics

    _check(args)
    engine_arguments = {"tensor_parallel_size": args.tensor_parallel_size, **args.engine_args}
    if args.published is not None:
        statistics = import_published(args.published)
        if args.model is not None:
            check_statistics(args.model, str(args.published), engine_arguments)
    else:
        text = None if args.text is None else str(args.text)
        statistics = calibrate_model(args.model, text, engine_arguments)
    statistics.save(args.output)
    summary = summarise(statistics, args.output)
    print(json.dumps(summary, indent=2) if args.json else _in_words(summary))
    return 0


def summarise(statistics: Statistics, output: Path) -> dict[str, Any]:
    """What is in the file: model, tokens, and per layer the mean concentration ``R_f`` over heads
    and frequencies (None in a layer without rotary embedding)."""
    fingerprint = statistics.fingerprint
    means = statistics.concentration().mean(dim=(1, 2)).tolist()
    return {
        "output": str(output),
        "architecture": fingerprint.architecture,
        "num_layers": fingerprint.num_layers,
        "num_heads": fingerprint.num_heads,
        "tokens_seen": statistics.provenance["tokens_seen"],
        "text": statistics.provenance["text"],
        "mean_concentration": {
            str(layer_idx): round(mean, 4) if rotary_dim else None
            for layer_idx, rotary_dim, mean in zip(
                fingerprint.layer_indices, fingerprint.rotary_dims, means, strict=True
            )
        },
    }


def _in_words(summary: dict[str, Any]) -> str:
    layers = [
        f"  layer {layer_idx:>3}  {'no rotary embedding' if mean is None else f'{mean:.3f}'}"
        for layer_idx, mean in summary["mean_concentration"].items()
    ]
    return "\n".join(
        [
            f"Wrote {summary['output']}: {summary['architecture'] or 'unnamed architecture'}, "
            f"{summary['num_layers']} layers of {summary['num_heads']} query heads, "
            f"{summary['tokens_seen']} tokens of {summary['text']}.",
            "Mean concentration R of the queries before RoPE, 0 (spread) to 1 (one direction):",
            *layers,
        ]
    )


def _check(args: argparse.Namespace) -> None:
    if args.model is None and args.published is None:
        raise StatisticsError(
            "neither --model nor --import is given; name the model to calibrate, or the "
            "published file to convert"
        )
    if args.published is not None and args.text is not None:
        raise StatisticsError("--text has no meaning with --import, which reads no text; drop it")
    if args.text is not None and not args.text.is_file():
        raise StatisticsError(f"--text names {args.text}, which is not a file; give a text file")
    if args.output.exists() and not args.force:
        raise StatisticsError(
            f"{args.output} exists; choose another --output, or overwrite it with --force"
        )
    if not args.output.parent.is_dir():
        raise StatisticsError(
            f"the folder {args.output.parent} of --output does not exist; create it first"
        )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, such as '{\"max_model_len\": 1}'")
    return value
