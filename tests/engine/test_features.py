"""Features that users leave on: below the trigger the same bits, beyond it the dense reference."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dense_judge import Judge
from dense_reference import DenseReference
from engine_runs import SMALL, ModelFolder, random_prompt
from fresh_process import run_script
from observed_engine import Observed
from tiny_lora import write_adapter

from triattention_vllm.config import Settings
from triattention_vllm.method.statistics import Statistics

TRIGGER = SMALL["budget"] + SMALL["interval"]
BLOCK_SIZE = 32
CHUNK = 64
TURN_TOKENS = 60
FEATURES = ("sampling", "n", "prompt_logprobs", "structured", "stop", "lora", "beam")
SHARED_PROMPT = random_prompt(64, 11)


@dataclass
class FeaturesRun:
    """What the script reported, and who can judge it. merged: a reference per adapter."""

    seen: dict[str, Any]
    base: Judge
    merged: list[Judge]

    def check(self, name: str, requests: list[Observed]) -> None:
        """Holds every log-probability of a feature against the reference."""
        self.base.masked = name == "structured"
        for idx, request in enumerate(requests):
            judge = self.merged[idx] if name == "lora" else self.base
            assert judge.check_one(request) > 0
        self.base.masked = False


@pytest.fixture(scope="module")
def run(
    model_folder: ModelFolder,
    reference: Callable[[Path], DenseReference],
    text: str,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> FeaturesRun:
    """One process that runs all of it."""
    # Triton's interpreter cannot run vLLM's kernel for top-p.
    sampling = {"min_p": 0.05} if pytestconfig.getoption("--runner-v2") else {"top_p": 0.95}
    folder, model = tmp_path_factory.mktemp("features"), model_folder("qwen3")
    for i in range(2):
        write_adapter(model, folder / f"adapter{i}", folder / f"merged{i}", seed=i)
    seen = run_script(
        Path(__file__).with_name("features_script.py"),
        {
            "model": str(model),
            "settings": {**SMALL, "calibration_text": text},
            "adapters": [str(folder / f"adapter{i}") for i in range(2)],
            "events": f"ipc://{folder / 'events'}",
            "sampling": sampling,
            "short": {
                "prompt": random_prompt(20, 1),
                "long_prompt": random_prompt(90, 2),
                "length": 60,
            },
            "long": {
                "prompt": random_prompt(50, 3),
                "long_prompt": random_prompt(400, 4),
                "length": 200,
            },
            "system_prompt": random_prompt(60, 5),
            "messages": [random_prompt(20, 6 + i) for i in range(4)],
            "turn_tokens": TURN_TOKENS,
            "shared_prompt": SHARED_PROMPT,
            "other_prompts": [random_prompt(150, 20 + i) for i in range(3)],
            "pool_prompts": [random_prompt(40, 30 + i) for i in range(5)],
        },
    )
    statistics = Statistics.load(seen["statistics"])
    judges = [
        Judge(reference(path), statistics, Settings(**SMALL), BLOCK_SIZE)
        for path in (model, folder / "merged0", folder / "merged1")
    ]
    return FeaturesRun(seen, judges[0], judges[1:])


@pytest.mark.parametrize("feature", FEATURES)
def test_below_the_trigger_a_feature_answers_bit_for_bit_as_without_compression(
    feature: str, run: FeaturesRun
) -> None:
    plain, ours = run.seen["plain"], run.seen["ours"]
    assert ours["answers"][feature] == plain["answers"][feature]
    assert ours["observed"][feature]
    for one, other in zip(ours["observed"][feature], plain["observed"][feature], strict=True):
        assert one.num_rounds == 0
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.feature("Parallel sampling (n)", "works")
@pytest.mark.feature("Beam search", "works")
@pytest.mark.feature("Structured output", "works")
@pytest.mark.feature("logprobs, prompt_logprobs", "works")
@pytest.mark.feature("LoRA", "works")
@pytest.mark.parametrize("feature", FEATURES)
def test_beyond_the_trigger_a_feature_computes_what_the_dense_reference_does(
    feature: str, run: FeaturesRun
) -> None:
    requests = run.seen["long"]["observed"][feature]
    assert requests
    run.check(feature, requests)
    # A beam is a new request of one token at each step, which ends before a round is due.
    assert all(request.num_rounds for request in requests) or feature == "beam"


@pytest.mark.feature("Stop strings", "works")
def test_a_grammar_and_a_stop_string_end_compressed_answers(run: FeaturesRun) -> None:
    answers = run.seen["long"]["answers"]
    ((structured, _, reason, _),) = answers["structured"]
    assert re.search("[a-f ]{300}[0-9]{3}$", structured)
    assert reason == "stop"
    ((stopped, _, reason, stop),) = answers["stop"]
    ((sampled, _, _, _),) = answers["sampling"]
    assert (reason, stop) == ("stop", run.seen["long"]["stop"])
    assert stopped == sampled[: sampled.index(stop)]


def test_parallel_samples_share_the_blocks_of_their_prompt(run: FeaturesRun) -> None:
    samples = run.seen["long"]["observed"]["n"]
    assert [sample.lives[0].num_hits for sample in samples] == [BLOCK_SIZE] * 3
    assert len({tuple(sample.token_ids) for sample in samples}) == 3


def test_later_turns_of_a_chat_hit_what_was_computed_before_the_first_round(
    run: FeaturesRun,
) -> None:
    """Turn two hits all that it hits without compression, though turn one was compressed since;
    later turns hit at least what one more chunk registered each time."""
    turns, plain = run.seen["turns"], run.seen["plain_turns"]
    run.check("turns", turns)
    hits, hits_without = ([turn.lives[0].num_hits for turn in chat] for chat in (turns, plain))
    assert [turn.num_prompt for turn in turns] == [80, 160, 240, 320]
    assert hits[:2] == hits_without[:2] == [0, 128]
    assert all(turn.num_rounds for turn in turns[1:])
    for hit, without in zip(hits[2:], hits_without[2:], strict=True):
        assert TRIGGER <= hit <= without


@pytest.mark.feature("Prefix caching", "works")
def test_prefix_hits_of_compressed_requests_are_exact_after_reset_and_eviction(
    run: FeaturesRun,
) -> None:
    """Regression: blocks were rewritten while their hash stayed registered."""
    cache = run.seen["cache"]
    for stage in ("shared", "after_reset", "after_eviction"):
        run.check(stage, cache[stage])
    assert [request.lives[0].num_hits for request in cache["shared"][1:]] == [BLOCK_SIZE] * 4
    assert cache["reset_while_running"] is False
    assert cache["reset_when_idle"] is True
    assert cache["after_reset"][0].lives[0].num_hits == 0
    assert cache["num_evicted"] > 0
    assert cache["after_eviction"][-1].lives[0].num_hits == 0


def test_protected_prompt_blocks_stay_shared_among_compressed_requests(run: FeaturesRun) -> None:
    rows = run.seen["cache"]["protected"]
    assert len(rows) == 4
    assert rows == [rows[0]] * 4
    assert [num_owners for _, num_owners in rows[0]] == [4]


def test_kv_events_tell_what_the_prefix_cache_holds(run: FeaturesRun) -> None:
    """A subscriber of vLLM's publisher knows the same blocks as the pool at every stage, and each
    block holds the beginning of a sequence that was sent."""
    cache = run.seen["cache"]
    assert cache["differences"] == [(set(), set())] * 3
    sent = [r.token_ids for s in ("after_reset", "after_eviction") for r in cache[s]]
    assert cache["events"]
    for tokens in cache["events"].values():
        assert any(tokens == tuple(ids[: len(tokens)]) for ids in sent)


@pytest.mark.feature("Preemption and resume", "works")
@pytest.mark.feature("Priority scheduling", "works")
def test_preempted_requests_of_low_priority_resume_and_end_exactly(run: FeaturesRun) -> None:
    """Regression: a stale offset of a preempted, resumed request led to negative slots."""
    pool = run.seen["pool"]
    run.check("preempted", pool["preempted"])
    resumed = [request.request_id for request in pool["preempted"] if len(request.lives) > 1]
    assert pool["num_preemptions"] >= len(resumed) > 0
    assert all(name.startswith("low") for name in resumed)
    assert all(request.num_rounds for request in pool["preempted"])


@pytest.mark.feature("Aborted requests", "works")
def test_an_aborted_request_leaves_its_neighbour_and_the_pool_alone(run: FeaturesRun) -> None:
    neighbour, aborted = run.seen["pool"]["beside_an_abort"]
    run.check("abort", [neighbour, aborted])
    assert len(neighbour.token_ids) == 240
    assert len(aborted.token_ids) < 240
    assert aborted.num_rounds > 0
    assert run.seen["num_held"] == 0


def test_no_request_holds_more_than_its_budget_interval_and_chunk(run: FeaturesRun) -> None:
    seen = run.seen
    requests = [
        *seen["cache"]["shared"],
        *seen["cache"]["after_reset"],
        *seen["pool"]["preempted"],
        *(r for name in ("sampling", "n", "lora") for r in seen["long"]["observed"][name]),
    ]
    most = -(-(TRIGGER + CHUNK) // BLOCK_SIZE)
    assert 0 < max(request.most_blocks for request in requests) <= most
