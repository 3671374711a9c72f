"""A real server, real clients: answers far longer than the budget, aborts, and the end."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI
from openai.types import CompletionUsage

from triattention_vllm.tools.reasoner import problems
from triattention_vllm.tools.server import PoolState, Server

BUDGET, INTERVAL, BLOCK_SIZE = 256, 64, 32
# Budget and interval, and the block that a decode step may begin.
MOST_BLOCKS = (BUDGET + INTERVAL) // BLOCK_SIZE + 1
PROGRAMS = [problem.prompt for problem in problems()]
ENGINE_PROCESSES = ("(EngineCore", "(Worker", "(VllmWorker")


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=240)


def stream_chat(
    client: OpenAI, prompt: str, num_tokens: int, *, abort_after: int | None = None
) -> tuple[str, CompletionUsage | None]:
    """The text and the usage of a greedy answer; None where it was aborted."""
    text, num_chunks = "", 0
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    with stream:
        for chunk in stream:
            if chunk.usage is not None:
                return text, chunk.usage
            text += chunk.choices[0].delta.content or ""
            num_chunks += 1
            if num_chunks == abort_after:
                return text, None
    raise AssertionError("the stream ended without a usage")


def idle_pool(server: Server, client: OpenAI) -> PoolState:
    """The pool after every request has ended. vLLM brings its gauges up to date with a step, so
    a short request makes one."""
    deadline = time.monotonic() + 30
    while True:
        stream_chat(client, "step", 2)
        state = server.pool_state()
        if (state.num_running, state.num_held) == (0, 0) or time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def test_the_server_says_what_compression_buys(server: Server) -> None:
    lines = [line for line in server.log().splitlines() if "KV compression is on" in line]
    assert len(lines) == 1
    for part in (
        "triattention",
        "budget 256",
        "redundancy 50 percent",
        "made from calibration.txt",
        "of 8192 tokens",
    ):
        assert part in lines[0]


def test_an_answer_of_ten_times_the_budget_arrives_whole(server: Server, client: OpenAI) -> None:
    text, usage = stream_chat(client, PROGRAMS[0], 2600)
    assert usage is not None
    assert usage.completion_tokens == 2600
    assert len(text.split()) == 2600
    assert idle_pool(server, client).num_held == 0


def test_several_clients_share_a_pool_that_could_not_hold_them(
    server: Server, client: OpenAI
) -> None:
    lengths = [1500, 300, 1200, 900, 1500, 100]
    held = []
    with ThreadPoolExecutor(len(lengths)) as threads:
        answers = [
            threads.submit(stream_chat, client, PROGRAMS[idx], length)
            for idx, length in enumerate(lengths)
        ]
        while not all(answer.done() for answer in answers):
            held.append(server.pool_state().num_held)
            time.sleep(0.1)
    usages = [answer.result()[1] for answer in answers]
    assert [usage.completion_tokens for usage in usages if usage is not None] == lengths
    state = idle_pool(server, client)
    assert sum(lengths) > state.num_blocks * BLOCK_SIZE
    assert 0 < max(held) <= MOST_BLOCKS * len(lengths)
    assert state.num_held == 0
    assert state.num_preemptions == 0


def test_an_abort_in_the_middle_leaves_the_other_requests_and_the_pool_alone(
    server: Server, client: OpenAI
) -> None:
    before, _ = stream_chat(client, PROGRAMS[6], 700)
    with ThreadPoolExecutor(2) as threads:
        aborted = threads.submit(stream_chat, client, PROGRAMS[7], 6000, abort_after=800)
        neighbour = threads.submit(stream_chat, client, PROGRAMS[8], 1200)
        assert aborted.result()[1] is None
        usage = neighbour.result()[1]
    assert usage is not None
    assert usage.completion_tokens == 1200
    assert idle_pool(server, client).num_held == 0
    after, _ = stream_chat(client, PROGRAMS[6], 700)
    assert after == before


def test_the_server_ends_cleanly_and_leaves_no_process(server_to_end: Server) -> None:
    server = server_to_end
    assert server.has_processes()
    assert server.stop() == 0
    assert not server.has_processes()
    # The API process may log that its engine has gone, which is true by then and vLLM's own race.
    of_engine = [line for line in server.log().splitlines() if line.startswith(ENGINE_PROCESSES)]
    assert not [line for line in of_engine if " ERROR " in line or "Traceback" in line]
    assert any("all workers exited gracefully" in line for line in of_engine)
