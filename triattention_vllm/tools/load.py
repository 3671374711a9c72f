"""Several clients stream long answers from one server, while its block pool is watched."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from statistics import median

from openai import OpenAI, OpenAIError

from triattention_vllm.errors import TriAttentionError
from triattention_vllm.tools.reasoner import SERVED_NAME
from triattention_vllm.tools.server import PoolState, Server

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class Timeline:
    """What one server did under the load. ``seconds`` of the states are since the load began."""

    name: str
    num_clients: int
    states: list[PoolState] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Size of the pool."""
        return self.states[-1].num_blocks

    @property
    def peak_held(self) -> int:
        """Most blocks held at once."""
        return max(state.num_held for state in self.states)

    @property
    def num_preemptions(self) -> int:
        """Requests that lost their blocks and had to be computed again."""
        return self.states[-1].num_preemptions - self.states[0].num_preemptions

    @property
    def median_running(self) -> float:
        """Requests running at once, median over the time in which all were unfinished."""
        busy = [s for s in self.states if s.num_running + s.num_waiting == self.num_clients]
        return median(state.num_running for state in busy or self.states)

    @property
    def preemption_seconds(self) -> list[float]:
        """When requests went back to waiting and their blocks to the pool. vLLM counts them only
        when they run again, so the counter itself would be late."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [
            b.seconds for a, b in pairs if b.num_waiting > a.num_waiting and b.num_held < a.num_held
        ]


def put_under_load(
    server: Server,
    name: str,
    prompts: Sequence[str],
    answer_tokens: int,
    on_look: Callable[[PoolState, int], None],
) -> Timeline:
    """Stream one greedy answer of exactly ``answer_tokens`` tokens per prompt, all at once.

    ``on_look`` is called a few times a second with the pool's state and the answer tokens so far.
    Raises TriAttentionError with the end of the server's log where an answer breaks off.
    """
    timeline = Timeline(name, len(prompts))
    streamed = [0] * len(prompts)
    timeline.answers = [""] * len(prompts)
    start = time.monotonic()

    def look() -> None:
        state = server.pool_state()
        timeline.states.append(replace(state, seconds=state.seconds - start))
        on_look(timeline.states[-1], sum(streamed))

    def stream(client_idx: int) -> None:
        chunks = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": prompts[client_idx]}],
            max_tokens=answer_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "ignore_eos": True,
                "skip_special_tokens": False,  # an ignored end is a word of the answer
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        )
        for chunk in chunks:
            if chunk.usage is not None:
                streamed[client_idx] = chunk.usage.completion_tokens
            for choice in chunk.choices:
                timeline.answers[client_idx] += choice.delta.content or ""

    # The threads outlive an interrupt only until the server is stopped, which ends their streams.
    pool = ThreadPoolExecutor(max_workers=len(prompts))
    try:
        client = OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=900.0)
        look()
        answers = [pool.submit(stream, client_idx) for client_idx in range(len(prompts))]
        while wait_for(answers, timeout=_SECONDS_BETWEEN_LOOKS).not_done:
            look()
        for answer in answers:
            answer.result()
        timeline.seconds = time.monotonic() - start
        timeline.num_tokens = sum(streamed)
        look()
    except (OpenAIError, OSError) as error:
        raise TriAttentionError(
            f"The server stopped answering ({error}); the end of {server.log_path}:\n"
            f"{server.log_end()}"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return timeline
