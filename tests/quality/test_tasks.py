"""The tasks' answers against oracles that read nothing but the prompt."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from quality.batches import GENERATORS, LONG, NOT_LEARNED, make_batch
from quality.batches import TASKS as LEARNED
from quality.problems import DEPTHS, held_out_problems, public_dfs_problems
from quality.tasks import machine, needle
from quality.tasks.problem import HARD_WEIGHT, Problem
from quality.vocabulary import EOS, IDS, LETTERS, PAD, TASKS, VOCAB_SIZE

LENGTHS = (128, 300, 1024)
TASK_IDS = {task: idx for idx, task in enumerate(LEARNED)}


def problems(task: str, num_problems: int = 20) -> list[Problem]:
    return [
        GENERATORS[task](Random(f"{task} {length} {idx}"), length)
        for length in LENGTHS
        for idx in range(num_problems)
    ]


def entries(words: list[str], ends: str = ";") -> list[list[str]]:
    """Words up to each ``ends``."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == ends:
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_the_vocabulary_has_128_different_words() -> None:
    assert len(IDS) == VOCAB_SIZE == 128


@pytest.mark.parametrize("task", GENERATORS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_problem_fits_its_length_and_repeats_for_its_seed(task: str, length: int) -> None:
    for idx in range(10):
        problem = GENERATORS[task](Random(idx), length)
        assert 20 < problem.num_words <= length
        assert GENERATORS[task](Random(idx), length) == problem
        for turn in problem.turns:
            assert set(turn.prompt + turn.answer.words) <= set(IDS)
            assert any(turn.answer.graded)


@pytest.mark.parametrize("task", ["dfs", "dense"])
def test_a_search_reports_what_a_recursive_search_finds(task: str) -> None:
    for problem in problems(task):
        *lines, last = entries(problem.prompt[2:])
        graph = {line[0]: line[2:] for line in lines}
        start, last_step = last[1], int(last[3]) * 10 + int(last[4])
        states = list(recursive_states(graph, start))
        stack, visited = states[last_step]
        trace, found_stack, found_nodes = entries(problem.answer.words[:-1], "|")
        assert found_stack == [*reversed(stack), "root"]
        assert found_nodes == [
            word for node in graph for word in (node, "x" if node in visited else "o")
        ]
        assert sum(word in "+-" for word in trace) == last_step + 1
        assert problem.answer.words[-1] == EOS


def test_dense_graphs_have_the_long_lists_of_long_problems() -> None:
    def longest_list(task: str, length: int) -> int:
        made = (GENERATORS[task](Random(idx), length) for idx in range(100))
        return max(len(line) - 2 for problem in made for line in entries(problem.prompt[2:])[:-1])

    assert longest_list("dense", 1024) >= 18 > longest_list("dfs", 1024)


def recursive_states(graph: dict[str, list[str]], start: str) -> list[tuple[list[str], set[str]]]:
    """(stack, visited) after every step, by recursion."""
    states: list[tuple[list[str], set[str]]] = []
    visited: set[str] = set()

    def visit(stack: list[str]) -> None:
        visited.add(stack[-1])
        states.append((stack, set(visited)))
        for neighbour in graph[stack[-1]]:
            if neighbour not in visited:
                visit([*stack, neighbour])
                states.append((stack, set(visited)))

    visit([start])
    return states


def test_a_trace_is_what_the_machine_does() -> None:
    for problem in problems("machine"):
        registers, *lines, last = entries(problem.prompt[2:])
        values = dict(zip(registers[::2], map(int, registers[1::2]), strict=True))
        program = {line[0]: line[2:] for line in lines}
        label, trace = last[1], []
        while len(trace) < len(problem.answer.words):
            x, y, z, even, odd = program[label]
            trace += [label, x, str(values[x]), y, str(values[y]), z]
            values[z] = (values[x] + values[y]) % 10
            trace.append(str(values[z]))
            label = (even, odd)[values[z] % 2]
        assert trace[: len(problem.answer.words)] == problem.answer.words


@pytest.mark.parametrize(("task", "weight"), [("machine", 1), ("changed", HARD_WEIGHT)])
def test_values_that_are_not_what_their_line_read_before_can_weigh_more(
    task: str, weight: float
) -> None:
    for problem in problems(task, 5):
        answer = problem.answer
        read: dict[tuple[str, int], str] = {}
        for idx, word in enumerate(answer.words):
            place = idx % machine.WORDS_PER_STEP
            slot = (answer.words[idx - place], place)
            is_new = read.setdefault(slot, word) != word
            read[slot] = word
            usual = HARD_WEIGHT if place == machine.WORDS_PER_STEP - 1 else 1
            is_changed = place in (2, 4) and is_new
            assert answer.weights[idx] == (weight if is_changed else usual)


@pytest.mark.parametrize("task", ["recall", "unbroken"])
def test_recall_answers_with_the_latest_value_of_each_key_asked(task: str) -> None:
    for problem in problems(task):
        latest: dict[str, str] = {}
        for turn in problem.turns:
            asked_at = turn.prompt.index("?")
            stream = [word for word in turn.prompt[:asked_at] if word not in ("<bos>", "recall")]
            latest.update(zip(stream[::2], stream[1::2], strict=True))
            asked = turn.prompt[asked_at + 1 : -1]
            expected = [word for key in asked for word in (key, latest[key])]
            assert turn.answer.words == [*expected, EOS]


def test_a_running_sum_is_that_of_whole_numbers() -> None:
    for problem in problems("add"):
        first, *lines, last = entries(problem.prompt[2:])
        columns, start = first[::2], last[1]
        cells = {name: (int(digit), column, after) for name, digit, column, after in lines}
        total = int("".join(reversed(first[1::2])))
        words = problem.answer.words
        blocks = [words[idx : idx + 7] for idx in range(0, len(words) - 6, 7)]
        assert len(blocks) > len(columns)
        name = start
        while len(blocks) >= len(columns):
            addend = 0
            for place, (column, block) in enumerate(zip(columns, blocks, strict=False)):
                digit, own_column, after = cells[name]
                before = str(total // 10**place % 10)
                assert block[:5] == [name, str(digit), column, before, column]
                assert own_column == column
                addend += digit * 10**place
                name = after
            total = (total + addend) % 10 ** len(columns)
            written = [block[5] for block in blocks[: len(columns)]]
            assert int("".join(reversed(written))) == total
            del blocks[: len(columns)]


@pytest.mark.parametrize("task", ["needle", "scattered"])
def test_needles_are_answered_with_the_digits_behind_each_key_asked(task: str) -> None:
    for problem in problems(task):
        read: list[str] = []
        for turn in problem.turns:
            asked_at = turn.prompt.index("?")
            read += turn.prompt[:asked_at]
            places = [read.index(key) for key in turn.prompt[asked_at + 1 : -1]]
            found = [word for place in places for word in read[place : place + 4]]
            assert turn.answer.words == [*found, EOS]


def test_late_streams_and_haystacks_are_read_whole_before_the_first_question() -> None:
    """As in the test problems; what asks every now and then never has a stretch as long."""
    for task, usual in (("unbroken", "recall"), ("scattered", "needle")):
        made = [
            [GENERATORS[name](Random(idx), 4096) for idx in range(100)] for name in (task, usual)
        ]
        whole, often = ([len(problem.turns[0].prompt) for problem in own] for own in made)
        assert min(whole) > 3900 > 2800 > max(often)
        assert {len(problem.turns) for problem in made[0]} == {1, 8}


def test_needles_lie_anywhere_late_and_often_at_the_end() -> None:
    def last_needle(task: str, idx: int) -> float:
        prompt = GENERATORS[task](Random(idx), 4096).turns[0].prompt
        text = prompt[: prompt.index("?")]
        return max(place for place, word in enumerate(text) if word in LETTERS) / (len(text) - 4)

    late = [last_needle("scattered", idx) for idx in range(100)]
    assert min(late) < 0.3
    assert 35 < sum(place == 1 for place in late) < 65


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_lies_at_its_depth(depth: float) -> None:
    problem = needle.at_depths(Random(3), 500, [depth])
    key, value = problem.answer.words[0], problem.answer.words[1:-1]
    place = problem.prompt.index(key)
    assert problem.prompt[place + 1 : place + 4] == value
    assert place == pytest.approx(2 + depth * 485, abs=2)
    assert problem.num_words <= 500


def test_test_problems_are_as_long_as_asked_and_end_with_one_question() -> None:
    for task in TASKS:
        for problem in held_out_problems(task, 512, 7):
            assert 0.75 * 512 <= problem.num_words <= 512
            assert task in ("needle", "recall", problem.task)
            assert len(problem.turns) == 1


def test_a_batch_learns_answers_only_and_is_the_same_for_the_same_step() -> None:
    batch = make_batch(seed=1, step=2, num_rows=6, length=256)
    again = make_batch(seed=1, step=2, num_rows=6, length=256)
    assert batch.ids.equal(again.ids)
    learned = batch.labels != NOT_LEARNED
    assert batch.labels[:, :-1][learned[:, :-1]].equal(batch.ids[:, 1:][learned[:, :-1]])
    assert (learned | ~batch.graded).all()
    assert learned.any(1).all()
    question = IDS["?"]
    assert not (batch.labels == question).any()


def test_rows_weigh_the_same_and_late_ones_more_the_more_is_learned_of_them() -> None:
    same = make_batch(seed=1, step=2, num_rows=6, length=512)
    torch.testing.assert_close(same.weights.sum(1), torch.ones(6))
    late = make_batch(seed=1, step=2, num_rows=6, length=512, late=(0, 3))
    share = (late.labels != NOT_LEARNED).float().mean(1)
    torch.testing.assert_close(late.weights.sum(1), share.sqrt())
    assert share.max() > 4 * share.min()


def test_late_problems_are_as_long_as_those_of_the_test() -> None:
    def share_long(late: tuple[int, ...]) -> float:
        batches = [make_batch(seed, 3, 20, 1024, late=late) for seed in range(8)]
        ids = torch.cat([batch.ids[batch.tasks == TASK_IDS["dfs"]] for batch in batches])
        return (ids != IDS[PAD]).sum(1).ge(LONG * 1024).float().mean().item()

    assert share_long((TASK_IDS["dfs"],)) > 0.95 > 0.8 > share_long(())
    for task in ("dense", "changed", "unbroken", "scattered", "add"):
        late = make_batch(1, 3, 20, 1024, late=(TASK_IDS[task],))
        assert ((late.ids != IDS[PAD]).sum(1) >= LONG * 1024).float().mean() > 0.8


def entry(steps: int, stack: list[int], visited: list[int]) -> dict[str, object]:
    """One entry of the public file: the path 0 - 2 - 1."""
    answer = {"current_node": stack[-1], "stack": stack, "visited_nodes": visited}
    graph = {"nodes": [0, 1, 2], "edges": [[0, 2], [1, 2]]}
    return {"id": steps, "graph": graph, "start_node": 0, "steps": steps, "answer": answer}


def test_public_searches_become_ours_with_the_answer_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dfs.json"
    content = [entry(2, [0, 2, 1], [0, 1, 2]), entry(3, [0, 2], [0, 1, 2])]
    path.write_text(json.dumps(content), encoding="utf-8")
    first, second = public_dfs_problems(path, 10)
    end = ["|", "n1", "n2", "n0", "root", "|", "n0", "x", "n1", "x", "n2", "x", "<eos>"]
    assert first.answer.words[-len(end) :] == end
    end = ["|", "n2", "n0", "root", "|", "n0", "x", "n1", "x", "n2", "x", "<eos>"]
    assert second.answer.words[-len(end) :] == end


def test_a_public_answer_that_is_not_ours_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "dfs.json"
    path.write_text(json.dumps([entry(1, [0, 1], [0, 1])]), encoding="utf-8")
    with pytest.raises(ValueError, match="problem 1: stack and visited nodes are"):
        public_dfs_problems(path, 10)
