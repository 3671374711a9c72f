"""Train the small reasoner from scratch: an hour of two CPU cores with AMX, else three; or a GPU.

    PYTHONPATH=benchmarks python -m quality.train --folder RUN [--steps N] [--seed S] [--device cpu]

Writes RUN/checkpoint.pt every few minutes (a later start with the same folder goes on from there),
RUN/log.jsonl (one line per 20 steps) and, at each checkpoint, RUN/model: weights (late, the moving
average of the steps' weights), config and tokenizer for vLLM. Matrices inside the blocks are
trained by Muon, everything else by AdamW; words of an answer are learned, prompts are not; late,
only answers that are likelier wrong than right. Every batch is made anew from the seed and the
step. Arithmetic is bfloat16 where that is faster, else float32. Needs a C++ compiler, as vLLM's CPU
build does. On a CPU two processes share every batch; on a GPU there is one, for which others make
the batches.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quality.batches import NOT_LEARNED, TASKS, Batch, make_batch
from quality.model import Reasoner, Shape, export
from quality.muon import Muon
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS_PER_LINE = 20
DOUBTFUL = math.log(2)
"""An answer is likelier wrong than right above this loss, summed over its words."""
RANKS = {"cpu": 2, "cuda": 1}
"""Processes that train, by device."""
BATCH_MAKERS = {"cpu": 0, "cuda": 8}
"""Processes that make a rank's batches ahead of it, by device; with none it makes them itself."""


