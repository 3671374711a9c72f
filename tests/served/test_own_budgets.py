"""Budgets of single requests over HTTP: what cannot be served is answered with 400 and why."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from triattention_vllm.tools.server import Server

BAD: list[tuple[object, str]] = [
    ({"kv_budget": 10**30}, "between -2**63 and 2**64 - 1"),
    ({"kv_budget": 2**63}, "allowed here is at most 2032 tokens"),
    ({"kv_budget": 2033}, "allowed here is at most 2032 tokens"),
    ({"kv_budget": -1}, "budget is -1"),
    ({"kv_budget": 0}, "budget is 0"),
    ({"kv_budget": 95}, "set it to at least 96 tokens"),
    ({"kv_budget": True}, "budget 1 is below window 32"),
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
            assert (status, reason in answer) == (400, True), f"{xargs}: {status} {answer}"
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


def test_requests_by_their_own_budget_hold_as_much_as_they_asked_for(server: Server) -> None:
    """Alone, at the end of an answer of 1200 tokens: 512 + 64 tokens, all of them, or 256 + 64."""
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
    assert held["off"] >= 1200 // 32 - 2


def test_parallel_samples_share_their_requests_budget(server: Server) -> None:
    status, answer = ask_chat(server, {"kv_budget": 128}, 500, n=3, temperature=1, seed=5)
    assert status == 200
    choices = json.loads(answer)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 3
