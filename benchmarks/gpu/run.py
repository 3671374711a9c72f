"""The main stages of what needs a GPU, in one go of less than ten minutes.

    python benchmarks/gpu/run.py [--output FOLDER] [--minutes 9.5] [--only STAGE...]

Without ``--only``, correctness first: ``tests`` (the kernel tests on real Triton), ``dense`` (a
compressed engine against a float64 reference), ``kernels`` (the kernel benchmark), ``engine``
(compressed against full attention). Further stages, each of which takes the time for itself:
``sanitizer`` and the other cases of ``decode.py``. Each stage runs in processes of its own with a
time limit, and writes what it has as it goes; one that fails stops nothing. Needs torch, triton,
pytest, pytest-timeout and hypothesis, a C compiler for Triton, and for engines vLLM, in the
environment of this Python or in the folder ``--site``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS_TO_END = 5.0
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
GROUP = "vllm.general_plugins"
BACKLOGS = ("card24", "card80", "large", "caches")
Json = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One part: its command line after the Python, and its result file.

    share: of the time that is left, relative to the shares of the stages after it.
    exits: exit codes that have a name.
    """

    name: str
    command: Callable[[Path, float], list[str]]
    share: float
    result: str | None
    exits: Mapping[int, str]


def tests_command(folder: Path, seconds: float) -> list[str]:
    """Compilation ahead of time needs no GPU and is left to ``make test``. Most of the time goes
    into compiling kernels, side by side where pytest-xdist is installed.
    """
    parallel = ["-n", "8"] if find_spec("xdist") else []
    return [
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, "tests/kernels"),
        "--ignore=tests/kernels/test_compile_ahead.py",
    ]


def script_command(share: float, result: str, *words: str) -> Callable[[Path, float], list[str]]:
    """A benchmark that writes ``result``, and begins nothing after ``share`` of the time."""

    def command(folder: Path, seconds: float) -> list[str]:
        return [*words, "--output", str(folder / result), "--seconds", str(share * seconds)]

    return command


