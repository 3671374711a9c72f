"""What ``create_engine_config`` of real vLLM becomes with and without settings."""

import copy
import json
import logging
import pickle
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform

from triattention_vllm.config import Settings
from triattention_vllm.engine import differences, other_plugins, versions
from triattention_vllm.engine.cli import ASYNC_SCHEDULER, SCHEDULER
from triattention_vllm.engine.settings import settings_of
from triattention_vllm.errors import SeamError, SettingsError, UnsupportedError
from triattention_vllm.plugin import register

ON = {"method": "triattention", "budget": 1024}


def arguments(model: str, settings: object = None, **changes: Any) -> Any:
    """Engine arguments of the tiny model, with ``settings`` in ``additional_config``."""
    register()
    if settings is not None:
        changes["additional_config"] = {"kv_compression": settings}
    given = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 4096, **changes}
    return EngineArgs(model=model, **given)


def unwrapped_config(engine_args: Any) -> Any:
    """The configuration that vLLM alone builds."""
    return EngineArgs.create_engine_config.__wrapped__(engine_args)


@pytest.mark.parametrize("settings", [None, {"method": "off"}, {"method": "off", "budget": 1}])
def test_without_settings_the_configuration_is_vllms_own(model: str, settings: object) -> None:
    ours = arguments(model, settings).create_engine_config()
    alone = unwrapped_config(arguments(model, settings))
    assert ours.scheduler_config.scheduler_cls is None
    assert ours.scheduler_config.get_scheduler_cls() is alone.scheduler_config.get_scheduler_cls()
    assert ours.parallel_config.worker_cls == alone.parallel_config.worker_cls
    assert ours.additional_config == alone.additional_config
    assert ours.compute_hash() == alone.compute_hash()
    assert settings_of(ours) is None


def test_settings_choose_scheduler_and_worker_and_travel_in_the_configuration(model: str) -> None:
    config = arguments(model, ON).create_engine_config()
    alone = unwrapped_config(arguments(model))
    expected = ASYNC_SCHEDULER if config.scheduler_config.async_scheduling else SCHEDULER
    assert config.scheduler_config.scheduler_cls == expected
    worker = config.parallel_config.worker_cls
    assert worker == "triattention_vllm.engine.worker_cpu.CompressionCPUWorker"
    assert settings_of(config) == Settings(budget=1024)
    assert json.loads(json.dumps(config.additional_config)) == {
        "kv_compression": Settings(budget=1024).to_mapping()
    }
    assert config.compute_hash() != alone.compute_hash()


