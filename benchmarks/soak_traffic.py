"""Mixed traffic for one server, and what became of each request.

Every kind is a function of ``KINDS`` that sends one request, or a few that belong together, and
returns the ``Outcome`` of each. What is neither answered as it must be, refused for its own fault,
nor broken off by its own client is a loss.
"""

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

Json = dict[str, Any]
_WORDS = [
    "block",
    "token",
    "round",
    "score",
    "window",
    "budget",
    "prefix",
    "survivor",
    "row",
    "pool",
]
_SHARED = [" ".join(random.Random(i).choices(_WORDS, k=40)) for i in range(4)]
_TOLERANCE = 2e-3
"""Of a log-probability in float32: batches of different size add in another order."""


@dataclass(frozen=True)
class Outcome:
    """served: answered in full. refused: status 4xx, as it must be. aborted: by its client."""

    result: Literal["served", "refused", "aborted", "lost"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


@dataclass
class Tally:
    """Outcomes of one kind."""

    results: Counter[str]
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Traffic:
    """Clients of the server at ``url``; one random generator makes all their choices, once every
    kind was sent, so that some seconds have all of them. A stock
    server, without the plugin, gets the same traffic without what it does not know."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int, stock: bool) -> None:
        self.session = session
        self.url = url
        self.rng = random.Random(seed)
        self.stock = stock
        self.kinds = {name: KINDS[name] for name in KINDS if not (stock and name == "bad_value")}
        self.first = self.rng.sample(list(self.kinds), len(self.kinds))
        self.tallies: dict[str, Tally] = defaultdict(lambda: Tally(Counter()))
        self.losses: list[str] = []
        self.references: dict[int, dict[str, float]] = {}

    async def one(self) -> None:
        """One request of a random kind, or several that belong together."""
        names = list(self.kinds)
        weights = [self.kinds[name][1] for name in names]
        name = self.first.pop() if self.first else self.rng.choices(names, weights)[0]
        try:
            outcomes = await self.kinds[name][0](self)
        except (aiohttp.ClientError, TimeoutError) as error:
            outcomes = [Outcome("lost", reason=f"{type(error).__name__} {error}")]
        for outcome in outcomes:
            tally = self.tallies[name]
            tally.results[outcome.result] += 1
            tally.prompt_tokens += outcome.prompt_tokens
            tally.completion_tokens += outcome.completion_tokens
            if outcome.result == "lost":
                self.losses.append(f"{name}: {outcome.reason[:300]}")

    def text(self, shortest: int, longest: int) -> str:
        """A prompt of about that many words, often with a beginning that others have too."""
        words = " ".join(self.rng.choices(_WORDS, k=self.rng.randint(shortest, longest)))
        return f"{self.rng.choice(_SHARED)} {words}" if self.rng.random() < 0.6 else words

    async def post(self, path: str, body: Any) -> tuple[int, str]:
        """Status and body of an answer; ``body`` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        async with self.session.post(f"{self.url}{path}", data=data, headers=headers) as response:
            return response.status, await response.text()

    def body(self, **body: Any) -> Json:
        """A body with what all requests share."""
        if self.stock:
            body.pop("vllm_xargs", None)
        return {"model": "tiny", "temperature": 1.0, "ignore_eos": True, **body}

    async def complete(self, prompt: str, num_tokens: int, **body: Any) -> Outcome:
        """A completion of exactly so many tokens per choice."""
        sent = {"prompt": prompt, "max_tokens": num_tokens, **body}
        status, answer = await self.post("/v1/completions", self.body(**sent))
        return judge(status, answer, num_tokens * body.get("n", 1))

    async def chat(self, messages: list[Json], num_tokens: int, **body: Any) -> tuple[Outcome, str]:
        """A turn of a chat, and what was answered."""
        sent = {"messages": messages, "max_tokens": num_tokens, **body}
        status, answer = await self.post("/v1/chat/completions", self.body(**sent))
        outcome = judge(status, answer, num_tokens)
        served = outcome.result == "served"
        return outcome, json.loads(answer)["choices"][0]["message"]["content"] if served else ""


def judge(status: int, answer: str, num_tokens: int) -> Outcome:
    """An answer that must have ``num_tokens`` tokens."""
    if status != 200:
        return Outcome("lost", reason=f"{status} {answer}")
    usage = json.loads(answer)["usage"]
    found = usage["completion_tokens"]
    if found != num_tokens:
        return Outcome("lost", reason=f"{found} tokens instead of {num_tokens}")
    return Outcome("served", usage["prompt_tokens"], found)


async def short(traffic: Traffic) -> list[Outcome]:
    messages = [{"role": "user", "content": traffic.text(1, 20)}]
    return [(await traffic.chat(messages, traffic.rng.randint(1, 60)))[0]]


async def long_prompt(traffic: Traffic) -> list[Outcome]:
    return [await traffic.complete(traffic.text(200, 900), traffic.rng.randint(1, 100))]


async def long_answer(traffic: Traffic) -> list[Outcome]:
    return [await traffic.complete(traffic.text(1, 60), traffic.rng.randint(400, 1200))]


async def samples(traffic: Traffic) -> list[Outcome]:
    return [await traffic.complete(traffic.text(20, 60), 300, n=traffic.rng.randint(2, 4))]


async def log_probabilities(traffic: Traffic) -> list[Outcome]:
    more = {"logprobs": 5, **traffic.rng.choice([{}, {"prompt_logprobs": 1}])}
    return [await traffic.complete(traffic.text(20, 120), 200, **more)]


async def priority(traffic: Traffic) -> list[Outcome]:
    """Never behind the others, who have 0: vLLM's order is strict, so whoever comes last waits for
    as long as the server is full, which here is almost always."""
    asked = traffic.rng.randint(-5, 0)
    return [await traffic.complete(traffic.text(20, 200), 250, priority=asked)]


async def own_budget(traffic: Traffic) -> list[Outcome]:
    xargs = {"kv_budget": traffic.rng.choice([128, 160, 512, 1024])}
    return [await traffic.complete(traffic.text(20, 300), 500, vllm_xargs=xargs)]


async def off(traffic: Traffic) -> list[Outcome]:
    xargs = {"kv_compression": "off"}
    return [await traffic.complete(traffic.text(20, 120), 500, vllm_xargs=xargs)]


async def stop_string(traffic: Traffic) -> list[Outcome]:
    """Ends before the string, or at its full length."""
    stop = traffic.rng.choice(["e", "qz", "zx", "th"])
    body = traffic.body(prompt=traffic.text(5, 60), max_tokens=600, stop=[stop])
    status, answer = await traffic.post("/v1/completions", body)
    if status != 200:
        return [Outcome("lost", reason=f"{status} {answer}")]
    choice, usage = json.loads(answer)["choices"][0], json.loads(answer)["usage"]
    found = usage["completion_tokens"]
    is_right = stop not in choice["text"] and found == 600
    if choice["finish_reason"] == "stop":
        is_right = stop not in choice["text"] and choice["stop_reason"] == stop
    result: Literal["served", "lost"] = "served" if is_right else "lost"
    return [Outcome(result, usage["prompt_tokens"], found, f"stop {stop!r} gave {choice}")]


async def conversation(traffic: Traffic) -> list[Outcome]:
    messages: list[Json] = [{"role": "system", "content": traffic.rng.choice(_SHARED)}]
    outcomes = []
    for _ in range(3):
        messages.append({"role": "user", "content": traffic.text(1, 30)})
        outcome, answer = await traffic.chat(messages, traffic.rng.randint(60, 200))
        messages.append({"role": "assistant", "content": answer})
        outcomes.append(outcome)
    return outcomes


async def stream(traffic: Traffic) -> list[Outcome]:
    """Read to its end, sometimes slowly."""
    pause = traffic.rng.choice([0.0, 0.0, 0.02])
    return [await _stream(traffic, traffic.rng.randint(50, 500), None, pause)]


async def aborted_stream(traffic: Traffic) -> list[Outcome]:
    """Closed by its client after some chunks."""
    return [await _stream(traffic, 1500, traffic.rng.randint(1, 300), 0.0)]


async def _stream(
    traffic: Traffic, num_tokens: int, most_chunks: int | None, pause: float
) -> Outcome:
    body = traffic.body(
        prompt=traffic.text(10, 200),
        max_tokens=num_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    url = f"{traffic.url}/v1/completions"
    usage: Json | None = None
    async with traffic.session.post(url, json=body) as response:
        if response.status != 200:
            return Outcome("lost", reason=f"{response.status} {await response.text()}")
        num_chunks = 0
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Outcome("lost", reason=str(event))
            usage = event.get("usage") or usage
            num_chunks += 1
            if most_chunks is not None and num_chunks >= most_chunks:
                return Outcome("aborted")
            await asyncio.sleep(pause)
    if usage is None or usage["completion_tokens"] != num_tokens:
        return Outcome("lost", reason=f"the stream ended with {usage} of {num_tokens} tokens")
    return Outcome("served", usage["prompt_tokens"], usage["completion_tokens"])


async def abandoned(traffic: Traffic) -> list[Outcome]:
    """The client goes before the answer, while its prompt is read or later."""
    patience = traffic.rng.uniform(0.001, 0.8)
    try:
        async with asyncio.timeout(patience):
            await traffic.complete(traffic.text(100, 900), 2000)
    except TimeoutError:
        return [Outcome("aborted")]
    return [Outcome("lost", reason="2000 tokens within a second")]


async def half_a_body(traffic: Traffic) -> list[Outcome]:
    """The connection breaks in the middle of the body."""
    host, port = traffic.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b'Content-Length: 500\r\n\r\n{"model": "tiny", "prompt": "a')
    await writer.drain()
    await asyncio.sleep(traffic.rng.uniform(0, 0.2))
    writer.close()
    return [Outcome("aborted")]


_MALFORMED: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[1, 2, 3]",
    b"null",
    {},
    {"prompt": None, "max_tokens": 4},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "max_tokens": 10**9},
    {"prompt": "a " * 20_000, "max_tokens": 4},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 10**6},
    {"prompt": "a", "model": "another"},
    {"prompt": "a", "logprobs": 10**6},
    {"prompt": [[10**9]], "max_tokens": 4},
    {"prompt": "a", "stop": {"a": 1}},
    {"prompt": "a", "priority": "first"},
    {"prompt": "a", "top_p": 7},
]
_BAD_XARGS: list[Any] = [
    {"kv_budget": 10**30},
    {"kv_budget": 100_000},
    {"kv_budget": -1},
    {"kv_budget": 0},
    {"kv_budget": 95},
    {"kv_budget": 512.5},
    {"kv_budget": "512"},
    {"kv_budget": True},
    {"kv_budget": None},
    {"kv_budget": [512]},
    {"kv_compression": "on"},
    {"kv_compression": 0},
    {"kv_budget": 512, "kv_compression": "off"},
    {"kv_window": 64},
    {"kv_\u2603": 1},
    "kv_budget",
]


