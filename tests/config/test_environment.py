"""Variables are parsed by type, named in errors, and never silently mean the default."""

import logging

import pytest

from triattention_vllm.config import Settings
from triattention_vllm.errors import SettingsError
from triattention_vllm.log import log_once
from triattention_vllm.sources import resolve_settings

ON = {"TRIATTENTION_ENABLE": "1"}


@pytest.fixture(autouse=True)
def _forget_logged_lines() -> None:
    log_once.cache_clear()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that the package logs; vLLM stops its loggers from propagating to pytest's."""
    collected: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: collected.append(  # type: ignore[method-assign]
        f"{record.levelname} {record.getMessage()}"
    )
    logger = logging.getLogger("vllm.triattention")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    return collected


def from_environment(**environ: str) -> Settings | None:
    return resolve_settings(None, environ)


@pytest.mark.parametrize("switch", ["1", "true", "True"])
def test_the_switch_turns_compression_on(switch: str) -> None:
    assert from_environment(TRIATTENTION_ENABLE=switch) == Settings()


@pytest.mark.parametrize("switch", ["0", "false", "FALSE"])
def test_the_switch_turns_compression_off(switch: str) -> None:
    assert from_environment(TRIATTENTION_ENABLE=switch, TRIATTENTION_BUDGET="512") is None


@pytest.mark.parametrize("switch", ["", "yes", "on", "2", "enable"])
def test_a_mistyped_switch_is_an_error(switch: str) -> None:
    with pytest.raises(SettingsError, match="TRIATTENTION_ENABLE=.* allowed is 1, 0, true or f"):
        from_environment(TRIATTENTION_ENABLE=switch)


def test_every_setting_has_a_variable() -> None:
    settings = from_environment(
        TRIATTENTION_ENABLE="1",
        TRIATTENTION_METHOD="triattention",
        TRIATTENTION_BUDGET="1024",
        TRIATTENTION_INTERVAL="64",
        TRIATTENTION_WINDOW="32",
        TRIATTENTION_PROTECT="sinks",
        TRIATTENTION_SINK_TOKENS="4",
        TRIATTENTION_SELECTION="union",
        TRIATTENTION_WHEN="always",
        TRIATTENTION_STATISTICS="/models/7",
    )
    assert settings == Settings(
        budget=1024,
        interval=64,
        window=32,
        protect="sinks",
        sink_tokens=4,
        selection="union",
        statistics="/models/7",
    )
    text = from_environment(TRIATTENTION_CALIBRATION_TEXT="7", **ON)
    assert text is not None
    assert text.calibration_text == "7"


