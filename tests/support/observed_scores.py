"""Scores by observed queries in float64, token by token: the formulas as they are published."""

import math

import torch
from dense_reference import DenseRun
from torch import Tensor

from triattention_vllm.method.policy import Round


def softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def attention(queries: Tensor, keys: Tensor, scale: float) -> list[list[list[float]]]:
    """Logits [n][G][T] of one KV head: queries [n, G, D], keys [T, D]."""
    logits = torch.einsum("ngd,td->ngt", queries.double(), keys.double()) * scale
    return logits.tolist()


def snapkv(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    rows = [
        softmax([max(of_heads) for of_heads in zip(*query, strict=True)])
        for query in attention(queries, keys, scale)
    ]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [max(means[max(0, t - 3) : t + 4]) for t in range(len(means))]


def rkv(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    drawn = snapkv(queries, keys, scale)
    keys = keys.double()
    lengths = keys.norm(dim=-1)
    cosines = (keys @ keys.T / lengths[:, None] / lengths).tolist()
    for u, row in enumerate(cosines):
        row[u] = 0.0
        alike = [t for t, cosine in enumerate(row) if cosine > 0.5]
        if alike:
            row[alike[-1]] = 0.0
    means = [sum(column) / len(cosines) for column in zip(*cosines, strict=True)]
    return [0.1 * a - 0.9 * r for a, r in zip(drawn, softmax(means), strict=True)]


def h2o(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    rows = [softmax(head) for query in attention(queries, keys, scale) for head in query]
    return [sum(column) for column in zip(*rows, strict=True)]


def tova(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    heads = [softmax(head) for head in attention(queries, keys, scale)[-1]]
    return [sum(column) / len(heads) for column in zip(*heads, strict=True)]


FORMULAS = {"snapkv": snapkv, "rkv": rkv, "h2o": h2o, "tova": tova}
NUM_QUERIES = {"snapkv": 8, "rkv": 8, "h2o": 32, "tova": 1}


def observed_scores(method: str, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Float64 [H_kv, T] of queries [n, H, D] and keys [H_kv, T, D]; h2o's without earlier ones."""
    grouped = queries.unflatten(1, (keys.shape[0], -1))
    formula = FORMULAS[method]
    scores = [formula(grouped[:, head], keys[head], scale) for head in range(keys.shape[0])]
    return torch.tensor(scores, dtype=torch.float64)


class ObservedScores:
    """A method's scores in a replay, from the reference's own queries and keys.

    first_seen: position of the first query that the engine computed.
    """

    def __init__(self, method: str, first_seen: int) -> None:
        self.method = method
        self.first_seen = first_seen
        self._drawn: Tensor | None = None  # h2o: [L, H_kv, n], by position

    def __call__(self, run: DenseRun, candidates: Tensor, due: Round) -> Tensor:
        """Float64 [L, H_kv, T] of the candidates at positions [L, H_kv, T]."""
        first = max(self.first_seen, due.nominal_boundary - NUM_QUERIES[self.method])
        last = min(first + NUM_QUERIES[self.method], run.num_tokens)
        assert first < last
        rows = run.compressed_rows
        index = candidates.unsqueeze(-1).expand(-1, -1, -1, run.model.head_dim)
        keys = run.keys[rows].gather(2, index)
        queries = run.queries[rows][:, :, first:last].transpose(1, 2)
        layers = zip(queries, keys, strict=True)
        scores = torch.stack(
            [observed_scores(self.method, *layer, run.model.scale) for layer in layers]
        )
        if self.method != "h2o":
            return scores
        drawn = torch.zeros(*scores.shape[:2], run.num_tokens, dtype=torch.float64)
        if self._drawn is not None:
            drawn[..., : self._drawn.shape[-1]] = self._drawn
        scores = drawn.gather(2, candidates) + scores
        self._drawn = drawn.scatter(2, candidates, scores)
        return scores
