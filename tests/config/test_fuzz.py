"""Whatever stands in a configuration or the environment is understood, or refused by name."""

import json
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from triattention_vllm.config import Settings, descriptions, environment_name
from triattention_vllm.environment import (
    AUTHORS_ENABLE,
    AUTHORS_VARIABLES,
    ENABLE,
    authors_settings,
    environment_switch,
    own_settings,
)
from triattention_vllm.errors import SettingsError

CHOICES = sorted({choice for one in descriptions().values() for choice in one.choices})
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(CHOICES)
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(list(descriptions())) | st.text(max_size=10)

texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
variables = st.sampled_from(
    [
        *map(environment_name, descriptions()),
        *(ENABLE, AUTHORS_ENABLE, "TRIATTENTION_BUGDET", "TRIATTENTION_ALLOW_UNTESTED_VLLM"),
        *AUTHORS_VARIABLES,
    ]
)
values = texts | st.integers().map(str) | st.sampled_from([*CHOICES, "1", "0", "true", "off", ""])


def settings_or_sentence(read: Callable[[], Settings]) -> tuple[Settings | None, str]:
    try:
        return read(), ""
    except SettingsError as error:
        return None, str(error)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, json_values, max_size=6))
def test_any_json_gives_settings_or_a_sentence(mapping: dict[str, object]) -> None:
    chosen, refusal = settings_or_sentence(lambda: Settings.from_mapping(mapping))
    if chosen is None:
        assert refusal.endswith(".")
        return
    assert set(mapping) <= set(descriptions())
    again = Settings.from_mapping(json.loads(json.dumps(chosen.to_mapping())))
    assert again == chosen
    for name, value in mapping.items():
        kept = vars(chosen)[name]
        assert (type(kept), kept) == (type(value), value)
    assert chosen.budget >= chosen.min_window + chosen.interval


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(variables, values, max_size=6))
def test_any_environment_gives_settings_or_a_sentence(environ: dict[str, str]) -> None:
    chosen, refusal = settings_or_sentence(
        lambda: Settings.from_mapping({**authors_settings(environ), **own_settings(environ)})
    )
    if chosen is None:
        assert refusal.endswith(".")
        return
    assert "TRIATTENTION_BUGDET" not in environ
    if environment_name("budget") in environ:
        assert chosen.budget == int(environ[environment_name("budget")])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(variables, values, max_size=4))
def test_any_environment_turns_compression_on_or_off_or_says_why_not(
    environ: dict[str, str],
) -> None:
    methods = descriptions()["method"].choices
    refusal, switch = "", None
    try:
        switch = environment_switch(environ)
    except SettingsError as error:
        refusal = str(error)
    assert refusal.endswith(".") or switch in (None, "off", *methods)
    if switch is None and not refusal:
        assert not {ENABLE, AUTHORS_ENABLE, environment_name("method")} & environ.keys()