async def malformed(traffic: Traffic) -> list[Outcome]:
    sent = traffic.rng.choice(_MALFORMED)
    body = sent if isinstance(sent, bytes) else {**({"model": "tiny"} if sent else {}), **sent}
    return [_refusal(*await traffic.post("/v1/completions", body), sent)]


async def bad_value(traffic: Traffic) -> list[Outcome]:
    xargs = traffic.rng.choice(_BAD_XARGS)
    body = traffic.body(prompt=traffic.text(1, 50), max_tokens=200, vllm_xargs=xargs)
    body["stream"] = traffic.rng.random() < 0.5
    return [_refusal(*await traffic.post("/v1/completions", body), xargs)]


def _refusal(status: int, answer: str, sent: Any) -> Outcome:
    if 400 <= status < 500:
        return Outcome("refused")
    return Outcome("lost", reason=f"{str(sent)[:80]} was answered with {status}: {answer}")


async def probe(traffic: Traffic) -> list[Outcome]:
    """A prompt whose next token's log-probabilities are known from before the traffic, below the
    trigger or without compression: a block of the prefix cache that was overwritten shows here."""
    return [await probe_one(traffic, traffic.rng.randrange(len(_PROBES)))]


_PROBES: list[tuple[str, Json]] = [
    *((f"{_SHARED[i]} {' '.join(_WORDS[i:])}", {}) for i in range(4)),
    *((" ".join(_SHARED[i:] * 2), {"vllm_xargs": {"kv_compression": "off"}}) for i in range(3)),
]


