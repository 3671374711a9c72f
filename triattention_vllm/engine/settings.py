"""The settings in vLLM's ``additional_config``: written at start, and read back from a finished
VllmConfig in whatever process it arrives."""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig

from triattention_vllm.config import ADDITIONAL_CONFIG_KEY, OFF, Settings
from triattention_vllm.errors import SettingsError


def additional_settings(additional_config: object) -> Mapping[str, object] | None:
    """What ``additional_config`` says about KV compression, or None where it says nothing.

    vLLM also takes an object of a platform's own class there: nothing of ours is in that.
    """
    if not isinstance(additional_config, dict) or ADDITIONAL_CONFIG_KEY not in additional_config:
        return None
    given = additional_config[ADDITIONAL_CONFIG_KEY]
    if not isinstance(given, Mapping):
        raise SettingsError(
            f'additional_config["{ADDITIONAL_CONFIG_KEY}"] is {given!r}, allowed is a mapping of '
            f'settings such as {{"method": "triattention", "budget": 2048}}.'
        )
    return given


def with_settings(additional_config: object, mapping: Mapping[str, object]) -> dict[str, Any]:
    """A copy of ``additional_config`` that carries ``mapping``; the original stays as it is,
    because vLLM shares it between engine arguments and parsed flags."""
    if not isinstance(additional_config, dict):
        raise SettingsError(
            f"additional_config is a {type(additional_config).__name__}, but KV compression "
            "travels in it and needs a dict."
        )
    return {**additional_config, ADDITIONAL_CONFIG_KEY: dict(mapping)}


def settings_of(vllm_config: VllmConfig) -> Settings | None:
    """The settings that ``create_engine_config`` wrote, or None where compression is off."""
    given = additional_settings(vllm_config.additional_config)
    # Without a method it is the user's own, and compression was not turned on.
    return (
        None if given is None or given.get("method", OFF) == OFF else Settings.from_mapping(given)
    )
