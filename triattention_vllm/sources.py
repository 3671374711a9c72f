"""Where settings come from: additional_config, environment, default, per key. Flags were merged
into additional_config when vLLM parsed them."""

import logging
from collections.abc import Mapping

from triattention_vllm.config import ADDITIONAL_CONFIG_KEY, OFF, Settings
from triattention_vllm.environment import (
    ALLOW_UNTESTED_VLLM,
    AUTHORS_ENABLE,
    AUTHORS_VARIABLES,
    CACHE,
    ENABLE,
    Value,
    authors_settings,
    authors_variables,
    environment_switch,
    own_settings,
    own_variables,
)
from triattention_vllm.errors import SettingsError
from triattention_vllm.log import log_once

Source = Mapping[str, object]


def merge(higher: Source | None, lower: Source | None) -> dict[str, object]:
    """Both sources key by key; where both name a key, ``higher`` decides."""
    return {**(lower or {}), **(higher or {})}


def resolve_settings(
    additional_config: Source | None, environ: Mapping[str, str]
) -> Settings | None:
    """The settings that all sources together ask for, or None where nothing turns them on.

    ``method`` is the switch: named by the highest source that names it, ``off`` there means
    off. Without it the other settings have nothing to act on: given in ``additional_config`` they
    are an error, in the environment they are a warning.

    Raises SettingsError for anything unknown, mistyped, out of range or contradictory.
    """
    given: Source = additional_config or {}
    if given.get("method") == OFF:
        return None
    switch = environment_switch(environ)
    if "method" not in given and switch is None:
        _refuse_unused(given)
        _warn_unused(environ)
        return None
    if "method" not in given and switch == OFF:
        return None
    from_authors = authors_settings(environ)
    from_environment = merge(own_settings(environ), from_authors)
    mapping = merge({"method": switch, **given}, from_environment)
    settings = Settings.from_mapping(mapping)
    _report_authors(environ, from_authors, mapping)
    return settings


def _refuse_unused(given: Source) -> None:
    """Raise SettingsError where settings are given and nothing turns compression on."""
    if given:
        raise SettingsError(
            f"KV compression has settings ({', '.join(map(str, given))}) but is not turned on; "
            f'add --kv-compression triattention, or "method": "triattention" in '
            f'additional_config["{ADDITIONAL_CONFIG_KEY}"], or {ENABLE}=1.'
        )


def _warn_unused(environ: Mapping[str, str]) -> None:
    """One warning where variables are set and nothing turns compression on."""
    neutral = {CACHE, ALLOW_UNTESTED_VLLM}
    unused = [
        name for name in own_variables(environ) + authors_variables(environ) if name not in neutral
    ]
    if unused:
        log_once(
            logging.WARNING,
            f"KV compression is off, so {', '.join(unused)} has no effect; turn it on with "
            f"{ENABLE}=1 or --kv-compression triattention.",
        )


def _report_authors(
    environ: Mapping[str, str], read: Mapping[str, Value], effective: Source
) -> None:
    """One line that says what each variable of the authors' plugin became."""
    names = authors_variables(environ)
    if not names:
        return
    parts = []
    for name in names:
        if name in AUTHORS_VARIABLES:
            key = AUTHORS_VARIABLES[name].key
            overruled = "" if effective[key] == read[key] else f", overruled by {effective[key]!r}"
            parts.append(f"{name} -> {key}={read[key]!r}{overruled}")
        elif name == AUTHORS_ENABLE:
            parts.append(f"{name} -> method={effective['method']!r}")
        else:
            parts.append(f"{name} has no effect here")
    log_once(logging.INFO, f"Variables of the authors' plugin: {'; '.join(parts)}.")
