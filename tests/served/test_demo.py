"""The demo's parts against the shared server, and its figures against small examples."""

import argparse
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from triattention_vllm.errors import SettingsError, TriAttentionError
from triattention_vllm.tools import demo, server
from triattention_vllm.tools.blocks_plot import plot_blocks
from triattention_vllm.tools.demo_display import Display, comparison
from triattention_vllm.tools.load import Timeline, put_under_load
from triattention_vllm.tools.reasoner import problems, right_share
from triattention_vllm.tools.server import PoolState, Server, pool_state, serving

METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",num_gpu_blocks="96"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.4
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 1.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 2.0
"""


def timeline(name: str, preemptions: tuple[int, ...]) -> Timeline:
    states = [
        PoolState(float(second), 95, 90 - 10 * count, 4 - count, count, count)
        for second, count in enumerate(preemptions)
    ]
    return Timeline(name, 4, states, num_tokens=300, seconds=3.0)


def test_the_pool_is_read_from_vllms_metrics() -> None:
    assert pool_state(METRICS, 7.0) == PoolState(7.0, 95, 38, 3, 1, 2)


def test_a_missing_metric_is_named() -> None:
    without = METRICS.replace("vllm:kv_cache_usage_perc", "other")
    with pytest.raises(TriAttentionError, match="kv_cache_usage_perc"):
        pool_state(without, 0.0)


def test_a_timeline_counts_preemptions_and_requests_running() -> None:
    run = timeline("full", (0, 0, 1, 3))
    assert run.num_preemptions == 3
    assert run.preemption_seconds == [2.0, 3.0]
    assert run.peak_held == 90
    assert run.median_running == 3.5


def test_the_table_and_the_picture_show_both_runs(tmp_path: Path) -> None:
    runs = [timeline("full attention", (0, 0, 1, 3)), timeline("budget 512", (0, 0, 0, 0))]
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison(runs, [2048, 16384], [1.0, 0.9]))
    shown = console.file.getvalue()
    for part in ("full attention", "budget 512", "90 (95%)", "16384", "100%", "90%"):
        assert part in shown
    png, svg = plot_blocks(runs, tmp_path / "blocks", title="two runs")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "3 preemptions" in svg.read_text(encoding="utf-8").replace("<!-- ", "")


def test_a_load_on_the_server_is_watched_to_its_end(server: Server) -> None:
    console = Console(file=io.StringIO(), width=200)
    seen = []
    given = problems()[:2]
    with Display(console, "compressed", 1600) as display:

        def look(state: PoolState, num_streamed: int) -> None:
            seen.append(num_streamed)
            display.last_line -= 10
            display.show(state, num_streamed)

        run = put_under_load(server, "compressed", [one.prompt for one in given], 800, look)
    assert run.num_tokens == 1600
    assert [len(answer.split()) for answer in run.answers] == [800, 800]
    assert 0.05 < right_share(given, run.answers) <= 1
    for problem, answer in zip(given, run.answers, strict=True):
        before_a_round = 320 - len(problem.prompt.split())
        assert before_a_round > 50
        expected = problem.answer.split()[:before_a_round]
        assert answer.split()[:before_a_round] == expected
    assert seen == sorted(seen)
    assert seen[-1] == 1600
    assert 0 < run.peak_held < 2 * 800 // 32
    assert run.num_preemptions == 0
    assert "of 1600 tokens" in console.file.getvalue()


def test_more_answer_than_the_short_context_holds_is_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    args = parser.parse_args(["--answer-tokens", "4000", "--output", str(tmp_path / "out")])
    with pytest.raises(SettingsError, match="--answer-tokens is 4000"):
        demo.run(args)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in the place of ``vllm``; write its script into the returned path."""
    command = tmp_path / "vllm"
    monkeypatch.setattr(server, "vllm_command", lambda: command)
    return command


def write_script(command: Path, body: str) -> None:
    command.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    command.chmod(0o755)


def test_a_server_that_ends_early_shows_the_end_of_its_log(stand_in: Path, tmp_path: Path) -> None:
    write_script(stand_in, "echo no such model; exit 3")
    with (
        pytest.raises(TriAttentionError, match=r"exit code 3(.|\n)*no such model"),
        serving(tmp_path, [], tmp_path / "log"),
    ):
        pytest.fail("it never became ready")


def test_a_server_that_ignores_the_signal_is_killed_with_its_children(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triattention_vllm.tools.server._SECONDS_TO_STOP", 0.5)
    write_script(stand_in, "trap '' TERM; sleep 600 & while true; do sleep 1; done")
    started: list[Server] = []
    monkeypatch.setattr(Server, "wait_until_ready", lambda self, timeout: started.append(self))
    with serving(tmp_path, [], tmp_path / "log") as running:
        assert running.has_processes()
    deadline = time.monotonic() + 30  # a dead child counts until the system has collected it
    while started[0].has_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not started[0].has_processes()


def test_settings_of_this_shell_do_not_reach_the_server(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIATTENTION_ENABLE", "1")
    monkeypatch.setenv("TRIATTN_RUNTIME_KV_BUDGET", "64")
    monkeypatch.setenv("TRIATTENTION_ALLOW_UNTESTED_VLLM", "1")
    write_script(stand_in, "env; exit 1")
    environment = {"TRIATTENTION_CACHE": "/chosen"}
    with (
        pytest.raises(TriAttentionError, match="before it was ready"),
        serving(tmp_path, [], tmp_path / "log", environment=environment),
    ):
        pytest.fail("it never became ready")
    shown = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert "TRIATTENTION_CACHE=/chosen" in shown
    assert "HF_HUB_OFFLINE=1" in shown
    assert "TRIATTENTION_ALLOW_UNTESTED_VLLM=1" in shown
    assert not [line for line in shown if line.startswith(("TRIATTENTION_ENABLE", "TRIATTN_"))]
