"""A recording of rounds, read back: what one request held, and when each token was evicted."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triattention_vllm.errors import RecordingError
from triattention_vllm.method.policy import ceil_div

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedRound:
    """One round of a request. Lengths in tokens, ``num_`` blocks.

    boundary: ``N*``. num_evicted_before: ``E``. region_start: cached tokens before the region
    that the round repacks. first_candidate: cached tokens before the first candidate.
    evicted: per KV head, indices within the region.
    """

    boundary: int
    num_evicted_before: int
    region_start: int
    first_candidate: int
    num_source: int
    num_destination: int
    evicted: tuple[tuple[int, ...], ...]

    @property
    def num_freed(self) -> int:
        """Blocks that went back to the pool."""
        return self.num_source - self.num_destination


@dataclass
class RequestRecording:
    """One request between its (last) start and its end; a preempted request starts again.

    rows: (computed tokens, blocks held), each time it changed.
    evicted_at: per KV head and logical position, the index of the round that evicted the token,
    or -1 where it was never evicted.
    """

    request: str
    block_size: int
    settings: Mapping[str, Any]
    rows: list[tuple[int, int]] = field(default_factory=list)
    rounds: list[RecordedRound] = field(default_factory=list)
    evicted_at: list[list[int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the request had computed when its row changed last."""
        return self.rows[-1][0]

    @property
    def num_full(self) -> int:
        """Blocks of all these tokens: what full attention holds."""
        return ceil_div(self.num_tokens, self.block_size)

    @property
    def most_held(self) -> int:
        """Most blocks held at once."""
        return max(held for _, held in self.rows)

    @property
    def num_freed(self) -> int:
        """Blocks that its rounds gave back."""
        return sum(one.num_freed for one in self.rounds)


def read_recording(path: Path) -> list[Line]:
    """The lines of a recording. A last line that was cut off by a kill is left out.

    Raises RecordingError where the file is no recording.
    """
    if not path.is_file():
        raise RecordingError(
            f"{path} is not a file; record one with --kv-compression-config.trace FILE, or leave "
            "the file out to record a small model."
        )
    texts = path.read_text(encoding="utf-8").splitlines()
    lines: list[Line] = []
    for idx, text in enumerate(texts):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if idx == len(texts) - 1:
                break
            raise RecordingError(f"{path}, line {idx + 1} is not JSON ({error})") from None
        lines.append(line)
    if not lines or not all(isinstance(line, dict) and "event" in line for line in lines):
        raise RecordingError(
            f"{path} has no recorded rounds; give a file that the setting `trace` wrote."
        )
    return lines


def requests_of(lines: Sequence[Line]) -> dict[str, int]:
    """Request -> recorded rounds, in the order of their first."""
    counts: dict[str, int] = {}
    for line in lines:
        if line["event"] == "evicted":
            counts[line["request"]] = counts.get(line["request"], 0) + 1
    return counts


def request_recording(lines: Sequence[Line], request: str | None = None) -> RequestRecording:
    """What is recorded of ``request``, or of the one with the most rounds.

    Raises RecordingError where it had no round.
    """
    counts = requests_of(lines)
    if not counts:
        raise RecordingError(
            "no request in this recording had a round; record longer answers, or lower the budget."
        )
    chosen = max(counts, key=lambda name: counts[name]) if request is None else request
    if chosen not in counts:
        raise RecordingError(
            f"request {chosen!r} has no round in this recording; allowed are {', '.join(counts)}."
        )
    own = [line for line in lines if line.get("request") == chosen]
    group = next(line["group"] for line in own if line["event"] == "evicted")
    engine = own[0]["engine"]
    starts = [line for line in lines if line["event"] == "engine" and line["engine"] == engine]
    start = [line for line in starts if line["time"] <= own[0]["time"]][-1]
    block_size = start["block_size"][str(group)]
    recording = RequestRecording(chosen, block_size, start["settings"])
    of_group = [line for line in own if line.get("group") == group]
    _read_events(recording, of_group)
    recording.evicted_at = list(_evictions(recording))
    return recording


def _read_events(recording: RequestRecording, lines: Sequence[Line]) -> None:
    survivors = iter([line for line in lines if line["event"] == "evicted"])
    for line in lines:
        if line["event"] == "blocks":
            if recording.rows and line["tokens"] < recording.num_tokens:
                recording.rows.clear()
            recording.rows.append((line["tokens"], line["held"]))
        elif line["event"] == "round":
            if line["null_before"] == 0:
                recording.rounds.clear()
            evicted = next((one for one in survivors if one["boundary"] == line["boundary"]), None)
            if evicted is None:
                break  # the recording ends between the decision and the round
            recording.rounds.append(_round(line, evicted, recording.block_size))


def _round(line: Line, evicted: Line, block_size: int) -> RecordedRound:
    region_start = line["prefix_blocks"] * block_size
    return RecordedRound(
        boundary=line["boundary"],
        num_evicted_before=line["null_before"] * block_size,
        region_start=region_start,
        first_candidate=region_start + line["first_candidate"],
        num_source=len(line["source"]),
        num_destination=len(line["destination"]),
        evicted=tuple(tuple(head) for head in evicted["heads"]),
    )


def packed(region: Sequence[int], gone: set[int], in_order: bool) -> list[int]:
    """What stays of a region, slot by slot: all in order, or the holes of the first part filled
    with what survives behind it."""
    kept = [token for index, token in enumerate(region) if index not in gone]
    if in_order:
        return kept
    behind = iter([t for i, t in enumerate(region) if i >= len(kept) and i not in gone])
    return [next(behind) if i in gone else region[i] for i in range(len(kept))]


def _evictions(recording: RequestRecording) -> Iterator[list[int]]:
    """``evicted_at`` of each head: the rounds replayed on logical positions."""
    in_order = recording.settings["compaction"] == "repack"
    num_heads = len(recording.rounds[0].evicted)
    num_tokens = max(recording.num_tokens, recording.rounds[-1].boundary)
    for head in range(num_heads):
        evicted_at = [-1] * num_tokens
        cached: list[int] = []
        next_position = 0
        for idx, one in enumerate(recording.rounds):
            cached += range(next_position, one.boundary)
            next_position = one.boundary
            end = one.region_start + one.num_source * recording.block_size
            region = cached[one.region_start : end]
            gone = set(one.evicted[head])
            for index in gone:
                evicted_at[region[index]] = idx
            kept = packed(region, gone, in_order)
            cached[one.region_start : end] = kept
        yield evicted_at