@pytest.mark.parametrize("is_async", [True, False])
def test_the_scheduler_follows_async_scheduling(
    model: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = unwrapped_config(arguments(model)).parallel_config.worker_cls

    def leave_async_scheduling_alone(platform: type, config: VllmConfig) -> None:
        config.parallel_config.worker_cls = worker

    update = classmethod(leave_async_scheduling_alone)
    monkeypatch.setattr(type(current_platform), "check_and_update_config", update)
    config = arguments(model, ON, async_scheduling=is_async).create_engine_config()
    assert config.scheduler_config.async_scheduling is is_async
    assert config.scheduler_config.scheduler_cls == (ASYNC_SCHEDULER if is_async else SCHEDULER)


def test_the_settings_survive_copies_and_the_way_to_another_process(model: str) -> None:
    config = arguments(model, ON).create_engine_config()
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert settings_of(same) == Settings(budget=1024)
        assert same.scheduler_config.scheduler_cls == config.scheduler_config.scheduler_cls
        assert same.parallel_config.worker_cls == config.parallel_config.worker_cls


def test_a_configuration_can_be_built_twice_from_the_same_arguments(model: str) -> None:
    engine_args = arguments(model, ON)
    first = engine_args.create_engine_config()
    second = engine_args.create_engine_config()
    assert engine_args.additional_config == {"kv_compression": ON}
    assert first.additional_config == second.additional_config
    assert first.parallel_config.worker_cls == second.parallel_config.worker_cls


def test_the_environment_turns_an_engine_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_ENABLE", "1")
    monkeypatch.setenv("TRIATTENTION_WINDOW", "64")
    assert settings_of(arguments(model).create_engine_config()) == Settings(window=64)
    below = arguments(model, {"window": 32}).create_engine_config()
    assert settings_of(below) == Settings(window=32)


def test_asynchronous_arguments_are_covered_too(model: str) -> None:
    register()
    config = AsyncEngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=4096,
        additional_config={"kv_compression": ON},
    ).create_engine_config()
    assert settings_of(config) == Settings(budget=1024)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"method": "triattention", "budget": 4097}, {}, "budget 4097 is above max_model_len 4096"),
        ({"method": "triattention", "budget": 256}, {}, "budget 256 leaves no candidate .* 128"),
        # Regression: it was discovered at the first round and killed the server.
        (
            {"method": "triattention", "statistics": "/nowhere/statistics.safetensors"},
            {},
            "/nowhere/statistics.safetensors, which is not a file",
        ),
        ({"method": "triattention", "bugdet": 1}, {}, "Unknown setting bugdet"),
        ({"budget": 1024}, {}, r"has settings \(budget\) but is not turned on"),
        ("triattention", {}, r"additional_config\[\"kv_compression\"\] is 'triattention', allowed"),
    ],
)
def test_settings_that_contradict_the_engine_are_refused(
    model: str, settings: object, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        arguments(model, settings, **changes).create_engine_config()


def test_a_wrong_setting_is_named_before_the_model_is_looked_at(tmp_path: Path) -> None:
    wrong = arguments(str(tmp_path), {"method": "triattention", "budget": "much"})
    with pytest.raises(SettingsError, match="budget is 'much'"):
        wrong.create_engine_config()


@pytest.mark.feature("A custom scheduler or worker class", "refused")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler_cls": "my.Scheduler"}, "The scheduler class is my.Scheduler, but KV compres"),
        ({"worker_cls": "my.Worker"}, "no worker for 'my.Worker'"),
    ],
)
def test_a_class_of_the_users_own_is_refused(
    model: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        arguments(model, ON, **changes).create_engine_config()


@pytest.mark.parametrize("settings", [{"budget": 512}, {}])
def test_settings_without_a_method_do_not_turn_compression_on(
    settings: dict[str, object], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: vLLM ran without it, and what reads the configuration behind took it for on."""
    monkeypatch.setenv("TRIATTENTION_ENABLE", "0")
    assert settings_of(arguments(model, settings).create_engine_config()) is None


def test_an_untested_vllm_is_refused_only_when_compression_is_on(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.vllm, "__version__", "0.99.1")
    assert settings_of(arguments(model).create_engine_config()) is None
    with pytest.raises(UnsupportedError, match=r"with vLLM 0.28, .*0.32, and this is 0.99.1; inst"):
        arguments(model, ON).create_engine_config()
    monkeypatch.setenv("TRIATTENTION_ALLOW_UNTESTED_VLLM", "0")
    with pytest.raises(UnsupportedError, match="TRIATTENTION_ALLOW_UNTESTED_VLLM=1 to try"):
        arguments(model, ON).create_engine_config()
    monkeypatch.setenv("TRIATTENTION_ALLOW_UNTESTED_VLLM", "1")
    assert settings_of(arguments(model, ON).create_engine_config()) == Settings(budget=1024)


@pytest.mark.feature("vLLM 0.28 to 0.32", "works")
@pytest.mark.parametrize(
    ("version", "verified"),
    [
        ("0.32.0", True),
        ("0.32.7.dev3+g0a1b2c", True),
        ("0.28.0", True),
        ("0.27.1", False),
        ("0.3.2", False),
        ("0.33.0", False),
        ("dev", False),
        ("", False),
    ],
)
def test_a_version_is_verified_by_its_release_line(version: str, verified: bool) -> None:
    assert versions.is_verified(version) is verified


@pytest.mark.parametrize(
    ("version", "line"), [("0.28.1+cpu", (0, 28)), ("0.34.0", (0, 34)), ("dev", (0, 33))]
)
def test_a_version_without_a_number_behaves_like_the_newest_known(
    version: str, line: tuple[int, int]
) -> None:
    assert versions.line_of_behaviour(version) == line
    assert versions.line_of_behaviour(versions.vllm_version()) == differences.LINE


def test_a_version_whose_source_was_read_and_never_run_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    said = "this is 0.33.0, whose source has every seam that is needed but which has not been run"
    with pytest.raises(UnsupportedError, match=f"{said}; install one of those"):
        versions.require_verified("0.33.0", {})
    assert not caplog.messages
    # Some of what vLLM imports silences every handler that there is.
    with caplog.at_level(logging.WARNING, logger="vllm"):
        versions.require_verified("0.33.0", {"TRIATTENTION_ALLOW_UNTESTED_VLLM": "1"})
    (warning,) = set(caplog.messages)
    assert said in warning
    assert "continuing because TRIATTENTION_ALLOW_UNTESTED_VLLM is set" in warning


def test_a_seam_that_is_gone_is_named_with_the_version() -> None:
    class Changed:
        from_cli_args = staticmethod(print)

    for name, kind in (("add_cli_args", staticmethod), ("from_cli_args", classmethod)):
        with pytest.raises(
            SeamError, match=rf"Changed\.{name} of vLLM .* is not a {kind.__name__}"
        ):
            versions.require_attributes(Changed, {name: kind})
    versions.require_attributes(Changed, {"from_cli_args": staticmethod})


def test_the_authors_plugin_beside_this_one_is_refused_while_it_is_on(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = EntryPoint("triattention", "triattention.vllm.plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(other_plugins, "entry_points", lambda group: [theirs])
    with pytest.raises(UnsupportedError, match="The plugin triattention of distribution triatten"):
        arguments(model, ON).create_engine_config()
    assert settings_of(arguments(model).create_engine_config()) is None
    monkeypatch.setenv("ENABLE_TRIATTENTION", "0")
    assert settings_of(arguments(model, ON).create_engine_config()) == Settings(budget=1024)


def test_this_plugin_is_not_taken_for_the_authors() -> None:
    group = "vllm.general_plugins"
    ours = EntryPoint("triattention_vllm", "triattention_vllm.plugin:register", group)
    theirs = EntryPoint("triattention", "triattention.vllm.plugin:register", group)
    assert other_plugins.loaded_authors_plugins([ours, theirs], None) == ["triattention"]
    assert other_plugins.loaded_authors_plugins([ours, theirs], ["triattention_vllm"]) == []
    assert ours in entry_points(group=group)
