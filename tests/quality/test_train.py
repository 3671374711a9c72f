"""The training is one command that learns, goes on where it stopped and writes what vLLM loads."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from processes import left_after
from quality import train
from quality.batches import NOT_LEARNED, TASKS, Batch
from quality.muon import Muon
from quality.train import Batches, Plan, Training, arithmetic
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(BENCHMARKS),
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than these steps
}


def command(folder: Path, steps: int) -> list[str]:
    """Train until this step."""
    return [sys.executable, "-m", "quality.train", "--folder", str(folder), "--steps", str(steps)]


def trained(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The log of a run until this step."""
    subprocess.run(command(folder, steps), env=ENVIRONMENT, check=True, timeout=500)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_two_ranks_learn_and_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = trained(folder, 40)
    assert second["loss"] < first["loss"] - 0.5
    assert [line["tokens"] for line in (first, second)] == [20 * 4096, 40 * 4096]
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 60}\n')  # of a run that was stopped behind its checkpoint
    assert [line["step"] for line in trained(folder, 60)] == [20, 40, 60]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, checkpoint["model"][name].bfloat16())


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Regression: not where SIGINT is ignored, as in the background of a script."""
    folder = tmp_path / "run"
    in_the_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(folder, 1000)]
    started = subprocess.Popen(in_the_background, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 200
        while not (folder / "log.jsonl").is_file():
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        children = psutil.Process(started.pid).children(recursive=True)
    finally:
        started.terminate()
        started.wait(60)
    assert len(children) >= 2
    left = left_after(children, 60)
    for process in left:
        process.kill()
    assert not left


def test_batches_made_ahead_by_other_processes_are_the_same() -> None:
    batches = Batches(Plan(steps=12), 1, 2)
    here, ahead = list(batches.after(7, 0)), list(batches.after(7, 2))
    assert len(here) == len(ahead) == 5
    for one, other in zip(here, ahead, strict=True):
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_a_step_runs_wholly_on_the_device_that_is_named() -> None:
    """The meta device stands for a GPU: operations between it and the CPU raise. It has no values,
    so no step can depend on them: late, all that is read is learned."""
    training = Training(replace(Plan(), most_reads=1), 1, torch.device("meta"))
    for step in (0, Plan.late_from + 1):
        _, loss, right = training.train_step(Batches(training.plan, 0, 1)[step])
        assert loss.device.type == right.device.type == "meta"


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_left_to_processors_that_are_fast_at_it(
    amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert arithmetic(torch.device("cpu")) == expected
    assert arithmetic(torch.device("cuda")) == torch.bfloat16
    training = Training(Plan(), 1, torch.device("cpu"))
    matrices = training.optimizers[0]
    assert isinstance(matrices, Muon)
    assert matrices.dtype == training.model.model.dtype == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_late_only_problems_with_doubtful_answers_are_learned(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems are read in turn until two are doubtful; where there are fewer, the least likely are
    learned too. The step is that of a batch of those two: in float32, where rounding hides nothing
    that differs."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    short = replace(Plan(), tokens_per_step=((128, 256),), lengths=(128,), late_lengths=(128,))
    plan = replace(short, late_from=1)
    first, batch = Batches(plan, 0, 1)[0], Batches(plan, 0, 1)[1]
    assert [len(first.ids), len(batch.ids)] == [2, 2 * plan.most_reads]
    one, other = (Training(plan, 1, torch.device("cpu")) for _ in range(2))
    for training in (one, other):
        training.train_step(first)
    _, chances = answered(one, batch)
    # The third and fourth are less likely than the first two.
    batch = batch.rows(chances.sum(1).argsort(descending=True)[[0, 5, 7, 6, 1, 2, 3, 4]])
    predicted, chances = answered(one, batch)
    surprise = -chances.sum(1)
    # So many of the eight are doubtful.
    bar = surprise.quantile(1 - share).item() + {0.0: 0.1, 1.0: -0.1}.get(share, 0.0)
    monkeypatch.setattr(train, "DOUBTFUL", bar)
    doubtful = [row for row in range(8) if surprise[row] >= bar]
    assert len(doubtful) == {0.0: 0, 0.1: 1, 0.4: 3, 1.0: 8}[share]
    others = [row for row in surprise.argsort(descending=True).tolist() if row not in doubtful]
    learned = (doubtful + others)[:2]
    num_read = doubtful[1] + 1 if len(doubtful) > 1 else 8
    read, loss, right = one.train_step(batch)
    other.train_step(batch.rows(torch.tensor(learned)))
    assert one.num_tokens == other.num_tokens == 2 * 256
    assert torch.equal(read.ids, batch.ids[:num_read])
    assert torch.equal(right, (predicted == batch.labels)[:num_read])
    torch.testing.assert_close(loss, -(chances * batch.weights).sum(1)[:num_read].mean())
    for name, weights in one.model.state_dict().items():
        torch.testing.assert_close(weights, other.model.state_dict()[name])


def answered(training: Training, batch: Batch) -> tuple[Tensor, Tensor]:
    """The likeliest words and the log-probabilities of the right ones, 0 where none is learned,
    both [B, T], of problems read one by one, as a step reads them."""
    with torch.no_grad():
        logits = torch.cat([training.model(problem).float() for problem in batch.ids.split(1)])
    of_labels = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return logits.argmax(-1), of_labels.where(batch.labels != NOT_LEARNED, 0.0)


def test_learning_rates_rise_stay_and_fall_from_a_lower_one() -> None:
    plan = Plan()
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[: plan.warm_up] == [(step + 1) / plan.warm_up for step in range(plan.warm_up)]
    assert set(rates[plan.warm_up : plan.late_from]) == {1.0}
    falling = rates[plan.late_from :]
    assert falling == sorted(falling, reverse=True)
    assert falling[:: plan.late_half][:4] == pytest.approx(
        [plan.late_rate, plan.late_rate / 2, plan.late_rate / 3, plan.late_rate / 4]
    )
    assert 0 < falling[-1] < falling[-plan.cool_down] / plan.cool_down


def test_a_shorter_run_is_the_beginning_of_a_longer_one_but_for_its_end() -> None:
    plan = Plan()
    shorter = replace(plan, steps=plan.steps - 1000)
    end = shorter.steps - plan.cool_down + 1
    rates, less = ([own.rate(step) for step in range(own.steps)] for own in (plan, shorter))
    assert less[:end] == rates[:end]
    assert all(one < other for one, other in zip(less[end:], rates[end:], strict=False))


def test_late_the_model_is_the_moving_average_of_the_steps_weights(tmp_path: Path) -> None:
    """Early it is that of the last step, and a run that stopped goes on with the same average."""
    short = replace(Plan(), tokens_per_step=((128, 256),), lengths=(128,), late_lengths=(128,))
    plan = replace(short, late_from=2, average_decay=0.9)
    training = Training(plan, 1, torch.device("cpu"))
    batches = Batches(plan, 0, 1)
    for step in range(6):
        if step == 4:
            training.save(tmp_path)
            training = Training(plan, 1, torch.device("cpu"))
            training.resume(tmp_path)
        training.train_step(batches[step])
        weights = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        if step < plan.late_from:
            expected = weights
        else:
            expected = {name: 0.9 * expected[name] + 0.1 * new for name, new in weights.items()}
        for name, averaged in training.average.module.state_dict().items():
            torch.testing.assert_close(averaged, expected[name])
    moved = max((expected[name] - new).abs().max() for name, new in weights.items())
    assert moved > 1e-4
    training.save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, own in training.average.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], own.bfloat16())


def test_every_problem_of_the_plan_is_as_long_as_its_stage_says() -> None:
    plan = Plan()
    lengths = [plan.length(step) for step in range(plan.steps)]
    for (end, longest), (start, _) in zip(plan.stages[1:], plan.stages, strict=False):
        assert max(lengths[start:end]) == longest
    assert plan.stages[-1][0] == plan.late_from
    assert set(lengths[plan.late_from :]) == set(plan.late_lengths)
    assert max(plan.late_lengths) == max(plan.lengths)


@pytest.mark.parametrize("steps", [Plan.steps, 4000])
def test_late_and_at_last_the_tasks_of_the_plan_take_turns(steps: int) -> None:
    plan = Plan(steps)
    batches = Batches(plan, 0, 1)
    late, last = (
        next(step for step in range(start, plan.steps) if plan.length(step) == 512)
        for start in (plan.late_from, steps - plan.last_steps)
    )
    streams = {"recall", "unbroken", "needle", "scattered"}
    taught = {"changed", "dense", "dfs", "add"} | streams
    for step, order, names in (
        (late, plan.late_tasks, taught),
        (last, plan.last_tasks, taught - {"unbroken"}),
    ):
        assert {TASKS[task] for task in order} == names
        tasks = batches[step].tasks.tolist()
        turns = [(order[start:] + order[:start]) for start in range(len(order))]
        assert tuple(tasks[: len(order)]) in turns
