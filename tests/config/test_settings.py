"""What a Settings object refuses, keeps and describes."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triattention_vllm.config import (
    Settings,
    descriptions,
    environment_name,
)
from triattention_vllm.errors import SettingsError
from triattention_vllm.settings_text import settings_help, settings_table

REFUSED = [
    ({"budgets": 2048}, "Unknown setting budgets; known are method, budget, interval, window"),
    ({"budget": "2048"}, r"budget is '2048' \(str\), allowed is a whole number of tokens"),
    ({"budget": 2048.0}, r"budget is 2048.0 \(float\), allowed is a whole number of tokens"),
    ({"budget": True}, r"budget is True \(bool\), allowed is a whole number of tokens"),
    ({"protect": False}, r"protect is False \(bool\), allowed is \"prompt\" or \"all_prompt\""),
    (
        {"window": None},
        r'window is None \(NoneType\), allowed is "quarter" or a whole number of tokens',
    ),
    ({"budget": 0}, "budget is 0, allowed is a whole number of tokens, at least 1"),
    ({"interval": 0}, "interval is 0, allowed is a whole number of tokens, at least 1"),
    ({"window": -1}, 'window is -1, allowed is "quarter" or a whole number of tokens, at least 0'),
    ({"sink_tokens": -1}, "sink_tokens is -1, allowed is a whole number of tokens, at least 0"),
    ({"protect": "everything"}, "protect is 'everything', allowed is \"prompt\" or"),
    ({"protect": -3}, "protect is -3, allowed is .* a whole number of tokens, at least 0"),
    ({"selection": "per_token"}, "selection is 'per_token', allowed is \"per_head\" or"),
    ({"method": "kivi"}, 'method is \'kivi\', allowed is "triattention" or "streamingllm"'),
    (
        {"method": "streamingllm", "compaction": "fill_holes"},
        'does not keep the order of tokens, which method "streamingllm" needs',
    ),
    (
        {"method": "h2o", "compaction": "fill_holes"},
        'does not keep the order of tokens, which method "h2o" needs',
    ),
    ({"method": "random", "statistics": "a"}, 'statistics is set, but method "random" uses no'),
    (
        {"method": "knorm", "calibration_text": "a"},
        'calibration_text is set, but method "knorm" uses no statistics; leave it out',
    ),
    ({"when": "never"}, 'when is \'never\', allowed is "always" or "pressure"'),
    ({"pressure_start": 0}, "pressure_start is 0, .* of percent, at least 1 and at most 100"),
    ({"pressure_stop": 101}, "pressure_stop is 101, .* of percent, at least 0 and at most 100"),
    (
        {"pressure_start": 70},
        "pressure_stop 80 is above pressure_start 70; set it to at most 70 percent",
    ),
    ({"max_request_budget": 2047}, "max_request_budget 2047 is below budget 2048, which every"),
    ({"max_request_budget": "all"}, r"max_request_budget is 'all' \(str\), allowed is a whole nu"),
    ({"statistics": 7}, r"statistics is 7 \(int\), allowed is a path"),
    ({"statistics": ""}, "statistics is '', allowed is a path"),
    ({"budget": 169}, "budget 169 is below window 42 .* set it to at least 170 tokens"),
    ({"budget": 255, "window": 128}, "budget 255 is below .* set it to at least 257 tokens"),
    ({"window": "half"}, "window is 'half', allowed is \"quarter\" or a whole number of tokens"),
    ({"score_normalise": "off"}, 'score_normalise is \'off\', allowed is "heads" or "none"'),
    ({"score_offsets": "1, 2"}, r"'1, 2', allowed is .*\"short\" or numbers with commas between"),
    ({"score_offsets": [1, 2]}, r"score_offsets is \[1, 2\] \(list\), allowed is \"geometric\""),
    (
        {"score_redundancy": 50, "score_normalise": "none"},
        'score_redundancy 50 is taken off normalised scores, .* is "none"; leave one of them out',
    ),
    (
        {"score_redundancy": 50, "compaction": "fill_holes"},
        "does not keep the order of tokens, which score_redundancy 50 needs; leave compaction",
    ),
    ({"score_redundancy": 1001}, "score_redundancy is 1001, .* of percent, .* at most 1000"),
    (
        {"preset": "paper", "score_redundancy": 50},
        'preset "paper" has score_redundancy 0, and score_redundancy is 50; leave one of them out',
    ),
    ({"score_protect_values": 101}, "of percent, at least 0 and at most 100"),
    (
        {"method": "knorm", "score_offsets": "short"},
        'score_offsets is set, but method "knorm" uses no statistics; leave it out',
    ),
    ({"preset": "published"}, "preset is 'published', allowed is \"paper\""),
    ({"preset": ["paper"]}, r"preset is \['paper'\] \(list\), allowed is \"paper\""),
    (
        {"preset": "paper", "window": 32},
        'preset "paper" has window 128, and window is 32; leave one of them out',
    ),
    (
        {"preset": "paper", "method": "random"},
        "preset \"paper\" has method 'triattention', and method is 'random'; leave one of them",
    ),
    (
        {"statistics": "a", "calibration_text": "b"},
        "statistics and calibration_text are both set, .* leave one of them out",
    ),
]


@pytest.mark.parametrize(("mapping", "message"), REFUSED)
def test_a_wrong_setting_is_refused_with_what_is_allowed(
    mapping: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        Settings.from_mapping(mapping)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_nothing_given_means_a_longer_window_and_redundancy_beside_the_published_setting() -> None:
    settings = Settings.from_mapping({})
    assert settings == Settings()
    assert (settings.budget, settings.interval, settings.window) == (2048, 128, "quarter")
    assert (settings.min_window, settings.redundancy) == (512, 50)
    assert (settings.protect, settings.sink_tokens) == ("prompt", 16)
    assert (settings.selection, settings.when) == ("per_head", "always")
    assert settings.statistics is None


def test_the_preset_of_the_paper_is_its_setting_by_name() -> None:
    """The budget is free: the paper's are from 512 to 4096 tokens."""
    settings = Settings.from_mapping({"preset": "paper", "budget": 1024, "interval": 128})
    assert (settings.method, settings.budget, settings.interval) == ("triattention", 1024, 128)
    assert (settings.window, settings.protect, settings.selection) == (128, "prompt", "per_head")
    assert (settings.score_normalise, settings.score_layers) == ("heads", "mean")
    assert (settings.score_norm_term, settings.score_offsets) == ("full", "geometric")
    assert (settings.score_redundancy, settings.score_protect_values) == (0, 0)
    assert Settings.from_mapping(settings.to_mapping()) == settings