@dataclass(frozen=True)
class Plan:
    """Lengths in turn, growing with the steps (until this step, this long at most); from
    ``late_from`` on those of ``late_lengths``, with ``late_tasks`` in turn (indices into TASKS),
    which are mostly those that are slow to learn, and of streams and haystacks those too that no
    question breaks; in the ``last_steps`` with ``last_tasks``, of which half are searches. Tokens
    per step by length (up to this length, this many). Late, when most answers are right and teach
    nothing, up to ``most_reads`` times as many problems are read as are learned, until enough are
    found whose answers are likelier wrong than right. The learning rates rise over ``warm_up``
    steps; from ``late_from`` on they fall from ``late_rate``, to a half in ``late_half`` steps, a
    third in twice as many, and in the last ``cool_down`` steps to nothing as well. Late, the model
    is the exponential moving average of the steps' weights, of which each step keeps
    ``average_decay``."""

    steps: int = 5000
    seed: int = 0
    tokens_per_step: tuple[tuple[int, int], ...] = ((512, 4096), (4096, 8192))
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    stages: tuple[tuple[int, int], ...] = (
        (400, 128), (800, 256), (1300, 512), (2000, 1024), (2300, 2048),
    )  # fmt: skip
    late_from: int = 2300
    late_lengths: tuple[int, ...] = (1024, 4096, 2048, 4096, 512, 4096)
    late_tasks: tuple[int, ...] = (7, 6, 7, 8, 0, 7, 9, 2, 7, 6, 3, 7, 4, 0)
    last_steps: int = 600
    last_tasks: tuple[int, ...] = (6, 7, 0, 6, 7, 0, 9, 7, 6, 0, 2, 7, 6, 3, 0, 7, 4)
    most_reads: int = 4
    warm_up: int = 50
    late_rate: float = 0.6
    late_half: int = 500
    cool_down: int = 300
    average_decay: float = 0.995
    matrix_rate: float = 0.02
    norm_rate: float = 0.01
    other_rate: float = 3e-3
    weight_decay: float = 0.01

    def length(self, step: int) -> int:
        """Length of the problems of a step."""
        if step >= self.late_from:
            return self.late_lengths[step % len(self.late_lengths)]
        longest = next((top for end, top in self.stages if step < end), max(self.lengths))
        now = [length for length in self.lengths if length <= longest]
        return now[step % len(now)]

    def tasks(self, step: int) -> tuple[int, ...]:
        """Late, the tasks that take turns in a step."""
        if step < self.late_from:
            return ()
        return self.late_tasks if step < self.steps - self.last_steps else self.last_tasks

    def num_rows(self, length: int, num_ranks: int) -> int:
        """Problems that each rank learns in a step."""
        tokens = next(tokens for top, tokens in self.tokens_per_step if length <= top)
        return max(1, tokens // length // num_ranks)

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        if step < self.late_from:
            return min((step + 1) / self.warm_up, 1.0)
        late = self.late_rate / (1 + (step - self.late_from) / self.late_half)
        return late * min((self.steps - step) / self.cool_down, 1.0)


class Training:
    """Model and optimizers of a run."""

    def __init__(self, plan: Plan, num_ranks: int, device: torch.device) -> None:
        self.plan = plan
        self.num_ranks = num_ranks
        self.device = device
        self.step = 0
        self.num_tokens = 0
        self.seconds = 0.0
        dtype = arithmetic(device)
        self.model = Reasoner(Shape(), plan.seed, dtype).to(device)
        inside = [
            parameter for parameter in self.model.model.layers.parameters() if parameter.dim() == 2
        ]
        norms = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        words = [self.model.model.embed_tokens.weight, self.model.lm_head.weight]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(inside, plan.matrix_rate, plan.weight_decay, dtype, num_ranks),
            torch.optim.AdamW(norms, lr=plan.norm_rate, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.AdamW(
                words, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay
            ),
        ]
        self.parameters = list(self.model.parameters())
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(plan.average_decay)
        )

    def train_step(self, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        """One update, from the gradients of all ranks. Returns those of this rank's problems that
        were read, their loss and which labels were predicted, bool [B, T], on its device and
        before the update."""
        plan = self.plan
        batch = batch.to(self.device)
        rates = (plan.matrix_rate, plan.norm_rate, plan.other_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * plan.rate(self.step)
        length = batch.ids.shape[1]
        num_rows = plan.num_rows(length, self.num_ranks)
        if len(batch.ids) == num_rows:
            losses, right = self._read(batch)
            _loss(losses, batch).backward()
        else:
            losses, right = self._learn_doubtful(batch, num_rows)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.step < plan.late_from:
            self.average.n_averaged.zero_()  # early, the average is of the last step alone
        self.average.update_parameters(self.model)
        self.step += 1
        self.num_tokens += num_rows * length * self.num_ranks
        read = batch.rows(slice(len(losses)))
        return read, _loss(losses.detach(), read), right

    def _learn_doubtful(self, batch: Batch, num_rows: int) -> tuple[Tensor, Tensor]:
        """Read problem after problem until ``num_rows`` are found whose answers are likelier wrong
        than right, and learn those, or the least likely ones where there are too few. Returns
        losses and predictions of all that were read."""
        losses, right, surprise = [], [], []
        candidates: dict[int, Tensor] = {}
        for row in range(len(batch.ids)):
            problem = batch.rows(slice(row, row + 1))
            of_labels, predicted = self._read(problem)
            losses.append(of_labels.detach())
            right.append(predicted)
            # Minus the log of the probability of all that it answers. Doubtful ones are alike, else
            # those with long answers would be all that is learned.
            surprise.append(min(float(losses[-1].sum()), DOUBTFUL))
            # What is learned is not read again: the graphs of the best ones so far are kept.
            candidates[row] = _loss(of_labels, problem)
            best = sorted(candidates, key=lambda known: -surprise[known])[:num_rows]
            candidates = {known: candidates[known] for known in sorted(best)}
            if len(best) == num_rows and surprise[best[-1]] == DOUBTFUL:
                break
        torch.stack(list(candidates.values())).mean().backward()
        return torch.cat(losses), torch.cat(right)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each label's loss, 0 where there is none, and which were predicted, both [B, T]."""
        logits = self.model(batch.ids).float()
        losses = functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, ignore_index=NOT_LEARNED, reduction="none"
        )
        return losses, logits.argmax(-1) == batch.labels

    def _average_gradients(self) -> None:
        if self.num_ranks == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.num_ranks
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self, folder: Path) -> None:
        """Write the checkpoint, whole or not at all, and the model for vLLM."""
        state = {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, folder / "checkpoint.new")
        os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")
        export(self.average.module, folder / "model")

    def resume(self, folder: Path) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        if not (folder / "checkpoint.pt").is_file():
            return
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.seconds = state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _loss(losses: Tensor, batch: Batch) -> Tensor:
    """The mean of the rows' weighted losses, from those of the labels [B, T]."""
    return (losses * batch.weights).sum(1).mean()