async def probe_one(traffic: Traffic, idx: int) -> Outcome:
    """The first answer to a probe is the reference of the later ones."""
    prompt, more = _PROBES[idx]
    body = traffic.body(prompt=prompt, max_tokens=1, logprobs=20, **more) | {"temperature": 0.0}
    status, answer = await traffic.post("/v1/completions", body)
    if status != 200:
        return Outcome("lost", reason=f"{status} {answer}")
    choice, usage = json.loads(answer)["choices"][0], json.loads(answer)["usage"]
    found = choice["logprobs"]["top_logprobs"][0]
    known = traffic.references.setdefault(idx, found)
    # The last of the twenty may change places with the one behind it.
    differences = [abs(found[token] - known[token]) for token in known.keys() & found.keys()]
    if len(differences) < 18 or max(differences) > _TOLERANCE:
        return Outcome("lost", reason=f"probe {idx} has {found} instead of {known}")
    return Outcome("served", usage["prompt_tokens"], 1)


async def learn_references(traffic: Traffic) -> None:
    """Answer every probe once on a server without other traffic. Raises RuntimeError."""
    for idx in range(len(_PROBES)):
        outcome = await probe_one(traffic, idx)
        if outcome.result != "served":
            raise RuntimeError(outcome.reason)


KINDS: dict[str, tuple[Callable[[Traffic], Awaitable[list[Outcome]]], int]] = {
    "short": (short, 12),
    "long_prompt": (long_prompt, 8),
    "long_answer": (long_answer, 8),
    "samples": (samples, 4),
    "log_probabilities": (log_probabilities, 5),
    "priority": (priority, 6),
    "own_budget": (own_budget, 6),
    "off": (off, 5),
    "stop_string": (stop_string, 6),
    "conversation": (conversation, 5),
    "stream": (stream, 8),
    "aborted_stream": (aborted_stream, 7),
    "abandoned": (abandoned, 6),
    "half_a_body": (half_a_body, 2),
    "malformed": (malformed, 6),
    "bad_value": (bad_value, 6),
    "probe": (probe, 6),
}
"""Name -> function and weight."""