@pytest.mark.parametrize(
    ("mapping", "percent"),
    [
        ({}, 50),
        ({"score_redundancy": None}, 50),
        ({"score_redundancy": 0}, 0),
        ({"score_redundancy": 7}, 7),
        ({"preset": "paper"}, 0),
        ({"compaction": "fill_holes"}, 0),
        ({"score_normalise": "none"}, 0),
        ({"score_layers": "max", "selection": "union"}, 50),
        *(({"method": method}, 0) for method in ("streamingllm", "knorm", "rkv", "random")),
        ({"method": "knorm", "score_redundancy": 20}, 20),
    ],
)
def test_redundancy_is_taken_off_where_nothing_speaks_against_it(
    mapping: dict[str, object], percent: int
) -> None:
    settings = Settings.from_mapping(mapping)
    assert settings.redundancy == percent
    assert Settings.from_mapping(settings.to_mapping()).redundancy == percent


@pytest.mark.parametrize("offsets", ["geometric", "short", "1", "1,2,300"])
def test_offsets_may_be_a_name_or_numbers(offsets: str) -> None:
    assert Settings.from_mapping({"score_offsets": offsets}).score_offsets == offsets


@given(
    budget=st.integers(2000, 10**6),
    interval=st.integers(1, 1000),
    window=st.integers(0, 100),
    protect=st.sampled_from(["prompt", "all_prompt", "sinks"]) | st.integers(0, 100),
    selection=st.sampled_from(["per_head", "per_layer_per_head", "union"]),
    statistics=st.none() | st.text(min_size=1),
)
def test_settings_survive_the_way_through_json(**given_settings: object) -> None:
    settings = Settings.from_mapping(given_settings)
    assert Settings.from_mapping(json.loads(json.dumps(settings.to_mapping()))) == settings


