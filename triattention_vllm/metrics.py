"""The metrics: every name, kind, meaning and label, described once."""

from dataclasses import dataclass
from typing import Literal

PREFIX = "triattention:"
"""Like vLLM's ``vllm:``, which vLLM keeps for itself: it unregisters every metric of that prefix
whenever it sets up its own."""

LABELS = ("model_name", "engine")
"""The labels that vLLM's own metrics of an engine carry."""

Kind = Literal["counter", "gauge", "histogram"]

ROUND_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
CACHED_TOKENS = (128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Metric:
    """name: without the ``_total`` that a counter has on the wire.

    buckets: upper bounds of a histogram, ascending, without infinity.
    """

    name: str
    kind: Kind
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def shown_name(self) -> str:
        """The name under which queries find it; a histogram's has ``_bucket`` and so on behind."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


ROUNDS = Metric(f"{PREFIX}rounds", "counter", "Rounds sent to the workers.")
EVICTED_TOKENS = Metric(f"{PREFIX}evicted_tokens", "counter", "Tokens that rounds evicted.")
FREED_BLOCKS = Metric(
    f"{PREFIX}freed_blocks",
    "counter",
    "Blocks that requests lost in rounds: evicted tokens / block size.",
)
DEFERRED_ROUNDS = Metric(
    f"{PREFIX}deferred_rounds",
    "counter",
    "Times that a round had to wait for free blocks; a round that waits for several steps "
    "counts once in each.",
)
COPY_ON_WRITE_BLOCKS = Metric(
    f"{PREFIX}copy_on_write_blocks",
    "counter",
    "Private blocks that survivors moved to, because their own were shared or in the prefix cache.",
)
COMPRESSED_REQUESTS = Metric(
    f"{PREFIX}compressed_requests", "counter", "Requests that had at least one round."
)
ROUND_TIME = Metric(
    f"{PREFIX}round_time_seconds",
    "histogram",
    "Seconds of the device for one round, on the engine's first worker; rounds that run "
    "together share their time equally.",
    ROUND_SECONDS,
)
CACHED_TOKENS_NOW = Metric(
    f"{PREFIX}cached_tokens", "gauge", "Tokens of running requests that are in the KV cache now."
)
LOGICAL_TOKENS_NOW = Metric(
    f"{PREFIX}logical_tokens",
    "gauge",
    "Tokens that running requests have computed: what the KV cache would hold without compression.",
)
REQUEST_CACHED_TOKENS = Metric(
    f"{PREFIX}request_max_cached_tokens",
    "histogram",
    "Most tokens that a finished request had in the KV cache at once.",
    CACHED_TOKENS,
)

METRICS = (
    ROUNDS,
    EVICTED_TOKENS,
    FREED_BLOCKS,
    DEFERRED_ROUNDS,
    COPY_ON_WRITE_BLOCKS,
    COMPRESSED_REQUESTS,
    ROUND_TIME,
    CACHED_TOKENS_NOW,
    LOGICAL_TOKENS_NOW,
    REQUEST_CACHED_TOKENS,
)


def metrics_table() -> str:
    """The table of metrics in the documentation, as Markdown."""
    rows = ["| metric | kind | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{metric.shown_name}` | {metric.kind} | {metric.help} |" for metric in METRICS]
    return "\n".join(rows) + "\n"
