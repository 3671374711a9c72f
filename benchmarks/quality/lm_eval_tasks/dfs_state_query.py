"""The public depth-first state queries in plain language, and how an answer is judged.

Used by lm-eval through ``dfs_state_query.yaml``; no kept grader exists for them.
"""

import json
import re
from collections import defaultdict
from typing import Any

Json = dict[str, Any]
ASKED = ("current_node", "stack", "visited_nodes")
_OBJECT = re.compile(r"\{[^{}]*\}")
_QUESTION = """\
An undirected graph, each node with its neighbours:
{graph}

A depth-first search begins at node {start}, which is visited at step 0. Every further step either \
visits the smallest unvisited neighbour of the current node, or, where there is none, goes back to \
the node below it on the stack. What is the state after step {steps}?

Think step by step. End with one line of JSON: {{"current_node": node, "stack": [nodes from the \
start to the current node], "visited_nodes": [all visited nodes, ascending]}}"""


def question(doc: Json) -> str:
    """The prompt of an entry of the file."""
    near: dict[int, list[int]] = defaultdict(list)
    for first, second in doc["graph"]["edges"]:
        near[first].append(second)
        near[second].append(first)
    lines = [
        f"{node}: {', '.join(map(str, sorted(near[node])))}"
        for node in sorted(doc["graph"]["nodes"])
    ]
    return _QUESTION.format(graph="\n".join(lines), start=doc["start_node"], steps=doc["steps"])


def target(doc: Json) -> str:
    """The right answer, as a line of JSON."""
    return json.dumps({name: doc["answer"][name] for name in ASKED})


def judged(doc: Json, results: list[str]) -> dict[str, float]:
    """1.0 or 0.0 for each part of the state, and for all of it, by the last JSON object said."""
    said = _last_object(results[0])
    right = {name: float(said.get(name) == doc["answer"][name]) for name in ASKED}
    return {**right, "exact": min(right.values())}


def _last_object(text: str) -> Json:
    for found in reversed(_OBJECT.findall(text)):
        try:
            parsed = json.loads(found)
        except json.JSONDecodeError:
            continue
        if isinstance(parsed, dict):
            return parsed
    return {}
