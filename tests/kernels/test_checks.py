"""Arguments that do not fit are refused before anything is read or written."""

from dataclasses import replace

import pytest
import torch
from score_oracle import random_weights
from triattention_kernels import ArgumentError, PagedKV, RoundBatch, compact, score, select

BATCH = RoundBatch(
    source_blocks=torch.tensor([[1, 2, 3], [4, 5, 0]]),
    destination_blocks=torch.tensor([[1, 2], [4, 0]]),
    num_source_blocks=(3, 2),
    num_destination_blocks=(2, 1),
    first_candidate=(0, 3),
)
BAD_BATCHES = {
    "source_blocks is int32": {"source_blocks": BATCH.source_blocks.int()},
    r"source_blocks has shape \[1, 3\]": {"source_blocks": BATCH.source_blocks[:1]},
    r"destination_blocks has shape \[2\]": {"destination_blocks": BATCH.destination_blocks[0]},
    r"num_source_blocks is \(4, 2\)": {"num_source_blocks": (4, 2)},
    r"num_destination_blocks is \(2, 0\)": {"num_destination_blocks": (2, 0)},
    r"num_destination_blocks is \(2,\)": {"num_destination_blocks": (2,)},
    "request 1 keeps 2 blocks of 1": {
        "num_source_blocks": (3, 1),
        "num_destination_blocks": (2, 2),
    },
    r"first_candidate is \(0, 4\).*less than the tokens that the request keeps \[8, 4\]": {
        "first_candidate": (0, 4)
    },
    r"first_candidate is \(-1, 0\)": {"first_candidate": (-1, 0)},
    r"first_candidate is \(0,\)": {"first_candidate": (0,)},
}


def make_kv(dtype: torch.dtype = torch.float32) -> PagedKV:
    return PagedKV.from_blocks(torch.zeros(2, 6, 2, 4, 16, dtype=dtype))


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_an_impossible_batch_is_refused_by_every_operation(message):
    batch = replace(BATCH, **BAD_BATCHES[message])
    with pytest.raises(ArgumentError, match=message):
        score(make_kv(), batch, *random_weights((2, 2, 4, 8), 8), False, 8)
    with pytest.raises(ArgumentError, match=message):
        select(torch.zeros(2, 2, 4, 12), batch, 4, 2, "per_head")
    with pytest.raises(ArgumentError, match=message):
        compact(make_kv(), batch, torch.zeros(2, 2, 2, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("message", "shapes", "rotary_dim"),
    [
        ("centres has shape", ((1, 4, 8), (2, 4, 4), (2, 2, 4)), 8),
        ("centres has shape", ((2, 2, 4, 8), (2, 4, 4), (2, 2, 4)), 8),
        (
            "3 query heads cannot be grouped over 2 KV heads",
            ((2, 3, 8), (2, 3, 4), (2, 2, 4)),
            8,
        ),
        (
            r"norm_weights has shape \[2, 4, 3\]; \[2, 4, 4\]",
            ((2, 4, 8), (2, 4, 3), (2, 2, 4)),
            8,
        ),
        (r"turns has shape \[1, 2, 4\]; \[2, 2, 4\]", ((2, 4, 8), (2, 4, 4), (1, 2, 4)), 8),
        (r"turns has shape \[2, 2, 3\]; \[2, 2, 4\]", ((2, 4, 8), (2, 4, 4), (2, 2, 3)), 8),
        ("rotary_dim is 7", ((2, 4, 8), (2, 4, 3), (2, 2, 3)), 7),
        ("rotary_dim is 10", ((2, 4, 8), (2, 4, 5), (2, 2, 5)), 10),
    ],
)
def test_weights_that_do_not_fit_the_cache_are_refused(message, shapes, rotary_dim):
    centres, norms = (torch.zeros(shape) for shape in shapes[:2])
    turns = torch.zeros(shapes[2], dtype=torch.complex64)
    with pytest.raises(ArgumentError, match=message):
        score(make_kv(), BATCH, centres, norms, turns, False, rotary_dim)


def test_weights_of_another_dtype_are_refused():
    centres, norms, turns = random_weights((2, 2, 4, 8), 8)
    with pytest.raises(ArgumentError, match="centres is bfloat16"):
        score(make_kv(), BATCH, centres.bfloat16(), norms, turns, False, 8)
    with pytest.raises(ArgumentError, match="turns is complex64; allowed are complex128"):
        score(make_kv(), BATCH, centres.double(), norms, turns, False, 8)


def test_scores_or_tokens_of_a_wrong_shape_are_refused():
    with pytest.raises(ArgumentError, match=r"scores has shape \[2, 2, 4, 8\]"):
        select(torch.zeros(2, 2, 4, 8), BATCH, 4, 2, "per_head")
    with pytest.raises(ArgumentError, match="scores is float16"):
        select(torch.zeros(2, 2, 4, 12).half(), BATCH, 4, 2, "per_head")
    with pytest.raises(ArgumentError, match="4 query heads"):
        select(torch.zeros(2, 2, 4, 12), BATCH, 4, 3, "per_head")
    with pytest.raises(ArgumentError, match=r"kept has shape \[2, 2, 2, 4\]"):
        compact(make_kv(), BATCH, torch.zeros(2, 2, 2, 4, dtype=torch.int64))


def test_the_errors_are_value_errors():
    assert issubclass(ArgumentError, ValueError)
