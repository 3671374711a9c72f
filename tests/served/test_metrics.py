"""Real scrapes of real servers: one API server, and two in front of two engines."""

import importlib.util
import json
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from sample_names import sample_names
from tiny_model import write_tiny_model

from triattention_vllm.config import Settings
from triattention_vllm.metrics import METRICS, PREFIX
from triattention_vllm.tools.server import Server, serving

ROOT = Path(__file__).parents[2]
BLOCK_SIZE = 32
SETTINGS = Settings(budget=256, interval=64)
LINE = re.compile(
    r"KV compression: [\d,]+ blocks freed, \d+\.\dx fewer cached tokens, [\d,]+ preemptions"
)


def scraped(server: Server) -> dict[str, dict[str, float]]:
    """Engine -> sample -> value, for our metrics alone, without buckets."""
    engines: dict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and "le" not in sample.labels:
                assert sample.labels["model_name"] == "tiny"
                engines[sample.labels["engine"]][sample.name.removeprefix(PREFIX)] = sample.value
    return dict(engines)


def total(server: Server) -> dict[str, float]:
    """Sample -> sum over engines."""
    sums: dict[str, float] = {}
    for samples in scraped(server).values():
        for name, value in samples.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def total_when_idle(server: Server) -> dict[str, float]:
    """The sums once no request runs any more."""
    deadline = time.monotonic() + 30
    while True:
        sums = total(server)
        if sums["logical_tokens"] == 0 or time.monotonic() > deadline:
            return sums
        time.sleep(0.1)


def answer(server: Server, prompt: str, num_tokens: int) -> int:
    """Ask for an answer of exactly so many tokens; returns those of the prompt."""
    client = OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=240)
    done = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=num_tokens, extra_body={"ignore_eos": True}
    )
    assert done.usage is not None
    assert done.usage.completion_tokens == num_tokens
    return done.usage.prompt_tokens


def expected_rounds(num_prompt: int, num_answer: int) -> tuple[int, int]:
    """(rounds, evicted tokens) of an answer that is decoded token by token."""
    policy = SETTINGS.policy(BLOCK_SIZE)
    num_rounds = num_evicted = 0
    for num_committed in range(num_prompt, num_prompt + num_answer):
        due = policy.due_round(num_committed, num_evicted, num_prompt)
        if due is not None:
            num_rounds, num_evicted = num_rounds + 1, due.num_evicted_after
    return num_rounds, num_evicted


@pytest.mark.feature("Metrics", "works")
def test_a_scrape_counts_what_an_answer_did(server: Server) -> None:
    before = total_when_idle(server)
    num_prompt = answer(server, "Count me.", 900)
    after = total_when_idle(server)
    counted = {name: after[name] - before[name] for name in after}
    num_rounds, num_evicted = expected_rounds(num_prompt, 900)
    assert num_rounds > 5
    assert counted["rounds_total"] == counted["round_time_seconds_count"] == num_rounds
    assert counted["evicted_tokens_total"] == num_evicted
    assert counted["freed_blocks_total"] == num_evicted // BLOCK_SIZE
    assert counted["compressed_requests_total"] == 1
    assert 0 < counted["copy_on_write_blocks_total"] < SETTINGS.budget // BLOCK_SIZE
    assert counted["round_time_seconds_sum"] > 0
    assert counted["request_max_cached_tokens_count"] == 1
    assert counted["request_max_cached_tokens_sum"] == SETTINGS.budget + SETTINGS.interval


def test_the_gauges_follow_the_requests_that_run_now_and_an_abort(server: Server) -> None:
    client = OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=240)
    seen = []
    stream = client.completions.create(
        model="tiny",
        prompt="Stop me.",
        max_tokens=6000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with stream:
        for idx, _ in enumerate(stream):
            if idx % 200 == 199:
                seen.append(total(server))
            if idx == 800:
                break
    assert [sums["logical_tokens"] for sums in seen] == sorted(s["logical_tokens"] for s in seen)
    assert seen[-1]["logical_tokens"] >= 800
    assert 192 < seen[-1]["cached_tokens"] <= SETTINGS.budget + SETTINGS.interval
    assert total_when_idle(server)["cached_tokens"] == 0


def test_every_metric_is_in_a_scrape_beside_vllms(server: Server) -> None:
    samples = scraped(server)["0"]
    declared = {name.removeprefix(PREFIX) for metric in METRICS for name in sample_names(metric)}
    assert set(samples) == {name for name in declared if not name.endswith("_bucket")}
    assert "vllm:num_preemptions_total" in server.metrics()


def test_a_log_line_beside_vllms_says_what_was_freed(server: Server) -> None:
    deadline = time.monotonic() + 30
    while not (lines := LINE.findall(server.log())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert any(not line.startswith("KV compression: 0 blocks") for line in lines)
    assert all(line.endswith(" 0 preemptions") for line in lines)


def test_the_picture_of_the_dashboard_is_drawn_from_scrapes(server: Server, tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "dashboard.py"
    spec = importlib.util.spec_from_file_location("dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    dashboard = importlib.util.module_from_spec(spec)
    sys.modules["dashboard"] = dashboard  # where its dataclass looks for its own module
    spec.loader.exec_module(dashboard)
    panels = json.loads(dashboard.DASHBOARD.read_text())["panels"]
    queries = {panel["title"]: len(panel["targets"]) for panel in panels}
    assert {title: len(series) for title, series in dashboard.SERIES.items()} == queries
    scrapes = [dashboard.scrape(server, time.monotonic() - idx) for idx in range(3)]
    dashboard.draw(scrapes, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_api_server_answers_for_all_engines(tmp_path: Path) -> None:
    """Two engines (data parallel) and two API servers: whichever is asked says the same."""
    model = write_tiny_model(tmp_path / "model", num_layers=2, hidden_size=128, head_dim=32)
    arguments = [
        "--served-model-name=tiny",
        "--dtype=float32",
        "--enforce-eager",
        "--data-parallel-size=2",
        "--api-server-count=2",
        "--max-model-len=2048",
        f"--block-size={BLOCK_SIZE}",
        "--kv-cache-memory-bytes=4M",
        "--max-num-batched-tokens=512",
        "--kv-compression=triattention",
        "--kv-compression-config.budget=256",
        "--kv-compression-config.interval=64",
        "--kv-compression-config.window=32",
    ]
    environment = {
        "TRIATTENTION_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        # Both engines would be bound to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with (
        serving(model, arguments, tmp_path / "log", environment=environment) as server,
        ThreadPoolExecutor(4) as threads,
    ):
        prompts = [f"Answer {idx}." for idx in range(4)]
        lengths = list(threads.map(lambda prompt: answer(server, prompt, 450), prompts))
        sums = total_when_idle(server)
        scrapes = [scraped(server) for _ in range(8)]
    expected = [expected_rounds(length, 450) for length in lengths]
    assert set(scrapes[0]) == {"0", "1"}
    assert all(scrape == scrapes[0] for scrape in scrapes)
    assert sums["rounds_total"] == sum(num_rounds for num_rounds, _ in expected)
    assert sums["evicted_tokens_total"] == sum(num_evicted for _, num_evicted in expected)
    assert sums["round_time_seconds_count"] == sums["rounds_total"]
    assert sums["compressed_requests_total"] == 4
