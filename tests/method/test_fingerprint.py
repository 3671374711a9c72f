"""A fingerprint tells models apart and says how they differ."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import Fingerprint

MakeFingerprint = Callable[..., Fingerprint]


def test_a_model_fits_itself(make_fingerprint: MakeFingerprint) -> None:
    assert make_fingerprint().mismatches(make_fingerprint()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architecture": "OtherForCausalLM"},
            "architecture: the file has 'TinyForCausalLM', the running model has "
            "'OtherForCausalLM'",
        ),
        ({"num_heads": 6}, "num_heads: the file has 4, the running model has 6"),
        ({"num_kv_heads": 4}, "num_kv_heads: the file has 2, the running model has 4"),
        ({"head_dim": 16}, "head_dim: the file has 8, the running model has 16"),
        (
            {"rotary_dims": (8, 0, 8)},
            "rotary_dims: the file has [8, 8, 8], the running model has [8, 0, 8]",
        ),
        ({"interleaved": True}, "interleaved: the file has False, the running model has True"),
        (
            {"inv_freq_hash": "others"},
            "inv_freq_hash: the file has 'frequencies', the running model has 'others'",
        ),
        (
            {"weights_hash": "others"},
            "weights_hash: the file has 'weights', the running model has 'others'",
        ),
        (
            {"layer_indices": (0, 2, 3)},
            "layers: the file has 3, the running model has 3; missing from the file: [3]; "
            "not in the running model: [1]",
        ),
    ],
)
def test_every_field_that_differs_is_named_with_both_sides(
    make_fingerprint: MakeFingerprint, change: dict[str, object], sentence: str
) -> None:
    file = make_fingerprint()
    running = replace(file, **change)  # type: ignore[arg-type]
    assert file.mismatches(running) == [sentence]


def test_all_differences_are_reported_at_once(make_fingerprint: MakeFingerprint) -> None:
    running = make_fingerprint(tuple(range(30)), 8, 4, 16, interleaved=True)
    sentences = make_fingerprint().mismatches(running)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rotary_dims",
        "interleaved",
    ]
    assert "missing from the file: [3, 4, 5, 6, 7, 8, 9, 10, ... 27 in all]" in sentences[0]


def test_what_either_side_does_not_know_is_not_compared(make_fingerprint: MakeFingerprint) -> None:
    known = make_fingerprint()
    imported = replace(
        known, architecture=None, num_kv_heads=None, inv_freq_hash=None, weights_hash=None
    )
    assert imported.mismatches(known) == []
    assert known.mismatches(imported) == []
    assert len(imported.mismatches(replace(known, num_heads=2))) == 1


def test_a_hybrid_model_lists_its_full_attention_layers_only(
    make_fingerprint: MakeFingerprint,
) -> None:
    hybrid = make_fingerprint(layer_indices=(3, 7, 11))
    assert hybrid.mismatches(make_fingerprint(layer_indices=(3, 7, 11))) == []
    assert "missing from the file: [0, 1, 2]" in hybrid.mismatches(make_fingerprint())[0]


def test_json_and_back_is_the_same(make_fingerprint: MakeFingerprint) -> None:
    for fingerprint in (
        make_fingerprint(),
        make_fingerprint((3, 7), 6, None, 10, (4, 0), interleaved=True),
        replace(make_fingerprint(), architecture=None, inv_freq_hash=None, weights_hash=None),
    ):
        assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "members list"),
        ('{"architecture": "x"}', r"members \['architecture'\]; it must have"),
    ],
)
def test_text_that_is_no_fingerprint_is_refused(text: str, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        Fingerprint.from_json(text)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_heads", "4", "num_heads is '4'; it must be an integer"),
        ("num_heads", True, "num_heads is True; it must be an integer"),
        ("num_kv_heads", 1.5, "num_kv_heads is 1.5; it must be an integer"),
        ("interleaved", 0, "interleaved is 0; it must be true or false"),
        ("layer_indices", [0, "1", 2], "must be a list of integers"),
        ("architecture", 3, "must be a string or null"),
    ],
)
def test_members_of_another_type_are_refused(
    make_fingerprint: MakeFingerprint, name: str, value: object, message: str
) -> None:
    members = json.loads(make_fingerprint().to_json()) | {name: value}
    with pytest.raises(StatisticsError, match=message):
        Fingerprint.from_json(json.dumps(members))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_indices": ()}, "ascending, each once, at least one"),
        ({"layer_indices": (2, 1, 0)}, "ascending, each once, at least one"),
        ({"layer_indices": (0, 0, 1)}, "ascending, each once, at least one"),
        ({"layer_indices": (-1, 0, 1)}, "ascending, each once, at least one"),
        ({"rotary_dims": (8,)}, "1 rotary dims for 3 layers"),
        ({"rotary_dims": (8, 4, 8)}, "layers must agree"),
        ({"rotary_dims": (10, 10, 10)}, "at most head_dim"),
        ({"rotary_dims": (7, 7, 7)}, "rotary dims even"),
        ({"num_heads": 0}, "counts must be positive"),
        ({"num_kv_heads": 3}, "cannot be grouped over 3 KV heads"),
        ({"num_kv_heads": 0}, "cannot be grouped over 0 KV heads"),
    ],
)
def test_counts_that_describe_no_model_are_refused(
    make_fingerprint: MakeFingerprint, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(StatisticsError, match=message):
        replace(make_fingerprint(), **changes)  # type: ignore[arg-type]
