"""What is recorded of rounds, and what is read back: who survived, in which slot, until when."""

import json
import random
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from pool_world import IN_WORLD, PoolWorld
from triattention_kernels import RoundBatch, fill_holes
from vllm.v1.core.sched.output import SchedulerOutput

from triattention_vllm.config import Settings
from triattention_vllm.engine.trace import Lines, StepTrace, SurvivorTrace
from triattention_vllm.errors import RecordingError, SettingsError
from triattention_vllm.tools.garage_page import write_page
from triattention_vllm.tools.garage_plot import garage, plot_garage
from triattention_vllm.tools.recording import (
    RequestRecording,
    packed,
    read_recording,
    request_recording,
    requests_of,
)

BLOCK_SIZE = 4
NUM_HEADS = 2


class Recorder:
    """A small pool whose steps are recorded; survivors are drawn by lot, per layer and head."""

    def __init__(self, path: Path) -> None:
        self.world = PoolWorld(IN_WORLD, BLOCK_SIZE, 200)
        self.steps = StepTrace(Lines(path, 0), IN_WORLD, [self.world.manager])
        self.survivors = SurvivorTrace(Lines(path, 0), BLOCK_SIZE)
        self.generator = torch.Generator().manual_seed(1)
        self.kept: list[torch.Tensor] = []

    def step(self, *finished: str) -> None:
        plans = self.world.step()
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = set(finished)
        self.steps.record(output, plans, [live.request for live in self.world.live.values()])
        for plan in plans:
            num_region = len(plan.source_blocks) * BLOCK_SIZE
            num_kept = len(plan.destination_blocks) * BLOCK_SIZE
            drawn = torch.rand(1, 3, NUM_HEADS, num_region, generator=self.generator)
            drawn[..., : plan.first_candidate] = 2.0  # protected tokens stay
            kept = drawn.topk(num_kept).indices.sort().values
            self.kept.append(kept[0, 0])
            self.survivors.record([plan], kept)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Recorder, Path]:
    path = tmp_path / "rounds.jsonl"
    recorder = Recorder(path)
    recorder.world.add("a", list(range(20)))
    recorder.world.add("b", list(range(10)))
    for _ in range(120):
        recorder.step()
    recorder.world.finish("a")
    recorder.step("a")
    return recorder, path


def cached_after(recording: RequestRecording, head: int, idx: int) -> list[int]:
    """Logical positions that a head holds after round ``idx``."""
    at = recording.evicted_at[head]
    return [p for p in range(recording.rounds[idx].boundary) if at[p] < 0 or at[p] > idx]


