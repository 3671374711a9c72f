"""Published benchmarks against any running server, through the OpenAI API, graded by lm-eval.

    PYTHONPATH=benchmarks python -m quality.served --base-url http://localhost:8000 --model NAME
        --output FOLDER [--tasks aime24 ...] [--samples N] [--limit N] [--data TASK=FILE]

Needs ``pip install "lm_eval[api,ruler]" transformers``: tasks, graders and the progress bar. Every
sample of every task is a file in FOLDER; one that is there is not asked for again, and an
interrupted one goes on from the answers it has. A folder holds the answers of one server to
questions asked in one way: FOLDER/asked.json says which, and what differs is refused. Prints the
mean over samples beside the paper's figures. RULER's tasks (``niah_...``, ``ruler_vt``, ...) are
made in ``--lengths``, counted by the model's tokenizer. Given with ``--data`` are the public
depth-first state queries (``dfs_state_query``) and LiveCodeBench's problems (``livecodebench``),
whose programs are written to FOLDER/livecodebench.json for LiveCodeBench's own evaluator, which
runs and grades them.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quality.lm_eval_tasks import livecodebench

Json = dict[str, Any]
OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
GIVEN = ("dfs_state_query", "livecodebench")
"""Tasks whose data are given with ``--data``."""
ASKED = ("base_url", "model", "limit", "lengths", "max_tokens", "temperature", "top_p")
"""What all answers of a folder have in common."""
CODE = "livecodebench"
TASKS = ("aime24", "aime25", "minerva_math500", "gpqa_diamond_cot_zeroshot")
PUBLISHED = {
    (
        "aime24",
        "exact_match",
    ): "Qwen3-8B: full 57.1, TriAttention 42.1 at 2048 and 54.6 at 4096",
    (
        "aime25",
        "exact_match",
    ): "Qwen3-8B: full 40.8, TriAttention 32.9 at 2048 and 40.8 at 3072",
    ("minerva_math500", "math_verify"): "Qwen3-8B: full 69.6, TriAttention 56.0 at 512 and 68.4 at "
    "1024",
}
"""By task and lm-eval's metric, at budgets in tokens (arXiv 2604.04921)."""


def check_folder(arguments: argparse.Namespace) -> None:
    """Note in the folder of whom and how is asked.

    Raises SystemExit where the answers that it has were asked for otherwise."""
    asked = {name: vars(arguments)[name] for name in ASKED}
    if arguments.tokenizer is not None:
        asked["tokenizer"] = arguments.tokenizer
    for task, file in arguments.data:
        asked[f"data of {task}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    path = arguments.output / "asked.json"
    before: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    differing = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in asked.items()
        if before.get(name, value) != value
    ]
    if differing:
        raise SystemExit(
            f"{arguments.output} has answers that were asked for otherwise: "
            f"{'; '.join(differing)}. Give another --output, or ask as before."
        )
    path.write_text(json.dumps(before | asked, indent=1) + "\n", encoding="utf-8")


def sample(arguments: argparse.Namespace, task: str, idx: int) -> Json:
    """lm-eval's results of one sample of a task, asked for unless the folder has them."""
    folder: Path = arguments.output
    path = folder / f"{task}-{idx}.json"
    if path.is_file():
        kept: Json = json.loads(path.read_text(encoding="utf-8"))
        return kept
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lengths = {"max_seq_lengths": arguments.lengths, "tokenizer": arguments.tokenizer}
    found = simple_evaluate(
        model="local-chat-completions",
        model_args={
            "model": arguments.model,
            "base_url": f"{arguments.base_url.rstrip('/')}/v1/chat/completions",
            "num_concurrent": arguments.concurrent,
            "max_length": arguments.max_tokens,
            "timeout": 24 * 3600,
            "seed": idx,
        },
        tasks=[_task(arguments, task)],
        apply_chat_template=True,
        gen_kwargs={
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "max_gen_toks": arguments.max_tokens,
            # A model that thinks may say what ends a task's answers in the middle of its own.
            "until": [],
        },
        # Worked examples would lengthen the prompt, which is protected while it is short.
        num_fewshot=0,
        use_cache=str(folder / f"{task}-{idx}"),
        task_manager=TaskManager(include_path=str(OWN_TASKS), metadata=lengths),
        limit=arguments.limit,
        log_samples=task == CODE,
        random_seed=idx,
    )
    results: Json = found["results"][task]
    if task == CODE:
        results["programs"] = livecodebench.programs(found["samples"][task])
    text = json.dumps(results, indent=1, default=str)
    path.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def _task(arguments: argparse.Namespace, task: str) -> str:
    """lm-eval's name of the task, or a task file that is the same but for where its data lie."""
    file = dict(arguments.data).get(task)
    if file is None:
        return task
    from lm_eval.tasks import TaskManager

    splits = {split: str(Path(file).resolve()) for split in ("train", "test")}
    tasks = TaskManager(include_path=str(OWN_TASKS))
    content = {
        "include": str(tasks.task_index[task].yaml_path),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": splits},
    }
    path: Path = arguments.output / f"{task}.yaml"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return str(path)


def table(figures: dict[str, list[Json]]) -> str:
    """Every metric of every task, in percent: mean and spread over the samples."""
    lines = [
        "| task | metric | samples | measured | published |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, samples in figures.items():
        for name, value in samples[0].items():
            is_metric = isinstance(value, (int, float)) and "," in name and "stderr" not in name
            if not is_metric or value < 0:  # RULER says -1 for lengths that were not asked for
                continue
            values = [100 * one[name] for one in samples]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            published = PUBLISHED.get((task, name.split(",")[0]), "")
            lines.append(
                f"| {task} | {name} | {len(values)} | {mean(values):.1f}{spread} | {published} |"
            )
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; sampling as published."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of lm-eval, by name")
    parser.add_argument("--samples", type=int, default=8, help="of each question")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--data", nargs="+", type=_task_file, default=[], help="TASK=FILE, JSON")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="of RULER's tasks")
    parser.add_argument("--tokenizer", help="folder or name, for RULER's tasks")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    arguments = parser.parse_args(words)
    made = [task for task in arguments.tasks if task.startswith(("niah", "ruler"))]
    if made and arguments.tokenizer is None:
        parser.error(f"{made} are made in lengths of tokens: give --tokenizer, a folder or a name")
    for task in set(GIVEN) & set(arguments.tasks) - set(dict(arguments.data)):
        parser.error(f"{task} has no data of its own: give --data {task}=FILE")
    return arguments


def _task_file(text: str) -> tuple[str, str]:
    task, _, file = text.partition("=")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} names no file; give TASK=FILE")
    return task, file


def main() -> None:
    """Ask, grade, report."""
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_folder(arguments)
    figures = {
        task: [sample(arguments, task, idx) for idx in range(arguments.samples)]
        for task in arguments.tasks
    }
    print(table(figures))
    if CODE in figures:
        path = arguments.output / f"{CODE}.json"
        runs = [one["programs"] for one in figures[CODE]]
        path.write_text(json.dumps(livecodebench.for_the_evaluator(runs)), encoding="utf-8")
        print(
            f"\nLiveCodeBench grades its programs: python -m lcb_runner.runner.custom_evaluator "
            f"--scenario codegeneration --custom_output_file {path}"
        )


if __name__ == "__main__":
    main()
