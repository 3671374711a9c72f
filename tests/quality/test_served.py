"""Published benchmarks through the OpenAI API: resumed, graded by lm-eval, beside the paper's."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from quality import served
from quality.lm_eval_tasks import dfs_state_query, livecodebench
from quality.served import check_folder, parse, sample, table

QUESTIONS = [{"ID": str(n), "Problem": f"What is {n} + 1?", "Answer": n + 1} for n in range(4)]


GRAPH = {"nodes": [0, 1, 2, 3], "edges": [[0, 1], [0, 2], [1, 3]]}
STATES = [
    {"current_node": 3, "stack": [0, 1, 3], "visited_nodes": [0, 1, 3]},
    {"current_node": 2, "stack": [0, 2], "visited_nodes": [0, 1, 2, 3]},
]
SEARCHES = [
    {"id": idx, "graph": GRAPH, "start_node": 0, "steps": steps, "answer": state}
    for idx, (steps, state) in enumerate(zip((2, 5), STATES, strict=True))
]
PROGRAMS = [
    {"question_id": "abc_b", "question_content": "Add 1 to a number.", "starter_code": ""},
    {"question_id": "abc_a", "question_content": "Add.", "starter_code": "def add(a, b):\n    "},
]


class Answers(BaseHTTPRequestHandler):
    """Stands in for a model, which cannot answer AIME here: right for even numbers, for the state
    of a search after two steps, and with a program where it reads its input."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        question = body["messages"][-1]["content"]
        if "depth-first" in question:
            said = f"At first {{}}, then: {json.dumps(STATES[0])}"
        elif "Python" in question:
            said = "First ```x```.\n```python\nprint(int(input()) + 1)\n```\nDone."
            said = said if "stdin" in question else "No idea."
        else:
            number = int(question.split("What is ")[1].split(" ")[0])
            said = f"So it is $\\boxed{{{number + 1 + number % 2}}}$."
        message = {"role": "assistant", "content": said}
        answer = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type("Asked", (Answers,), {"asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", handler.asked
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def ask(
    server: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Sequence[dict[str, Any]], int], dict[str, Any]]:
    """lm-eval's figures of one sample of a task over these entries."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    url, _ = server

    def figures(task: str, entries: Sequence[dict[str, Any]], idx: int) -> dict[str, Any]:
        data = tmp_path / "entries.json"
        data.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
        words = ["--base-url", url, "--model", "stand-in", "--output", str(tmp_path)]
        return sample(parse([*words, "--tasks", task, "--data", f"{task}={data}"]), task, idx)

    return figures


def test_a_stand_in_for_aime24_is_asked_graded_and_not_asked_again(
    server: tuple[str, list[dict[str, Any]]],
    ask: Callable[[str, Sequence[dict[str, Any]], int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    _, asked = server
    found = [ask("aime24", QUESTIONS, idx) for idx in range(2)]
    assert [one["exact_match,none"] for one in found] == [0.5, 0.5]
    assert len(asked) == 8
    for request in asked:
        assert request["path"] == "/v1/chat/completions"
        assert (request["temperature"], request["top_p"]) == (0.6, 0.95)
        assert request["max_tokens"] == 32768
        assert "Question:" not in request["stop"], "a model that thinks may say it"
        assert len(request["messages"]) == 1, "no worked examples"
    assert {request["seed"] for request in asked} == {0, 1}
    assert [ask("aime24", QUESTIONS, idx) for idx in range(2)] == found
    (tmp_path / "aime24-0.json").unlink()  # as if interrupted before it was graded
    assert ask("aime24", QUESTIONS, 0) == found[0]
    assert len(asked) == 8


def test_the_public_searches_are_asked_in_words_and_judged_part_by_part(
    server: tuple[str, list[dict[str, Any]]],
    ask: Callable[[str, Sequence[dict[str, Any]], int], dict[str, Any]],
) -> None:
    _, asked = server
    found = ask("dfs_state_query", SEARCHES, 0)
    parts = ("exact", "current_node", "stack", "visited_nodes")
    assert [found[f"{part},none"] for part in parts] == [0.5] * 4
    questions = [request["messages"][-1]["content"] for request in asked]
    assert all("1: 0, 3\n" in question for question in questions)
    assert sorted("after step 2?" in question for question in questions) == [False, True]


def test_programs_are_written_as_the_evaluator_of_livecodebench_takes_them(
    server: tuple[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two samples of each question, questions by their ids; one answer has no program."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, PROGRAMS)), encoding="utf-8")
    url, asked = server
    words = ["--base-url", url, "--model", "stand-in", "--output", str(tmp_path), "--samples", "2"]
    words += ["--tasks", "livecodebench", "--data", f"livecodebench={data}"]
    monkeypatch.setattr("sys.argv", ["served", *words])
    for num_asked in (4, 4):  # and nothing is asked again
        served.main()
        assert len(asked) == num_asked
        written = json.loads((tmp_path / "livecodebench.json").read_text(encoding="utf-8"))
        assert written == [["", ""], ["print(int(input()) + 1)\n"] * 2]
        said = capsys.readouterr().out
        assert "| livecodebench | has_program,none | 2 | 50.0 ± 0.0 |" in said
        assert str(tmp_path / "livecodebench.json") in said.splitlines()[-1]
    questions = sorted(request["messages"][-1]["content"] for request in asked)
    assert sum("def add(a, b):" in question for question in questions) == 2


def test_the_last_block_of_an_answer_is_its_program() -> None:
    said = "```python\nfirst\n```\nno:\n```\nlast = `a`\n```\n"
    assert livecodebench.program(said) == "last = `a`\n"
    assert livecodebench.program("```python\nunfinished") == ""


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("niah_single_2", "--tokenizer"),
        ("dfs_state_query", "--data dfs_state_query=FILE"),
        ("livecodebench", "--data livecodebench=FILE"),
    ],
)
def test_a_task_that_lacks_something_is_refused_before_anything_is_asked(
    task: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base-url", "http://127.0.0.1:1", "--model", "none", "--output", "nowhere"]
    with pytest.raises(SystemExit):
        parse([*words, "--tasks", task])
    assert missing in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        (["--limit", "4"], "limit was None and is 4"),
        (["--base-url", "http://127.0.0.1:2"], "base_url was 'http://127.0.0.1:1' and is"),
        (["--max-tokens", "64"], "max_tokens was 32768 and is 64"),
        (["--tokenizer", "other"], "tokenizer was 'one' and is 'other'"),
        (["--data", "dfs_state_query={other}"], "data of dfs_state_query was"),
    ],
)
def test_a_folder_takes_no_answers_that_are_asked_for_otherwise(
    tmp_path: Path, otherwise: list[str], said: str
) -> None:
    """Regression: those of a shorter list of questions, or of the server without compression, were
    taken for the ones asked for."""
    data, other = tmp_path / "data.json", tmp_path / "other.json"
    data.write_text("[]", encoding="utf-8")
    other.write_text("[{}]", encoding="utf-8")
    base = ["--base-url", "http://127.0.0.1:1", "--model", "one", "--output", str(tmp_path)]
    plain = [*base, "--tasks", "aime24"]
    check_folder(parse(plain))
    grown = [*base, "--samples", "9", "--tokenizer", "one", "--data", f"dfs_state_query={data}"]
    check_folder(parse(grown))
    check_folder(parse([*plain, "--concurrent", "1"]))
    with pytest.raises(SystemExit, match=f"{said}.*Give another --output"):
        check_folder(parse([*plain, *(word.format(other=other) for word in otherwise)]))
    check_folder(parse(grown))


def test_an_answer_without_a_state_is_wrong_in_every_part() -> None:
    for said in ("", "no idea {", "[1]", '{"stack": 0} {broken}'):
        assert set(dfs_state_query.judged(SEARCHES[0], [said]).values()) == {0.0}


def test_the_table_has_measured_and_published_figures_side_by_side() -> None:
    figures = {"aime24": [{"exact_match,none": 0.5}, {"exact_match,none": 0.25}]}
    last = table(figures).split("\n")[-1]
    assert last.startswith("| aime24 | exact_match,none | 2 | 37.5 ± 17.7 | Qwen3-8B: full 57.1")
