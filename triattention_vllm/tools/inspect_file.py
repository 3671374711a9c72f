"""``triattention inspect``: what a statistics file holds, and how two of them differ."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Statistics, import_published
from triattention_vllm.tools.head_kinds import (
    NO_ROPE,
    count_kinds,
    kinds,
    reach,
    read_frequencies,
)
from triattention_vllm.tools.terminal import console, say, table

Head = tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without --model or --rope-theta the file has no frequencies, so heads have no kind."""
    parser.usage = "%(prog)s FILE [--model MODEL | --rope-theta BASE] [options]"
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="statistics file, or a published .pt file")
    add("--compare", type=Path, metavar="FILE", help="second file of the same model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="config.json, folder or name: RoPE frequencies")
    source.add_argument("--rope-theta", type=float, metavar="BASE", help="base of a plain RoPE")
    add("--heads", type=_head, nargs="+", metavar="L.H", help="heads to show (one of each kind)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> int:
    """Print what is in the file; 0.

    Raises StatisticsError for a file that is none, for heads that it does not hold, and for two
    files of different models.
    """
    if args.rope_theta is not None and args.rope_theta <= 1:
        raise StatisticsError(f"--rope-theta is {args.rope_theta:g}; it must be above 1")
    statistics = load(args.file)
    summary = summarise(statistics, args.file)
    frequencies = reaches = None
    if args.model is not None or args.rope_theta is not None:
        frequencies = read_frequencies(statistics, args.model, args.rope_theta)
        reaches = reach(statistics, frequencies)
        summary["kinds"] = count_kinds(kinds(statistics, reaches))
    chosen = args.heads or _examples(statistics, reaches)
    summary["heads"] = [_one_head(statistics, head, reaches) for head in chosen]
    if args.compare is not None:
        summary["comparison"] = compare(statistics, load(args.compare))
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        _show(summary, args)
    if args.plot is not None:
        from triattention_vllm.tools.inspect_plot import plot_statistics

        plot_statistics(statistics, frequencies, reaches, chosen, args.plot)
        if not args.json:
            print(f"wrote {args.plot}")
    return 0


def load(file: Path) -> Statistics:
    """A statistics file, or a published ``.pt`` one."""
    return import_published(file) if file.suffix == ".pt" else Statistics.load(file)


def summarise(statistics: Statistics, file: Path) -> dict[str, Any]:
    """Model, provenance, and per layer the concentration R over heads and frequencies."""
    model = statistics.fingerprint
    per_head = statistics.concentration().mean(-1)  # [L, H]
    return {
        "file": str(file),
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rotary_dims": sorted(set(model.rotary_dims)),
        "pairing": "interleaved" if model.interleaved else "half",
        "provenance": dict(statistics.provenance),
        "concentration": [
            {
                "layer": layer_idx,
                "mean": round(float(row.mean()), 4),
                "lowest": round(float(row.min()), 4),
                "highest": round(float(row.max()), 4),
            }
            for layer_idx, dim, row in zip(
                model.layer_indices, model.rotary_dims, per_head, strict=True
            )
            if dim
        ],
    }


def compare(mine: Statistics, other: Statistics) -> dict[str, Any]:
    """Cosine of the centres of each head, and how far the magnitudes ``a_f`` are apart.

    cosine: ``Re <qbar, qbar'> / (|qbar| |qbar'|)`` over frequencies. magnitude_change: mean over
    heads and frequencies of ``|a'_f / a_f - 1|``, where ``a_f`` is not 0.
    Raises StatisticsError where the files describe different layers, heads or frequencies.
    """
    a, b = mine.fingerprint, other.fingerprint
    shapes = [
        (one.layer_indices, one.num_heads, one.rotary_dims, one.interleaved) for one in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise StatisticsError(
            f"the files describe different models: {a.num_layers} layers of {a.num_heads} query "
            f"heads with rotary dims {sorted(set(a.rotary_dims))}, and {b.num_layers} of "
            f"{b.num_heads} with {sorted(set(b.rotary_dims))}; compare two files of one model"
        )
    rotated = torch.tensor([dim > 0 for dim in a.rotary_dims])
    cosine = _cosine(mine.centre()[rotated], other.centre()[rotated])
    before, after = mine.magnitude[rotated].double(), other.magnitude[rotated].double()
    ratio = (after / before)[before > 0]
    lowest = int(cosine.argmin())
    layer_row, head_idx = divmod(lowest, a.num_heads)
    layers = [idx for idx, dim in zip(a.layer_indices, a.rotary_dims, strict=True) if dim]
    return {
        "cosine_mean": round(float(cosine.mean()), 5),
        "cosine_lowest": round(float(cosine.min()), 5),
        "lowest_head": f"{layers[layer_row]}.{head_idx}",
        "magnitude_change": round(float((ratio - 1).abs().mean()), 5),
        "cosine_by_layer": [round(value, 5) for value in cosine.mean(1).tolist()],
        "same_weights": None
        if None in (a.weights_hash, b.weights_hash)
        else a.weights_hash == b.weights_hash,
    }


def _cosine(mine: Tensor, other: Tensor) -> Tensor:
    """[L, H] of complex [L, H, F]; 1 where both are zero."""
    product = (mine * other.conj()).real.sum(-1)
    lengths = mine.abs().square().sum(-1).sqrt() * other.abs().square().sum(-1).sqrt()
    return torch.where(lengths > 0, product / lengths.clamp(min=1e-30), torch.ones_like(product))


def _head(text: str) -> Head:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LAYER.HEAD, such as 3.0")
    return int(found[1]), int(found[2])


def _examples(statistics: Statistics, reaches: Tensor | None) -> list[Head]:
    """One head of each kind, the most concentrated one; without frequencies the most and the least
    concentrated head of the file."""
    model = statistics.fingerprint
    per_head = statistics.concentration().mean(-1)
    found: dict[str, Head] = {}
    order = per_head.flatten().argsort(descending=True).tolist()
    names = None if reaches is None else kinds(statistics, reaches)
    for place in order:
        row, head_idx = divmod(place, model.num_heads)
        name = f"R{len(found)}" if names is None else names[row][head_idx]
        if name != NO_ROPE:
            found.setdefault(name, (model.layer_indices[row], head_idx))
    heads = list(found.values())
    return sorted(heads) if names is not None else [heads[0], heads[-1]]


def _one_head(statistics: Statistics, head: Head, reaches: Tensor | None) -> dict[str, Any]:
    """Concentration, and kind and reach where frequencies are known."""
    model = statistics.fingerprint
    layer_idx, head_idx = head
    if layer_idx not in model.layer_indices or head_idx >= model.num_heads:
        raise StatisticsError(
            f"the file has no head {layer_idx}.{head_idx}; it holds heads 0 to "
            f"{model.num_heads - 1} of layers {list(model.layer_indices)}"
        )
    row = model.layer_indices.index(layer_idx)
    found: dict[str, Any] = {
        "head": f"{layer_idx}.{head_idx}",
        "concentration": round(float(statistics.concentration()[row, head_idx].mean()), 4),
    }
    if reaches is not None:
        found["kind"] = kinds(statistics, reaches)[row][head_idx]
        found["reach"] = int(reaches[row, head_idx])
    return found


def _show(summary: dict[str, Any], args: argparse.Namespace) -> None:
    out = console()
    provenance = summary["provenance"]
    say(
        out,
        f"{summary['file']}: {summary['architecture'] or 'unnamed architecture'}, "
        f"{summary['num_layers']} layers of {summary['num_heads']} query heads, head dim "
        f"{summary['head_dim']}, rotated dims {summary['rotary_dims']} ({summary['pairing']} "
        "pairing).",
    )
    for name, value in provenance.items():
        say(out, f"  {name}: {value}")
    rows = [
        [str(row["layer"]), *(f"{row[key]:.3f}" for key in ("mean", "lowest", "highest"))]
        for row in summary["concentration"]
    ]
    title = "Concentration R of the heads, 0 (spread) to 1 (one direction)"
    table(out, title, ["layer", "mean", "lowest", "highest"], rows)
    if "kinds" in summary:
        counts = ", ".join(f"{count} {name}" for name, count in summary["kinds"].items())
        say(out, f"\nHeads by reach: {counts}.")
    else:
        say(out, "\nThe kinds of heads need RoPE frequencies: add --model or --rope-theta.")
    columns = list(summary["heads"][0])
    table(out, "Heads", columns, [[str(one[c]) for c in columns] for one in summary["heads"]])
    if "comparison" in summary:
        found = summary["comparison"]
        say(
            out,
            f"\nAgainst {args.compare}: cosine of the centres {found['cosine_mean']:.4f} on "
            f"average, lowest {found['cosine_lowest']:.4f} (head {found['lowest_head']}); "
            f"magnitudes differ by {found['magnitude_change']:.1%} on average.",
        )
