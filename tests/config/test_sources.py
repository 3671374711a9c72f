"""additional_config over environment over default, key by key; flags over it: test_flags.py."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triattention_vllm.config import OFF, Settings, environment_name
from triattention_vllm.errors import SettingsError
from triattention_vllm.sources import resolve_settings

VALUES: dict[str, st.SearchStrategy[str | int]] = {
    "budget": st.integers(2048, 9999),
    "interval": st.integers(1, 200),
    "window": st.integers(0, 100),
    "protect": st.sampled_from(["prompt", "all_prompt", "sinks"]) | st.integers(0, 100),
    "sink_tokens": st.integers(0, 64),
    "selection": st.sampled_from(["per_head", "per_layer_per_head", "union"]),
    "method": st.sampled_from(["triattention", OFF]),
}
SOURCE = st.fixed_dictionaries({}, optional=VALUES)


def variables(source: Mapping[str, str | int]) -> dict[str, str]:
    return {environment_name(key): str(value) for key, value in source.items()}


@given(additional_config=SOURCE, environment=SOURCE)
def test_the_highest_source_that_names_a_key_decides_it(
    additional_config: dict[str, str | int],
    environment: dict[str, str | int],
) -> None:
    expected = {**environment, **additional_config}
    arguments = (additional_config, variables(environment))

    if "method" not in expected and additional_config:
        with pytest.raises(SettingsError, match="is not turned on; add --kv-compression triatt"):
            resolve_settings(*arguments)
        return
    resolved = resolve_settings(*arguments)
    if expected.get("method", OFF) == OFF:
        assert resolved is None
        return
    assert resolved is not None
    defaults = Settings().to_mapping()
    assert resolved.to_mapping() == {**defaults, **expected}


@given(additional_config=SOURCE, environment=SOURCE)
def test_no_source_is_changed(
    additional_config: dict[str, str | int],
    environment: dict[str, str | int],
) -> None:
    sources = (additional_config, variables(environment))
    before = tuple(dict(source) for source in sources)
    try:
        resolve_settings(*sources)
    except SettingsError:
        assert "method" not in {**additional_config, **environment}
    assert sources == before


def test_nothing_anywhere_is_off() -> None:
    assert resolve_settings(None, {}) is None
    assert resolve_settings({}, {"HOME": "/", "VLLM_PLUGINS": "triattention"}) is None


def test_off_in_additional_config_beats_the_environments_switch() -> None:
    given = {"method": OFF, "budget": 4096}
    assert resolve_settings(given, {"TRIATTENTION_ENABLE": "1"}) is None


def test_off_does_not_read_variables_that_nothing_would_use() -> None:
    assert resolve_settings({"method": OFF}, {"TRIATTENTION_BUDGET": "much"}) is None


def test_the_environments_switch_is_overruled_by_a_method_in_additional_config() -> None:
    environ = {"TRIATTENTION_ENABLE": "0", "TRIATTENTION_WINDOW": "64"}
    assert resolve_settings({"method": "triattention"}, environ) == Settings(window=64)


def test_a_contradiction_across_sources_is_refused() -> None:
    given = {"method": "triattention", "budget": 512}
    with pytest.raises(SettingsError, match="budget 512 is below window 500 [+] interval 128"):
        resolve_settings(given, {"TRIATTENTION_WINDOW": "500"})


def test_settings_without_a_switch_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"has settings \(budget\) but is not turned on"):
        resolve_settings({"budget": 512}, {})
