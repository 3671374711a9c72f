"""The small reasoner that comes with the package, and problems that it solves step by step.

2.4 million parameters, 128 words, one word per token: it follows a program with jumps and writes
down every value read and written. Trained and described in ``benchmarks/quality``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triattention_vllm.environment import CACHE

MODEL = Path(__file__).parents[1] / "reasoner"
CALIBRATION_TEXT = MODEL / "calibration.txt"
MAX_MODEL_LEN = 8192
LONGEST_PROMPT = 320
"""No prompt of ``problems`` has more tokens."""
SERVED_NAME = "tiny"
POOL_MEBIBYTES = 12
SERVE_ARGUMENTS = (
    f"--served-model-name={SERVED_NAME}",
    "--dtype=float32",
    "--enforce-eager",
    "--distributed-executor-backend=uni",
    "--block-size=32",
    f"--kv-cache-memory-bytes={POOL_MEBIBYTES << 20}",
    "--max-num-batched-tokens=512",
)
"""Behind ``vllm serve MODEL``: a small pool on two CPU cores."""


def compression(budget: int) -> tuple[str, ...]:
    """The flags that turn compression on, for ``budget`` tokens a request."""
    return (
        "--kv-compression=triattention",
        f"--kv-compression-config.budget={budget}",
        f"--kv-compression-config.calibration_text={CALIBRATION_TEXT}",
    )


def environment(folder: Path) -> dict[str, str]:
    """Variables of a server whose statistics are kept in ``folder``. A thread of its own for so
    small a model would only take the cores from the clients."""
    return {CACHE: str((folder / "cache").resolve()), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Problem:
    """Words with spaces between them. The answer is a trace, which goes on as long as asked for:
    these are its first words."""

    prompt: str
    answer: str


def problems() -> list[Problem]:
    """Sixteen programs that the model was not trained on; prompt and answer are 2,048 words."""
    lines = (MODEL / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return [Problem(**json.loads(line)) for line in lines]


def right_share(given: Sequence[Problem], answers: Sequence[str]) -> float:
    """Share of the words before the first wrong one, mean over the answers."""
    shares = [_right_share(*pair) for pair in zip(given, answers, strict=True)]
    return sum(shares) / len(shares)


def _right_share(problem: Problem, answer: str) -> float:
    words = answer.split()
    expected = problem.answer.split()[: len(words)]
    right = 0
    while right < len(expected) and expected[right] == words[right]:
        right += 1
    return right / max(1, len(words))