def test_the_policy_has_the_lengths_of_the_settings() -> None:
    policy = Settings(budget=512, interval=64, window=32, protect=48, sink_tokens=8).policy(16)
    assert (policy.budget, policy.interval, policy.window) == (512, 64, 32)
    assert (policy.protect, policy.sink_tokens, policy.block_size) == (48, 8, 16)


def test_a_budget_above_max_model_len_is_refused() -> None:
    settings = Settings(budget=4096)
    settings.check_engine(max_model_len=4096, block_size=16)
    with pytest.raises(SettingsError, match="budget 4096 is above max_model_len 4095"):
        settings.check_engine(max_model_len=4095, block_size=16)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"budget": 100, "interval": 20},
            "budget 100 leaves no candidate beside window 25 and up to 50 protected tokens",
        ),
        (
            {"protect": 1920, "window": 128},
            "leaves no candidate .* set budget to 2064 or more, or protect fewer",
        ),
        ({"protect": 1536}, "beside window 512 .* set budget to 2069 or more, or protect fewer"),
        ({"protect": "sinks", "sink_tokens": 4000}, "budget 2048 leaves no candidate .* 4000 pro"),
    ],
)
def test_protected_tokens_that_leave_no_candidate_are_refused(
    mapping: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_mapping(mapping).check_engine(max_model_len=32768, block_size=16)


@given(
    budget=st.integers(1, 3000),
    window=st.just("quarter") | st.integers(0, 300),
    protect=st.sampled_from(["prompt", "all_prompt", "sinks"]) | st.integers(0, 300),
    block_size=st.sampled_from([16, 32, 128]),
)
def test_settings_pass_exactly_when_every_round_keeps_a_candidate(
    budget: int, window: str | int, protect: str | int, block_size: int
) -> None:
    mapping = {"budget": budget, "interval": 64, "window": window, "protect": protect}
    try:
        settings = Settings.from_mapping(mapping)
        settings.check_engine(max_model_len=10**6, block_size=block_size)
    except SettingsError as error:
        message = str(error)
        if "leaves no candidate" in message:
            enough = int(message.split("set budget to ")[1].split(" ")[0])
            assert enough > budget
            for more in (enough, enough + 1, enough + block_size, 2 * enough):
                Settings.from_mapping({**mapping, "budget": more}).check_engine(10**6, block_size)
            with pytest.raises(SettingsError):  # and no more is asked for than is needed
                Settings.from_mapping({**mapping, "budget": enough - 1}).check_engine(
                    10**6, block_size
                )
        else:
            assert budget < (budget // 4 if isinstance(window, str) else window) + 64
        return
    assert settings.policy(block_size).min_survivors() > 0


def test_a_file_that_does_not_exist_is_refused_by_its_path(tmp_path: Path) -> None:
    for name in ("statistics", "calibration_text"):
        path = tmp_path / name
        settings = Settings.from_mapping({name: str(path)})
        with pytest.raises(SettingsError, match=f"{name} names {path}, which is not a file"):
            settings.check_files()
        path.write_text("here")
        settings.check_files()


def test_a_path_in_the_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(statistics="~/s.safetensors").statistics_path == tmp_path / "s.safetensors"
    assert Settings(calibration_text="~/t").calibration_text_path == tmp_path / "t"


def test_the_table_has_one_row_per_setting_with_default_and_variable() -> None:
    header, rule, *rows = settings_table().splitlines()
    assert header.count("|") == rule.count("|") == 6
    assert len(rows) == len(fields(Settings))
    for row, entry in zip(rows, fields(Settings), strict=True):
        assert row.startswith(f"| `{entry.name}` |")
        assert row.endswith(f"| `{environment_name(entry.name)}` |")
        assert row.count("|") == 6
    assert "| `budget` | 2048 | a whole number of tokens, at least 1 |" in rows[1]


def test_the_help_names_every_setting_but_the_switch() -> None:
    for name, description in descriptions().items():
        assert (f"- {name} (" in settings_help()) == (name != "method")
        assert name == "method" or description.help in settings_help()


def test_the_readme_has_the_table_as_it_is_generated() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert settings_table() in readme
