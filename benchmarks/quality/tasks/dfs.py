"""Depth-first search, step by step, then its state: stack and visited nodes.

    prompt   <bos> dfs  n4 : n7 n9 ;  n7 : n4 ;  n9 : n4 ;  start n4 step 0 2 ?
    answer   0 2 + n4 root  n7 o   0 1 + n7 n4  n4 x   0 0 - n4  | n4 root | n4 x n7 x n9 o <eos>

Each step says how many are left, ``+ node parent`` for a visit or ``- node`` for a return to that
node, then the neighbours of the node in order, ``x`` (visited) up to the first ``o`` (new). At the
last step the state is reported: the stack from its top to the root, and each node of the graph
with ``x`` or ``o``. A step has two digits, so there are at most 99. They count down so that the
last step shows itself: a small model does not learn to compare two far numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from quality.tasks.problem import Answer, Problem, Turn
from quality.vocabulary import BOS, SYMBOLS

Graph = Mapping[str, Sequence[str]]
MAX_STEP = 99
MOST_PROMPT = 0.6
"""Share of a problem's words, about; the graph is smaller where it would need more."""


@dataclass(frozen=True)
class State:
    """A search after some steps. scan: neighbours looked at next, up to the first new one."""

    node: str
    is_visit: bool
    parents: Mapping[str, str]
    scan: Sequence[str]


def generate(rng: Random, length: int, extras: Sequence[float] = ()) -> Problem:
    """A problem of at most ``length`` words (step 0 of a small graph where none fits).

    Its graph has one of ``extras`` edges per node more than a tree: by default more, the longer.
    """
    most_nodes = max(5, min(len(SYMBOLS) - 4, length // 14))
    num_nodes = (
        rng.randint(most_nodes // 2, most_nodes)
        if rng.random() < 0.7
        else (rng.randint(4, most_nodes))
    )
    usual = [share * max(1, length / 400) for share in (0, 0.1, 0.3, 0.6, 1)]
    extra = rng.choice(extras or usual)
    # A node is five words of the prompt, an edge two.
    num_nodes = min(num_nodes, max(4, int(MOST_PROMPT * length / (5 + 2 * extra))))
    graph = random_graph(rng, num_nodes, extra)
    start = rng.choice(list(graph))
    fitting = [0]
    so_far = len(_prompt(graph, start, 0)) + 2 * num_nodes + 4
    for step, state in enumerate(search(graph, start)):
        if so_far + _depth(state) + 5 <= length:
            fitting.append(step)
        so_far += 5 + 2 * len(state.scan)
    # Half of the problems are as long as fits.
    return problem(graph, start, fitting[-1] if rng.random() < 0.5 else rng.choice(fitting))


def problem(graph: Graph, start: str, last_step: int) -> Problem:
    """The state of a search from ``start`` after ``last_step`` steps.

    Raises ValueError where the search ends before, or the step has more than two digits.
    """
    answer = Answer()
    for step, state in enumerate(search(graph, start)):
        answer.form(*_digits(last_step - step))
        answer.memory("+" if state.is_visit else "-", state.node)
        if state.is_visit:
            answer.memory(state.parents[state.node])
        if step == last_step:
            _report(answer, graph, state)
            return Problem("dfs", [Turn(_prompt(graph, start, last_step), answer)])
        for neighbour in state.scan:
            answer.memory(neighbour, "x" if neighbour in state.parents else "o")
    raise ValueError(f"the search from {start} ends before step {last_step}")


def search(graph: Graph, start: str) -> Iterator[State]:
    """The states of a depth-first search that takes the first new neighbour, until it is back at
    the root with nothing new; at most MAX_STEP + 1."""
    parents = {start: "root"}
    node, is_visit = start, True
    for _ in range(MAX_STEP + 1):
        scan: list[str] = []
        for neighbour in graph[node]:
            scan.append(neighbour)
            if neighbour not in parents:
                break
        yield State(node, is_visit, dict(parents), scan)
        is_visit = bool(scan) and scan[-1] not in parents
        if is_visit:
            parents[scan[-1]] = node
            node = scan[-1]
        elif node == start:
            return
        else:
            node = parents[node]


def random_graph(rng: Random, num_nodes: int, extra: float) -> Graph:
    """A connected graph of ``num_nodes`` symbols: a tree and ``extra`` more edges per node.

    Neighbours come in the order of the nodes, which is the order of the symbols every second time.
    """
    nodes = rng.sample(SYMBOLS, num_nodes)
    if rng.random() < 0.5:
        nodes.sort(key=SYMBOLS.index)
    reach = rng.choice((1, 3, num_nodes))  # long branches, or bushy ones
    joined = rng.sample(range(num_nodes), num_nodes)
    edges = {
        (joined[idx], joined[rng.randrange(max(0, idx - reach), idx)])
        for idx in range(1, num_nodes)
    }
    for _ in range(int(extra * num_nodes)):
        first, second = rng.sample(range(num_nodes), 2)
        edges.add((first, second))
    return from_edges(nodes, [(nodes[a], nodes[b]) for a, b in edges])


def from_edges(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Graph:
    """Neighbours of each node, in the order of ``nodes``."""
    near: dict[str, set[str]] = {node: set() for node in nodes}
    for first, second in edges:
        near[first].add(second)
        near[second].add(first)
    order = {node: idx for idx, node in enumerate(nodes)}
    return {node: sorted(near[node], key=order.__getitem__) for node in nodes}


def _prompt(graph: Graph, start: str, last_step: int) -> list[str]:
    words = [BOS, "dfs"]
    for node, neighbours in graph.items():
        words += [node, ":", *neighbours, ";"]
    return [*words, "start", start, "step", *_digits(last_step), "?"]


def _report(answer: Answer, graph: Graph, state: State) -> None:
    """Stack from the top to the root, then every node of the graph, visited or not."""
    answer.hard("|")
    node = state.node
    while node != "root":
        answer.memory(node)
        node = state.parents[node]
    answer.memory("root")
    answer.form("|")
    for node in graph:
        answer.memory(node, "x" if node in state.parents else "o")
    answer.end()


def _depth(state: State) -> int:
    depth, node = 0, state.node
    while node != "root":
        depth, node = depth + 1, state.parents[node]
    return depth


def _digits(step: int) -> tuple[str, str]:
    return str(step // 10), str(step % 10)