def test_every_row_holds_what_it_did_not_free(recorded: tuple[Recorder, Path]) -> None:
    recording = request_recording(read_recording(recorded[1]), "a")
    assert recording.num_tokens > 130
    assert len(recording.rounds) > 8
    for tokens, held in recording.rows:
        freed = sum(one.num_freed for one in recording.rounds if one.boundary < tokens)
        assert held == -(-tokens // BLOCK_SIZE) - freed
    assert recording.most_held <= (48 + 8) // BLOCK_SIZE + 1


def test_every_round_evicts_as_many_tokens_as_its_blocks_held(
    recorded: tuple[Recorder, Path],
) -> None:
    recording = request_recording(read_recording(recorded[1]), "a")
    assert recording.rounds
    for idx, one in enumerate(recording.rounds):
        evicted = one.num_evicted_before + one.num_freed * BLOCK_SIZE
        for head in range(NUM_HEADS):
            assert len(one.evicted[head]) == one.num_freed * BLOCK_SIZE
            held = cached_after(recording, head, idx)
            assert len(held) == one.boundary - evicted
            # The prompt is protected, the last tokens are no candidates.
            assert held[:20] == list(range(20))
            assert held[-8:] == list(range(one.boundary - 8, one.boundary))


def test_the_first_round_evicts_the_very_tokens_that_were_not_kept(
    recorded: tuple[Recorder, Path],
) -> None:
    recorder, path = recorded
    recording = request_recording(read_recording(path), "a")
    kept = recorder.kept[0]
    one = recording.rounds[0]
    for head in range(NUM_HEADS):
        region = {one.region_start + index for index in kept[head].tolist()}
        end = one.region_start + one.num_source * BLOCK_SIZE
        expected = set(range(one.region_start, end)) - region
        evicted = {p for p, at in enumerate(recording.evicted_at[head]) if at == 0}
        assert evicted == expected


def test_slots_are_read_back_in_the_order_of_both_ways_to_move() -> None:
    rng = random.Random(3)
    region = [100 + index for index in range(24)]
    gone = set(rng.sample(range(4, 24), 8))
    kept = torch.tensor([[[[i for i in range(24) if i not in gone]]]])
    batch = RoundBatch(
        source_blocks=torch.arange(1, 7)[None],
        destination_blocks=torch.arange(1, 5)[None],
        num_source_blocks=(6,),
        num_destination_blocks=(4,),
        first_candidate=(0,),
        moves_forward=True,
    )
    order = fill_holes(kept, batch, BLOCK_SIZE).flatten().tolist()
    assert packed(region, gone, in_order=False) == [region[index] for index in order]
    assert packed(region, gone, in_order=True) == [region[i] for i in kept.flatten().tolist()]


def test_a_request_that_was_preempted_is_read_from_its_new_start(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    recorder = Recorder(path)
    recorder.world.add("a", list(range(20)))
    for _ in range(60):
        recorder.step()
    before = request_recording(read_recording(path))
    recorder.world._preempt(recorder.world.live["a"])
    for _ in range(60):
        recorder.step()
    after = request_recording(read_recording(path))
    assert requests_of(read_recording(path))["a"] > len(after.rounds) > 1
    assert after.rounds[0].num_evicted_before == 0
    assert [tokens for tokens, _ in after.rows] == sorted(tokens for tokens, _ in after.rows)
    assert after.num_tokens > before.num_tokens
    held = len(cached_after(after, 0, len(after.rounds) - 1))
    assert held == after.rounds[-1].boundary - sum(o.num_freed for o in after.rounds) * BLOCK_SIZE


def test_the_garage_has_the_same_slots_before_and_after(recorded: tuple[Recorder, Path]) -> None:
    recording = request_recording(read_recording(recorded[1]))
    assert recording.rounds
    for idx, one in enumerate(recording.rounds):
        before = garage(recording, 1, idx, is_after=False)
        after = garage(recording, 1, idx, is_after=True)
        assert len(before) == len(after)
        assert before.count(3) == after.count(0) == one.num_freed * BLOCK_SIZE
        assert before.count(0) == after.count(3) == 0
        assert before.count(1) == after.count(1) == 20


def test_page_and_pictures_stand_alone(recorded: tuple[Recorder, Path], tmp_path: Path) -> None:
    recording = request_recording(read_recording(recorded[1]))
    recording.request = "</script><b>&"
    page = tmp_path / "garage.html"
    write_page(recording, page)
    text = page.read_text()
    for outside in ("http:", "https:", "src=", "<link", "@import", "url("):
        assert outside not in text
    assert text.count("</script>") == 1
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    data = text.split("const data = ", 1)[1].split(";\n", 1)[0]
    assert json.loads(data)["evicted_at"] == recording.evicted_at
    for name, begins in (("garage.png", b"\x89PNG"), ("garage.svg", b"<?xml")):
        plot_garage(recording, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_line_that_a_kill_cut_off_is_left_out(recorded: tuple[Recorder, Path]) -> None:
    path = recorded[1]
    whole = read_recording(path)
    with path.open("a") as file:
        file.write('{"event":"blo')
    assert read_recording(path) == whole


def test_what_is_no_recording_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    with pytest.raises(RecordingError, match=r"is not a file; record one with"):
        read_recording(path)
    path.write_text("no\njson\n")
    with pytest.raises(RecordingError, match=r"line 1 is not JSON"):
        read_recording(path)
    path.write_text("")
    with pytest.raises(RecordingError, match=r"has no recorded rounds"):
        read_recording(path)


def test_a_request_without_rounds_is_refused_with_those_that_have_some(
    recorded: tuple[Recorder, Path],
) -> None:
    with pytest.raises(RecordingError, match=r"'c' has no round .* allowed are a, b"):
        request_recording(read_recording(recorded[1]), "c")


def test_a_recording_into_a_missing_folder_is_refused_at_start(tmp_path: Path) -> None:
    settings = Settings(trace=str(tmp_path / "gone" / "rounds.jsonl"))
    with pytest.raises(SettingsError, match=r"whose folder does not exist"):
        settings.check_files()


def test_a_full_disk_ends_the_recording_and_not_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    lines = Lines(path, 0)
    lines.append("end", {"request": "first"})
    with full_disk(path.stat().st_size):
        lines.append("end", {"request": "second"})
    lines.append("end", {"request": "third"})
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["request"] == "first"


def test_a_recording_that_cannot_be_opened_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="name a file that this user may write"):
        Lines(tmp_path / "absent" / "rounds.jsonl", 0)
