"""Accuracy against budget, method against method, through the real engine.

    PYTHONPATH=benchmarks python -m quality.run [--lengths N ...] [--budgets N ...]
        [--methods M ...] [--settings JSON] [--variant NAME=JSON ...] [--problems N]
        [--asynchronous] [--dfs-file FILE] [--output FILE] [--figure FILE]

For each task x length x method x budget: share of answers that are right to the last word with its
95 % interval, share of words before the first wrong one, mean output length, share of requests
that were compressed, rounds, peak blocks and tokens per second. One engine per method and budget,
all problems of a task at once, prefix caching on. Writes a table, JSON, and with ``--figure`` a
picture. What is in ``--output`` already is not measured again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from quality.grading import grade, wilson
from quality.problems import held_out_problems, public_dfs_problems
from quality.report import figure, table
from quality.results import Results
from quality.tasks.problem import Problem
from quality.vocabulary import IDS, TASKS

from triattention_vllm.config import Method

HERE = Path(__file__).parent
MODEL = HERE / "model"
FULL = "full"
METHODS = (FULL, *get_args(Method))
SHORT: dict[str, Any] = {"interval": 32}
"""Other than by default: an answer has a thousand words."""
LONGER = 1.25
"""Room for an answer to become longer than the right one."""
Json = dict[str, Any]
Problems = dict[tuple[str, int], list[Problem]]


def chosen_problems(arguments: argparse.Namespace) -> Problems:
    """Test problems by task and length; the public ones count as a task of length 0."""
    problems: Problems = {
        (task, length): held_out_problems(task, length, arguments.problems)
        for task in arguments.tasks
        for length in arguments.lengths
    }
    if arguments.dfs_file is not None:
        problems["dfs-public", 0] = public_dfs_problems(arguments.dfs_file, arguments.problems)
    return problems


def run_engine(
    problems: Problems, arguments: argparse.Namespace, settings: Json | None, cache: str
) -> Json:
    """The answers of one engine, by task and length."""
    longest = max(problem.num_words for own in problems.values() for problem in own)
    job = {
        "model": str(arguments.model.resolve()),
        "settings": settings,
        "async_scheduling": arguments.asynchronous,
        "engine": {
            "block_size": arguments.block_size,
            "kv_cache_memory_bytes": arguments.pool_mebibytes << 20,
            "max_model_len": int(longest * LONGER) + 64,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "seed": 0,
        },
        "problems": {
            f"{task}/{length}": [_request(problem) for problem in own]
            for (task, length), own in problems.items()
        },
    }
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "" if settings is None else "triattention_vllm",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "TRIATTENTION_CACHE": cache,
    }
    job_file, result_file = Path(cache, "job.json"), Path(cache, "result.json")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, str(HERE / "measure.py"), str(job_file), str(result_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the engine with {settings} failed:\n{done.stderr[-4000:]}")
    results: Json = json.loads(result_file.read_text(encoding="utf-8"))
    return results


def _request(problem: Problem) -> Json:
    expected = [IDS[word] for word in problem.answer.words]
    endless = expected[-1] != IDS["<eos>"]
    return {
        "prompt": [IDS[word] for word in problem.prompt],
        "max_tokens": len(expected) if endless else int(LONGER * len(expected)) + 8,
        "endless": endless,
    }


def rows(problems: Problems, results: Json, how: Json) -> list[Json]:
    """One row of figures per task and length."""
    found = []
    for (task, length), own in problems.items():
        result = results[f"{task}/{length}"]
        expected = [[IDS[word] for word in problem.answer.words] for problem in own]
        grades = [grade(*pair) for pair in zip(expected, result["answers"], strict=True)]
        num_right = sum(one.exact for one in grades)
        num_words = sum(len(answer) for answer in result["answers"])
        found.append(
            {
                **how,
                "task": task,
                "length": length,
                "num_problems": len(own),
                "exact": num_right / len(own),
                "interval": wilson(num_right, len(own)),
                "right_words": sum(one.right_words for one in grades) / len(own),
                "mean_output": num_words / len(own),
                "mean_expected": sum(map(len, expected)) / len(own),
                "compressed": sum(count > 0 for count in result["rounds"]) / len(own),
                "rounds": sum(result["rounds"]),
                "peak_blocks": result["peak_blocks"],
                "tokens_per_second": num_words / result["seconds"],
                "answers": hashlib.sha256(json.dumps(result["answers"]).encode()).hexdigest()[:16],
                "problems": [[one.exact, round(one.right_words, 4)] for one in grades],
            }
        )
    return found


def measure(arguments: argparse.Namespace) -> list[Json]:
    """All rows; full attention once, every other method at every budget."""
    problems = chosen_problems(arguments)
    settings = {**SHORT, **arguments.settings}
    conditions = {
        "weights": weights_hash(arguments.model),
        "settings": settings,
        "block_size": arguments.block_size,
        "asynchronous": arguments.asynchronous,
    }
    found = Results(arguments.output, conditions)
    with tempfile.TemporaryDirectory() as cache:
        for how in _ways(arguments):
            missing = {
                key: own for key, own in problems.items() if not found.has(how, *key, len(own))
            }
            if not missing:
                continue
            own_settings = None if how["method"] == FULL else _settings(settings, how)
            results = run_engine(missing, arguments, own_settings, cache)
            new = rows(missing, results, how)
            print(table(new), flush=True)
            found.add(new)
    return found.rows


def weights_hash(model: Path) -> str:
    """Of a model's file of weights: rows of one table are answers of one model."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


def _ways(arguments: argparse.Namespace) -> list[Json]:
    """Method, budget, variant and its further settings; full attention knows none of the last."""
    variants = dict(arguments.variant) or {"": {}}
    ways = []
    for method in arguments.methods:
        if method == FULL:
            ways.append({"method": FULL, "budget": None, "variant": "", "settings": {}})
            continue
        for budget in arguments.budgets:
            for name, settings in variants.items():
                way = {"method": method, "budget": budget, "variant": name, "settings": settings}
                ways.append(way)
    return ways


def _settings(settings: Json, how: Json) -> Json:
    text = {}
    if how["method"] == "triattention" and "statistics" not in how["settings"]:
        text = {"calibration_text": str(MODEL / "calibration.txt")}
    same = {"method": how["method"], "budget": how["budget"]}
    return {**settings, **text, **how["settings"], **same}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--settings", type=json.loads, default={}, help="of every method, as JSON")
    parser.add_argument(
        "--variant",
        action="append",
        type=_variant,
        default=[],
        help='a name and further settings, NAME={"selection": "union"}; may be given again',
    )
    parser.add_argument("--problems", type=int, default=40, help="of each task and length")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--pool-mebibytes", type=int, default=512)
    parser.add_argument("--asynchronous", action="store_true", help="async scheduling on")
    parser.add_argument("--dfs-file", type=Path, help="the public depth-first searches")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--figure", type=Path, help="accuracy against budget, a picture")
    return parser.parse_args(words)


def _variant(text: str) -> tuple[str, Json]:
    name, _, settings = text.partition("=")
    return name, json.loads(settings)


def main() -> None:
    """Measure and report."""
    arguments = parse()
    found = measure(arguments)
    if arguments.figure is not None:
        figure(found, arguments.figure)


if __name__ == "__main__":
    main()
