"""Engines in processes of their own, started in the first way that works."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engine as engines

Json = dict[str, Any]
HERE = Path(__file__).parent

RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}

COMPILED, GRAPHS, EAGER = (
    "compiled, full and piecewise graphs",
    "not compiled, full graphs for decoding",
    "eager",
)
# Tried in this order until the engines start; each start that fails is part of the result.
WAYS: Mapping[str, Json] = {
    COMPILED: {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    GRAPHS: {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    EAGER: {"enforce_eager": True},
}
WAY_NAMES = {"compiled": COMPILED, "graphs": GRAPHS, "eager": EAGER}
"""As the command line has them."""
# What a start is given at least. None was measured on a GPU yet: estimates with room.
LEAST_START_S = {COMPILED: 150.0, GRAPHS: 100.0, EAGER: 60.0}


def engine_environment(cache: Path) -> dict[str, str]:
    """Of a process with an engine in it; ``cache`` keeps its statistics."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("TRIATTENTION_")},
        # The run is there to verify what is refused elsewhere until it has been verified.
        "TRIATTENTION_ALLOW_UNTESTED_VLLM": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **RUNNER,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRIATTENTION_CACHE": str(cache),
    }


@contextmanager
def ended_after(side: engines.SideProcess, seconds: float) -> Iterator[None]:
    """Inside, an engine that does not answer in time is ended, and ``send`` raises."""
    timer = threading.Timer(max(seconds, 1.0), side.process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def last_lines(log: Path) -> list[str]:
    """What an engine said last."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]


def line_of_start(start: Json) -> str:
    """How a start ended, in one line."""
    line = f"{start['name']} ({start['way']}) {start['status']}"
    return f"{line}: {start['reason']}" if "reason" in start else line


def start(stack: ExitStack, name: str, request: Json, way: str, logs: Path, seconds: float) -> Json:
    """``{"status": "started", "side": ..., "engine": ...}``, ``refused`` with its reason,
    ``no room`` where the KV cache cannot hold one request, or ``failed`` with the engine's last
    words. The process ends with ``stack``, or after ``seconds`` where it has not started by then.
    """
    log = logs / f"engine-{name}.log"
    arguments = request["arguments"] | WAYS[way]
    began = time.monotonic()
    own = ExitStack()
    messages = own.enter_context(log.open("a", encoding="utf-8"))
    environment = engine_environment(Path(request["model"], "statistics"))
    side = own.enter_context(engines.side_process(HERE / "side.py", environment, messages))
    try:
        with ended_after(side, seconds):
            engine = side.send(request | {"arguments": arguments})
    except (RuntimeError, BrokenPipeError) as error:
        own.close()
        found = {"status": "failed", "way": way, "reason": str(error), "log": last_lines(log)}
        return found | no_room(log)
    if "refused" in engine:
        own.close()
        return {"status": "refused", "way": way, "reason": engine["refused"]}
    stack.push(own)
    spent = time.monotonic() - began
    return {"status": "started", "way": way, "start_s": spent, "engine": engine, "side": side}


def no_room(log: Path) -> Json:
    """What vLLM says, which it would say in every way, of a KV cache that holds no request."""
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in said if "cache is needed, which is larger than" in line]
    return {"status": "no room", "reason": found[-1].strip()} if found else {}


def start_limit(
    way: str,
    ways: Sequence[str],
    left: float,
    share: float,
    least_s: Mapping[str, float] = LEAST_START_S,
) -> float | None:
    """Seconds that a start in ``way`` may take: ``share``, or more where such a start needs more,
    with enough kept back for the last of ``ways``. None where what is ``left`` is too little for
    both; the last way has what is left.
    """
    least = least_s[way]
    kept_back = 0.0 if way == ways[-1] else least_s[ways[-1]]
    if way != ways[-1] and left < least + kept_back:
        return None
    return max(min(left - kept_back, max(least, share)), 1.0)


def too_late(way: str, left: float, least_s: Mapping[str, float] = LEAST_START_S) -> Json:
    """A start that is not begun."""
    needed = f"such a start may take {least_s[way]:.0f}, and the last way needs time too"
    return {"status": "not begun", "way": way, "reason": f"{left:.0f} s were left; {needed}"}


def start_sides(
    stack: ExitStack,
    requests: Mapping[str, Json],
    ways: Sequence[str],
    logs: Path,
    share: float,
    until: float,
) -> tuple[dict[str, engines.SideProcess], list[Json]]:
    """Engines by name, and how every start ended. All run in one way, that of the last start: the
    first of ``ways`` in which none fails, else the last one, with those that start in it.

    share: of a start, see ``start_limit``. until: when the time for everything is over.
    """
    starts: list[Json] = []
    sides: dict[str, engines.SideProcess] = {}
    for way in ways:
        own, sides = ExitStack(), {}
        for name, request in requests.items():
            left = until - time.monotonic()
            # A way in which one side runs is the only one by then.
            limit = start_limit(way, [way] if sides else ways, left, share)
            found = too_late(way, left)
            if limit is not None:
                found = start(own, name, request, way, logs, limit)
            if "side" in found:
                sides[name] = found.pop("side")
            starts.append({"name": name, **found})
            if found["status"] in ("failed", "not begun") and way != ways[-1]:
                break
        else:
            stack.push(own)
            break
        own.close()
    return sides, starts
