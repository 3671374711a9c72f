"""Engines in processes of their own, started in the first way that works."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engine as engines

Json = dict[str, Any]
HERE = Path(__file__).parent

RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}

EAGER = "eager"
# Tried in this order until an engine starts; each start that fails is part of the result.
WAYS: Mapping[str, Json] = {
    "compiled, full and piecewise graphs": {
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}
    },
    "not compiled, full graphs for decoding": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    },
    EAGER: {"enforce_eager": True},
}


@contextmanager
def side_process(log: Path, cache: Path) -> Iterator[engines.SideProcess]:
    """An engine's process, whose messages go to ``log``; ends with the block."""
    environment = engine_environment(cache)
    command = [sys.executable, str(HERE / "side.py")]
    pipe = subprocess.PIPE
    with log.open("a", encoding="utf-8") as messages:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=environment
        )
        try:
            yield engines.SideProcess(process)
        finally:
            assert process.stdin is not None
            try:
                process.stdin.close()
                process.wait(20)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()


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


def last_lines(log: Path, num_lines: int = 12) -> list[str]:
    """What an engine said last."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]


def start(stack: ExitStack, name: str, request: Json, way: str, logs: Path, seconds: float) -> Json:
    """``{"status": "started", "side": ..., "engine": ...}``, ``refused`` with its reason, or
    ``failed`` with the engine's last words. The process ends with ``stack``, or after ``seconds``
    where it has not started by then.
    """
    log = logs / f"engine-{name}.log"
    arguments = request["arguments"] | WAYS[way]
    began = time.monotonic()
    own = ExitStack()
    side = own.enter_context(side_process(log, Path(request["model"], "statistics")))
    try:
        with ended_after(side, seconds):
            engine = side.send(request | {"arguments": arguments})
    except (RuntimeError, BrokenPipeError) as error:
        own.close()
        return {"status": "failed", "way": way, "reason": str(error), "log": last_lines(log)}
    if "refused" in engine:
        own.close()
        return {"status": "refused", "way": way, "reason": engine["refused"]}
    stack.push(own)
    spent = time.monotonic() - began
    return {"status": "started", "way": way, "start_s": spent, "engine": engine, "side": side}


def start_sides(
    stack: ExitStack, requests: Mapping[str, Json], ways: list[str], logs: Path, seconds: float
) -> tuple[dict[str, engines.SideProcess], list[Json]]:
    """Engines by name, and how every start ended. The first one's way, the first of ``ways`` that
    works, is that of all others; ``seconds`` for each start.
    """
    sides: dict[str, engines.SideProcess] = {}
    starts: list[Json] = []
    for name, request in requests.items():
        for way in ways:
            started = start(stack, name, request, way, logs, seconds)
            side = started.pop("side", None)
            starts.append({"name": name, **started})
            if side is not None:
                sides[name] = side
                ways = [way]
            if started["status"] != "failed":
                break
    return sides, starts