def arithmetic(device: torch.device) -> torch.dtype:
    """What the model computes in: bfloat16 on a GPU and on a processor with AMX, else float32.

    AVX-512 multiplies bfloat16 at half of its speed in float32 (75 and 150 GFLOP/s on a core), and
    a processor without either emulates it."""
    slower = device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    return torch.float32 if slower else torch.bfloat16


class Batches(torch.utils.data.Dataset[Batch]):
    """What a rank reads, by step."""

    def __init__(self, plan: Plan, rank: int, num_ranks: int) -> None:
        self.plan = plan
        self.rank = rank
        self.num_ranks = num_ranks

    def __getitem__(self, step: int) -> Batch:
        plan = self.plan
        length = plan.length(step)
        rows = plan.num_rows(length, self.num_ranks)
        late = plan.tasks(step)
        if late:
            rows *= plan.most_reads
        return make_batch(plan.seed, step, rows, length, self.rank, self.num_ranks, late=late)

    def after(self, step: int, makers: int) -> Iterable[Batch]:
        """Those of all steps from this one on, made ahead by so many processes, or here."""
        steps = range(step, self.plan.steps)
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=makers)


class Log:
    """Averages over STEPS_PER_LINE steps, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.right: dict[str, list[int]] = {}

    def cut(self, step: int) -> None:
        """Drop the lines after a step, from which a run goes on."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(kept), encoding="utf-8")

    def add(self, batch: Batch, loss: Tensor, right: Tensor) -> None:
        """Take in a step: graded words right and in all, by task and length."""
        self.losses.append(float(loss))
        batch, right = batch.to(torch.device("cpu")), right.cpu()
        for idx, task in enumerate(TASKS):
            rows = batch.tasks == idx
            graded = batch.graded[rows]
            counts = self.right.setdefault(f"{task}/{batch.ids.shape[1]}", [0, 0])
            counts[0] += int(right[rows][graded].sum())
            counts[1] += int(graded.sum())

    def write(self, training: Training) -> None:
        """Write a line and start over."""
        line = {
            "step": training.step,
            "tokens": training.num_tokens,
            "seconds": round(training.seconds),
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "rate": round(training.plan.rate(training.step - 1), 4),
            "right": {
                name: round(right / total, 4)
                for name, (right, total) in sorted(self.right.items())
                if total
            },
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.losses, self.right = [], {}


def train(
    rank: int,
    plan: Plan,
    folder: Path,
    num_ranks: int,
    device: torch.device,
    checkpoint_seconds: float,
) -> None:
    """Train until the last step. Rank 0 writes."""
    # So torch tells that the starting process is gone; in the background of a script it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    training = Training(plan, num_ranks, device)
    training.resume(folder)
    # Each length, alone and in a batch, is compiled for itself.
    torch._dynamo.config.recompile_limit = 16
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in training.model.model.layers:
        layer.compile(dynamic=False)
    if num_ranks > 1:
        meeting = f"file://{(folder / 'meeting').resolve()}"
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=num_ranks)
    batches = Batches(plan, rank, num_ranks).after(training.step, BATCH_MAKERS[device.type])
    log = Log(folder / "log.jsonl")
    if rank == 0:
        log.cut(training.step)
    saved = begun = time.monotonic()
    for batch in batches:
        log.add(*training.train_step(batch))
        training.seconds += time.monotonic() - begun
        begun = time.monotonic()
        if training.step % STEPS_PER_LINE == 0 and rank == 0:
            log.write(training)
        if time.monotonic() - saved > checkpoint_seconds and rank == 0:
            training.save(folder)
            saved = time.monotonic()
    if rank == 0:
        training.save(folder)


def main() -> None:
    """Start the ranks and wait for them. If one fails, or this process ends, all end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=0)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(RANKS), default=usual)
    parser.add_argument("--ranks", type=int, help="processes; 2, on a GPU 1")
    parser.add_argument("--rank", type=int, help="be this one, where the others are started apart")
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps=arguments.steps, seed=arguments.seed)
    (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")
    num_ranks = arguments.ranks or RANKS[arguments.device]
    device = torch.device(arguments.device)
    how = (plan, folder, num_ranks, device, arguments.checkpoint_seconds)
    if arguments.rank is not None:
        train(arguments.rank, *how)
        return
    (folder / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, how, nprocs=num_ranks)


if __name__ == "__main__":
    main()
