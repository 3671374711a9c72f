"""Budgets of single requests over HTTP: what cannot be served is answered with 400 and why."""

import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from triattention_vllm.tools.server import Server

BAD: list[tuple[object, str]] = [
    # vLLM's own reason, or ours where the release passes such numbers on.
    ({"kv_budget": 10**30}, "between -2**63 and 2**64 - 1|allowed here is at most 2032 tokens"),
    ({"kv_budget": 2**63}, "allowed here is at most 2032 tokens"),
    ({"kv_budget": 2033}, "allowed here is at most 2032 tokens"),
    ({"kv_budget": -1}, "budget is -1"),
    ({"kv_budget": 0}, "budget is 0"),
    ({"kv_budget": 84}, "set it to at least 85 tokens"),
    ({"kv_budget": True}, "budget 1 is below window 0"),
    ({"kv_budget": 512.0}, "(float), allowed is a whole number of tokens"),
    ({"kv_budget": "512"}, "(str), allowed is a whole number of tokens"),
    ({"kv_budget": [512]}, "(list), allowed is a whole number of tokens"),
    ({"kv_budget": None}, "vllm_xargs"),
    ({"kv_budget": {"tokens": 512}}, "vllm_xargs"),
    ({"kv_compression": "on"}, 'allowed is \\"off\\"'),
    ({"kv_compression": 0}, 'allowed is \\"off\\"'),
    ({"kv_compression": ""}, 'allowed is \\"off\\"'),
    ({"kv_budget": 512, "kv_compression": "off"}, "contradict each other"),
    ({"kv_window": 64}, "known are kv_budget, kv_compression"),
    ("kv_budget", "vllm_xargs"),
    ([512], "vllm_xargs"),
]


def post(server: Server, path: str, **body: Any) -> tuple[int, str]:
    """Status and body of one request; a stream's body is all of its events."""
    data = json.dumps({"model": "tiny", "temperature": 0, "ignore_eos": True, **body}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.api_url}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=240) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(server: Server, xargs: object, max_tokens: int | None, **body: Any) -> tuple[int, str]:
    """A completion with ``vllm_xargs``."""
    return post(
        server, "completions", prompt="A story.", vllm_xargs=xargs, max_tokens=max_tokens, **body
    )


def ask_chat(server: Server, xargs: object, max_tokens: int | None, **body: Any) -> tuple[int, str]:
    """A chat completion with ``vllm_xargs``."""
    messages = [{"role": "user", "content": "A story."}]
    return post(
        server,
        "chat/completions",
        messages=messages,
        vllm_xargs=xargs,
        max_tokens=max_tokens,
        **body,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_bad_values_are_answered_with_400_and_the_reason(server: Server, stream: bool) -> None:
    for xargs, reason in BAD:
        for way in (ask, ask_chat):
            status, answer = way(server, xargs, 4, stream=stream)
            says_why = any(one in answer for one in reason.split("|"))
            assert (status, says_why) == (400, True), f"{xargs}: {status} {answer}"
    off = {"kv_compression": "off"}
    # A chat without max_tokens may be as long as the model allows.
    for status, answer in (
        ask(server, off, 3000, stream=stream),
        ask_chat(server, off, 3000, stream=stream),
        ask_chat(server, off, None, stream=stream),
    ):
        assert (status, "allowed here are 2032" in answer) == (400, True), answer
    status, answer = ask(server, None, 4)
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 4


def some_value(rng: random.Random, depth: int = 0) -> object:
    """Anything that JSON can say."""
    kinds = ["none", "bool", "small", "huge", "float", "text", "word"]
    kind = rng.choice(kinds if depth == 2 else [*kinds, "list", "object"])
    if kind in ("list", "object"):
        inner = [some_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return inner if kind == "list" else {f"\u2603{idx}": v for idx, v in enumerate(inner)}
    return {
        "none": None,
        "bool": rng.random() < 0.5,
        "small": rng.randint(-5, 2500),
        "huge": rng.choice([2**31, 2**63, -(2**63), 10**40]),
        "float": rng.choice([0.5, float("nan"), float("inf"), 1e308]),
        "text": rng.choice(["", "\0", "\U0001f9ca" * 3, "x" * 10_000, "off\n"]),
        "word": rng.choice(["off", "on", "512"]),
    }[kind]


def test_whatever_a_client_sends_is_served_or_refused_and_the_next_one_is_served(
    server: Server,
) -> None:
    rng = random.Random(11)
    names = ["kv_budget", "kv_compression", "kv_", "kv_\u2603", "budget", "", "kv_budget\0"]
    statuses = set()
    for _ in range(60):
        chosen = rng.sample(names, rng.randint(1, 3))
        xargs = {name: some_value(rng) for name in chosen}
        sent = xargs if rng.random() < 0.9 else some_value(rng)
        status, answer = ask(server, sent, 2, stream=rng.random() < 0.5)
        assert status in (200, 400), f"{sent}: {status} {answer[:500]}"
        assert len(answer) < 15_000
        statuses.add(status)
    assert statuses == {200, 400}
    status, answer = ask(server, {"kv_budget": 512}, 4)
    assert (status, json.loads(answer)["usage"]["completion_tokens"]) == (200, 4)
    assert server.pool_state().num_held == 0


def test_requests_by_their_own_budget_hold_as_much_as_they_asked_for(server: Server) -> None:
    """Alone, towards the end of an answer of 1200 tokens: 512 + 64 tokens, all of them, or
    256 + 64."""
    held = {}
    for name, xargs in (("own", {"kv_budget": 512}), ("off", {"kv_compression": "off"}), ("", {})):
        most = 0
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask_chat, server, xargs or None, 1200)
            while not answer.done():
                most = max(most, server.pool_state().num_held)
        assert answer.result()[0] == 200
        held[name] = most
    assert held[""] <= (256 + 64) // 32 + 1 < held["own"] <= (512 + 64) // 32 + 1
    # The last scrape may be one of some steps before the end.
    assert held["off"] > held["own"] + 2


def test_parallel_samples_share_their_requests_budget(server: Server) -> None:
    status, answer = ask_chat(server, {"kv_budget": 128}, 500, n=3, temperature=1, seed=5)
    assert status == 200
    choices = json.loads(answer)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 3