def sanitizer_command(folder: Path, seconds: float) -> list[str]:
    """Every access of the kernels is checked, so this is slow: a part of the tests, without the far
    addresses and long rows.
    """
    own = ["tests/kernels/test_compact_triton.py", "tests/kernels/test_shift_triton.py"]
    own += ["tests/kernels/test_score_triton.py", "tests/kernels/test_select_triton.py"]
    own += ["tests/kernels/test_quantised.py", "tests/kernels/test_fill_holes.py"]
    own += ["tests/kernels/test_redundancy.py"]
    chosen = ["-k", "layout or by_hand or odd or group or scales or place or requests_of"]
    return [
        *("-c", RUN_PROGRAM, "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        # torch asks the driver what it need not know, and a refusal is no error of a kernel.
        *("--report-api-errors", "no", "--target-processes", "all"),
        *(sys.executable, "-m", "pytest", "-q"),
        *("-p", "no:cacheprovider", *own, *chosen),
    ]


# Stages are run by this Python; what is no Python program takes its place.
RUN_PROGRAM = """
import os, sys
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation that is checked
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except FileNotFoundError:
    print(f"{sys.argv[1]} is not on the path")
    raise SystemExit(2)
"""


def case_command(case: str) -> Callable[[Path, float], list[str]]:
    """A case of ``decode.py``. Loads that have begun need time to end; a backlog ends by itself."""
    share = 0.95 if case in BACKLOGS else 0.85
    return script_command(share, f"{case}.json", "benchmarks/gpu/decode.py", "--case", case)


KERNELS = script_command(0.9, "kernels.json", "benchmarks/kernels.py")
DENSE = script_command(0.9, "dense.json", "benchmarks/gpu/dense.py")
NOT_RUN = "not run: its last line says why"
WRONG = {0: "passed", 1: "wrong results", 2: NOT_RUN}
ENGINES = {
    **{0: "passed", 1: "an engine failed", 2: NOT_RUN, 3: "refused"},
    4: "measured in part: time was over",
}
STAGES = (
    Stage("tests", tests_command, 3, None, {0: "passed"}),
    Stage("dense", DENSE, 2, "dense.json", WRONG | {4: "right, without CUDA graphs"}),
    Stage("kernels", KERNELS, 2, "kernels.json", WRONG),
    Stage("engine", case_command("batches"), 4, "batches.json", ENGINES),
)
SANITIZER = {0: "passed", 2: NOT_RUN, 9: "found errors"}
FURTHER_STAGES = (
    Stage("sanitizer", sanitizer_command, 1, None, SANITIZER),
    *(
        Stage(name, case_command(name), 1, f"{name}.json", ENGINES)
        for name in ("batch128", "fp8", "peers", *BACKLOGS)
    ),
)


def environment(folder: Path, site: Path | None) -> dict[str, str]:
    """The clone and ``site`` on the path, with our entry point where it is not installed."""
    own = (ROOT, ROOT / "kernels", ROOT / "benchmarks", ROOT / "tests" / "support")
    paths = [*own, *([site] if site else [])]
    found = entry_points(group=GROUP)
    if not any(entry.name == "triattention_vllm" for entry in found):
        paths.append(write_entry_point(folder / "metadata"))
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before = inherited.get("PYTHONPATH")
    joined = os.pathsep.join([*map(str, paths), *([before] if before else [])])
    settings = {
        "PYTHONPATH": joined,
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return inherited | settings


def write_entry_point(folder: Path) -> Path:
    """A distribution of metadata alone, so that vLLM finds the plugin of a plain clone."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    own = folder / "triattention_vllm-0.dist-info"
    own.mkdir(parents=True)
    (own / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n", encoding="utf-8"
    )
    lines = [f"{name} = {target}" for name, target in project["entry-points"][GROUP].items()]
    (own / "entry_points.txt").write_text(
        "\n".join([f"[{GROUP}]", *lines]) + "\n", encoding="utf-8"
    )
    return folder


def run_stage(stage: Stage, folder: Path, seconds: float, variables: Mapping[str, str]) -> Json:
    """Its status, last words and result. Ends its processes when the time is over."""
    log = folder / f"{stage.name}.log"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as messages:
        process = subprocess.Popen(
            [sys.executable, *stage.command(folder, seconds)],
            cwd=ROOT,
            env=dict(variables),
            stdout=messages,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = stage.exits.get(code, f"failed with exit code {code}")
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            interrupt_group(process)
        finally:
            end_group(process)
    return {
        "status": status,
        "seconds": time.monotonic() - began,
        "last_lines": log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:],
        "result": read_result(folder, stage),
    }


def interrupt_group(process: "subprocess.Popen[bytes]") -> None:
    """As from the keyboard, and some seconds: pytest tells its failures only at its end."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """The stage's own process group, with the engines that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def read_result(folder: Path, stage: Stage) -> Json | None:
    """What the stage has written until it ended."""
    if stage.result is None or not (folder / stage.result).exists():
        return None
    result: Json = json.loads((folder / stage.result).read_text(encoding="utf-8"))
    return result


def run(
    stages: tuple[Stage, ...],
    folder: Path,
    minutes: float,
    site: Path | None,
    options: Mapping[str, list[str]],
) -> Json:
    """All stages, each within its share of the time that is left; a summary after each."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    summary: Json = {"stages": {}}
    with tempfile.TemporaryDirectory() as name:
        variables = environment(Path(name), site)
        for idx, stage in enumerate(stages):
            left = 60 * minutes - (time.monotonic() - began)
            seconds = left * stage.share / sum(later.share for later in stages[idx:])
            print(f"== {stage.name}: at most {seconds:.0f} s", flush=True)
            extended = with_options(stage, options.get(stage.name, []))
            result = (
                run_stage(extended, folder, seconds, variables)
                if seconds > 5
                else {"status": "not begun: no time was left"}
            )
            summary["stages"][stage.name] = result
            print("\n".join(result.get("last_lines", [])), flush=True)
            print(f"== {stage.name}: {result['status']}", flush=True)
            summary["seconds"] = time.monotonic() - began
            pack_logs(folder)
            beside = folder / "summary.part"
            beside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, folder / "summary.json")
    return summary


def pack_logs(folder: Path) -> None:
    """Into one file, behind what is in it: few files may come back from a machine."""
    with tarfile.open(folder / "logs.tar", "a") as archive:
        for log in sorted(folder.glob("*.log")):
            archive.add(log, log.name)
            log.unlink()


def with_options(stage: Stage, options: list[str]) -> Stage:
    """The stage with more arguments at its end."""

    def command(folder: Path, seconds: float) -> list[str]:
        return [*stage.command(folder, seconds), *options]

    return replace(stage, command=command)


def table_of(summary: Json) -> str:
    """One line a stage, and one for each start of an engine: in which way, or why not."""
    lines = [f"{'stage':<9}{'seconds':>8}  status"]
    for name, stage in summary["stages"].items():
        lines.append(f"{name:<9}{stage.get('seconds', 0.0):>8.0f}  {stage['status']}")
        for start in (stage.get("result") or {}).get("starts", []):
            line = f"{'':<19}{start['name']} ({start['way']}) {start['status']}"
            lines.append(f"{line}: {start['reason']}" if "reason" in start else line)
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run. Ends with 1 unless every stage passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "gpu" / "results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    every = (*STAGES, *FURTHER_STAGES)
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in every])
    parser.add_argument("--site", type=Path, help="where parts.py has unpacked vLLM")
    parser.add_argument("--layers", type=int, help="of the engines' model; default: its own")
    parser.add_argument("--budget", type=int, default=2048, help="of the engines with compression")
    parser.add_argument("--sides", nargs="+", help="of the engines; default: all of the case")
    parser.add_argument("--ways", nargs="+", help="to start engines in; default: all, in turn")
    parser.add_argument("--kernel-budgets", nargs="+", help="of the kernels; default: all of them")
    parser.add_argument("--commit", help="what is measured, where this is not a git clone")
    args = parser.parse_args()
    commit = ["--commit", args.commit] if args.commit else []
    engines = ["--budget", str(args.budget), *commit]
    engines += ["--layers", str(args.layers)] if args.layers else []
    engines += ["--sides", *args.sides] if args.sides else []
    ways = ["--ways", *args.ways] if args.ways else []
    budgets = ["--budgets", *args.kernel_budgets] if args.kernel_budgets else []
    options = {"kernels": [*commit, *budgets], "dense": [*commit, *ways]}
    of_cases = ("engine", *(stage.name for stage in FURTHER_STAGES if stage.result))
    options |= {name: [*engines, *ways] for name in of_cases}
    chosen = args.only or [stage.name for stage in STAGES]
    stages = tuple(stage for stage in every if stage.name in chosen)
    summary = run(stages, args.output, args.minutes, args.site, options)
    print(table_of(summary))
    print(f"results are in {args.output}")
    passed = all(stage["status"] == "passed" for stage in summary["stages"].values())
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