def test_a_number_of_protected_tokens_is_a_number() -> None:
    settings = from_environment(TRIATTENTION_PROTECT="64", **ON)
    assert settings is not None
    assert settings.protect == 64


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "TRIATTENTION_BUDGET",
            "2k",
            r"_BUDGET is '2k' \(str\), allowed is a whole number",
        ),
        (
            "TRIATTENTION_BUDGET",
            "",
            r"_BUDGET is '' \(str\), allowed is a whole number",
        ),
        ("TRIATTENTION_BUDGET", "0", "TRIATTENTION_BUDGET is 0, allowed is a whole number"),
        ("TRIATTENTION_PROTECT", "promt", "TRIATTENTION_PROTECT is 'promt', allowed is \"prompt"),
        ("TRIATTENTION_PROTECT", "-1", "TRIATTENTION_PROTECT is -1, allowed is"),
        ("TRIATTENTION_WHEN", "never", "TRIATTENTION_WHEN is 'never', allowed is \"always\" or"),
        ("TRIATTENTION_PRESSURE_START", "101", "PRESSURE_START is 101, allowed is .* at most 100"),
        ("TRIATTENTION_STATISTICS", "", "TRIATTENTION_STATISTICS is '', allowed is a path"),
        ("TRIATTENTION_METHOD", "kivi", "TRIATTENTION_METHOD is 'kivi', allowed is \"triattention"),
        ("TRIATTENTION_BUGDET", "1", "Unknown variable TRIATTENTION_BUGDET; known are TRIATTENT"),
    ],
)
def test_a_mistyped_variable_is_an_error_that_names_it(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_environment(**ON, **{name: value})


def test_the_error_for_an_unknown_variable_lists_all_known_ones() -> None:
    with pytest.raises(SettingsError) as refused:
        from_environment(TRIATTENTION_KV_BUDGET="1", **ON)
    for name in ("ENABLE", "BUDGET", "SINK_TOKENS", "CACHE", "ALLOW_UNTESTED_VLLM"):
        assert f"TRIATTENTION_{name}" in str(refused.value)


def test_the_method_variable_is_a_switch_too() -> None:
    assert from_environment(TRIATTENTION_METHOD="triattention") == Settings()
    assert from_environment(TRIATTENTION_METHOD="off") is None
    assert from_environment(TRIATTENTION_METHOD="triattention", TRIATTENTION_ENABLE="0") is None
    with pytest.raises(SettingsError, match="contradict each other"):
        from_environment(TRIATTENTION_METHOD="off", TRIATTENTION_ENABLE="1")


def test_variables_without_a_switch_change_nothing_and_are_named_once(lines: list[str]) -> None:
    environ = {"TRIATTENTION_BUDGET": "much", "TRIATTENTION_ENABEL": "1", "PATH": "/bin"}
    assert resolve_settings(None, environ) is None
    assert resolve_settings(None, environ) is None
    (line,) = lines
    assert line.startswith("WARNING KV compression is off, so TRIATTENTION_BUDGET, TRIATTENTION_E")
    assert "PATH" not in line


def test_the_cache_folder_alone_is_not_worth_a_word(lines: list[str]) -> None:
    assert from_environment(TRIATTENTION_CACHE="x", TRIATTENTION_ALLOW_UNTESTED_VLLM="1") is None
    assert lines == []


def test_variables_of_the_authors_plugin_are_understood_and_answered(lines: list[str]) -> None:
    environ = {
        "ENABLE_TRIATTENTION": "true",
        "TRIATTN_RUNTIME_KV_BUDGET": "12000",
        "TRIATTN_RUNTIME_DIVIDE_LENGTH": "64",
        "TRIATTN_RUNTIME_WINDOW_SIZE": "256",
        "TRIATTN_RUNTIME_PRUNING_MODE": "per_layer_per_head",
        "TRIATTN_RUNTIME_PROTECT_PREFILL": "false",
        "TRIATTN_RUNTIME_SPARSE_STATS_PATH": "stats/qwen3.pt",
        "TRIATTN_RUNTIME_LOG_DECISIONS": "1",
    }
    assert resolve_settings(None, environ) == Settings(
        budget=12000,
        interval=64,
        window=256,
        selection="per_layer_per_head",
        protect="sinks",
        statistics="stats/qwen3.pt",
    )
    (line,) = lines
    assert line.startswith("INFO Variables of the authors' plugin: ENABLE_TRIATTENTION -> method")
    for part in (
        "TRIATTN_RUNTIME_KV_BUDGET -> budget=12000",
        "TRIATTN_RUNTIME_DIVIDE_LENGTH -> interval=64",
        "TRIATTN_RUNTIME_WINDOW_SIZE -> window=256",
        "TRIATTN_RUNTIME_PRUNING_MODE -> selection='per_layer_per_head'",
        "TRIATTN_RUNTIME_PROTECT_PREFILL -> protect='sinks'",
        "TRIATTN_RUNTIME_SPARSE_STATS_PATH -> statistics='stats/qwen3.pt'",
        "TRIATTN_RUNTIME_LOG_DECISIONS has no effect here",
    ):
        assert part in line


def test_a_deployment_that_only_sets_the_authors_settings_is_on() -> None:
    """Their plugin is on unless it is switched off."""
    assert from_environment(TRIATTN_RUNTIME_KV_BUDGET="4096") == Settings(budget=4096)
    assert from_environment(TRIATTN_RUNTIME_KV_BUDGET="4096", ENABLE_TRIATTENTION="no") is None
    assert from_environment(TRIATTN_RUNTIME_KV_BUDGET="4096", TRIATTENTION_ENABLE="0") is None
    assert from_environment(ENABLE_TRIATTENTION="on") == Settings()


def test_our_variables_win_over_the_authors(lines: list[str]) -> None:
    settings = from_environment(TRIATTN_RUNTIME_KV_BUDGET="4096", TRIATTENTION_BUDGET="1024")
    assert settings == Settings(budget=1024)
    assert "TRIATTN_RUNTIME_KV_BUDGET -> budget=4096, overruled by 1024" in lines[0]
    assert from_environment(ENABLE_TRIATTENTION="0", TRIATTENTION_ENABLE="1") == Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TRIATTN_RUNTIME_KV_BUDGET", "lots", "TRIATTN_RUNTIME_KV_BUDGET='lots' is not a whole"),
        ("TRIATTN_RUNTIME_PRUNING_MODE", "per_layer", "PRUNING_MODE='per_layer' is not known"),
        ("TRIATTN_RUNTIME_PROTECT_PREFILL", "2", "PROTECT_PREFILL='2' is not a switch"),
        ("TRIATTN_RUNTIME_SPARSE_STATS_PATH", " ", "SPARSE_STATS_PATH is empty"),
        ("ENABLE_TRIATTENTION", "perhaps", "ENABLE_TRIATTENTION='perhaps' is not a switch"),
    ],
)
def test_a_mistyped_variable_of_the_authors_is_an_error(
    name: str, value: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        from_environment(**{name: value})


@pytest.mark.parametrize(("prefill", "protect"), [("1", "prompt"), ("true", "prompt")])
def test_protected_prefill_becomes_the_pinned_prompt(prefill: str, protect: str) -> None:
    settings = from_environment(TRIATTN_RUNTIME_PROTECT_PREFILL=prefill)
    assert settings is not None
    assert settings.protect == protect
