"""Conditions of a run, and its results as a table."""

import re
from collections.abc import Iterator

import torch
from reporting import Json, first_line, taken


def lines_of(result: Json) -> Iterator[str]:
    """The rows of the table."""
    shape = f"{result['model']:<13} {result['budget']:>5} {result['num_requests']:>3}"
    for name, own in result["operations"].items():
        times = own["product"]["device_us"]
        line = f"{shape}  {name:<18} {times['median']:>10.1f} {times['p10']:>10.1f}"
        line += f" {times['p90']:>10.1f}"
        if "refused" in own:
            yield f"{line}  NO SPEED-UP: {own['refused']}"
            continue
        line += f" {own['bytes'] / 1e9:>9.4f} {own['copy_share']:>6.1%}"
        for side in ("torch", "plain"):
            factor = own.get(f"speedup_over_{side}")
            line += "        -" if factor is None else f" {factor:>7.2f}x"
        yield line


HEADER = (
    "model         budget  R  operation            median us        p10        p90        GB"
    "   copy vs torch vs plain"
)


def conditions(device: str, commit: str | None) -> Json:
    """Where and with what the figures were taken."""
    found: Json = {
        **taken(commit),
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device != "cpu":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": driver_version(),
            "device_memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def driver_version() -> str | None:
    """None where the vendor's tool is not installed."""
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def device_name(device: str) -> str:
    """As the driver or the system names it."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def slug(name: str) -> str:
    """For file names."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def failures(report: Json) -> list[str]:
    """Checks that did not pass, one sentence each."""
    return [
        f"{result['model']}, budget {result['budget']}, {result['num_requests']} requests:"
        f" {side} {check['name']}: {check['found']}"
        for result in report["results"]
        for side, checks in result["checks"].items()
        for check in checks
        if not check["passed"]
    ]
