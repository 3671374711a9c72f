"""Settings from environment variables: ours, and those of the authors' plugin."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from triattention_vllm.config import (
    ENVIRONMENT_PREFIX,
    OFF,
    descriptions,
    environment_name,
)
from triattention_vllm.errors import SettingsError

Value = str | int

ENABLE = f"{ENVIRONMENT_PREFIX}ENABLE"
ALLOW_UNTESTED_VLLM = f"{ENVIRONMENT_PREFIX}ALLOW_UNTESTED_VLLM"
CACHE = f"{ENVIRONMENT_PREFIX}CACHE"
METRICS_FOLDER = f"{ENVIRONMENT_PREFIX}METRICS_FOLDER"
"""Not a setting: a server names the folder in which its own processes count."""
AUTHORS_PREFIX = "TRIATTN_RUNTIME_"
AUTHORS_ENABLE = "ENABLE_TRIATTENTION"


def parse_switch(name: str, value: str) -> bool:
    """1 or true, 0 or false; anything else raises SettingsError that names the variable."""
    switches = {"1": True, "true": True, "0": False, "false": False}
    if value.lower() not in switches:
        raise SettingsError(f"{name}={value!r} is not a switch, allowed is 1, 0, true or false.")
    return switches[value.lower()]


def parse_int(name: str, value: str) -> int:
    """A whole number; anything else raises SettingsError that names the variable."""
    try:
        return int(value)
    except ValueError:
        raise SettingsError(f"{name}={value!r} is not a whole number.") from None


def allows_untested_vllm(environ: Mapping[str, str]) -> bool:
    """Whether the user accepts a vLLM version that was never tested."""
    value = environ.get(ALLOW_UNTESTED_VLLM)
    return value is not None and parse_switch(ALLOW_UNTESTED_VLLM, value)


def _read_value(key: str, name: str, value: str) -> Value:
    """The value of setting ``key`` in variable ``name``, by the types that it allows."""
    description = descriptions()[key]
    is_number = re.fullmatch(r"[+-]?\d+", value.strip()) is not None
    parsed = int(value) if is_number and int in description.kinds else value
    description.refuse(name, parsed)
    return parsed


def own_settings(environ: Mapping[str, str]) -> dict[str, Value]:
    """Settings in ``TRIATTENTION_*``; a variable of that prefix that is unknown, or a value
    that does not parse, raises SettingsError. ``method`` is left to ``environment_switch``."""
    keys = {environment_name(key): key for key in descriptions()}
    allowed = [ENABLE, *keys, CACHE, ALLOW_UNTESTED_VLLM]
    unknown = [name for name in own_variables(environ) if name not in allowed]
    if unknown:
        raise SettingsError(
            f"Unknown variable {', '.join(unknown)}; known are {', '.join(allowed)}."
        )
    return {
        key: _read_value(key, name, environ[name])
        for name, key in keys.items()
        if name in environ and key != "method"
    }


def own_variables(environ: Mapping[str, str]) -> list[str]:
    """Names of all ``TRIATTENTION_*`` variables that a user has set, known or not."""
    return sorted(
        name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name != METRICS_FOLDER
    )


@dataclass(frozen=True)
class AuthorsVariable:
    """What a variable of the authors' plugin becomes: setting ``key``, read by ``read``."""

    key: str
    read: Callable[[str, str], Value]


def _authors_switch(name: str, value: str) -> bool:
    """The spellings of a switch that the authors' plugin takes."""
    spellings = {"yes": "true", "on": "true", "no": "false", "off": "false"}
    return parse_switch(name, spellings.get(value.strip().lower(), value.strip()))


def _authors_protect(name: str, value: str) -> str:
    """True pins the prompt, as the published runs do; false leaves only the sinks."""
    return "prompt" if _authors_switch(name, value) else "sinks"


def _authors_selection(name: str, value: str) -> str:
    """Two of the authors' pruning modes exist here; one of them has two spellings."""
    modes = {
        "per_head": "per_head",
        "per_layer_per_head": "per_layer_per_head",
        "per_layer_head": "per_layer_per_head",
    }
    if value.strip().lower() not in modes:
        raise SettingsError(f"{name}={value!r} is not known here, allowed is {', '.join(modes)}.")
    return modes[value.strip().lower()]


def _authors_path(name: str, value: str) -> str:
    if not value.strip():
        raise SettingsError(f"{name} is empty, allowed is the path of a statistics file.")
    return value


AUTHORS_VARIABLES = {
    f"{AUTHORS_PREFIX}KV_BUDGET": AuthorsVariable("budget", parse_int),
    f"{AUTHORS_PREFIX}DIVIDE_LENGTH": AuthorsVariable("interval", parse_int),
    f"{AUTHORS_PREFIX}WINDOW_SIZE": AuthorsVariable("window", parse_int),
    f"{AUTHORS_PREFIX}PRUNING_MODE": AuthorsVariable("selection", _authors_selection),
    f"{AUTHORS_PREFIX}PROTECT_PREFILL": AuthorsVariable("protect", _authors_protect),
    f"{AUTHORS_PREFIX}SPARSE_STATS_PATH": AuthorsVariable("statistics", _authors_path),
}


def authors_table() -> str:
    """The table of the authors' variables in docs/migration.md, as Markdown."""
    rows = ["| their variable | setting here | our variable |", "| --- | --- | --- |"]
    rows += [
        f"| `{name}` | `{variable.key}` | `{environment_name(variable.key)}` |"
        for name, variable in AUTHORS_VARIABLES.items()
    ]
    rows.append(f"| `{AUTHORS_ENABLE}` | on or off | `{ENABLE}` |")
    return "\n".join(rows) + "\n"


def authors_variables(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables of the authors' plugin that are set, understood or not."""
    return sorted(
        name for name in environ if name.startswith(AUTHORS_PREFIX) or name == AUTHORS_ENABLE
    )


def authors_plugin_is_on(environ: Mapping[str, str]) -> bool:
    """Whether the authors' plugin, where it is installed, would act: unless switched off."""
    return AUTHORS_ENABLE not in environ or _authors_switch(AUTHORS_ENABLE, environ[AUTHORS_ENABLE])


def authors_settings(environ: Mapping[str, str]) -> dict[str, Value]:
    """Settings in the authors' variables; a value that does not parse raises SettingsError."""
    return {
        variable.key: variable.read(name, environ[name])
        for name, variable in AUTHORS_VARIABLES.items()
        if name in environ
    }


def environment_switch(environ: Mapping[str, str]) -> str | None:
    """The method that the environment turns on, ``off``, or None where it says nothing.

    TRIATTENTION_ENABLE decides, then TRIATTENTION_METHOD, then ENABLE_TRIATTENTION. The
    authors' plugin is on unless it is switched off, so their settings alone turn this one on.
    """
    method_name = environment_name("method")
    method = environ.get(method_name, descriptions()["method"].choices[0])
    if method != OFF:
        descriptions()["method"].refuse(method_name, method)
    if ENABLE in environ:
        enabled = parse_switch(ENABLE, environ[ENABLE])
        if enabled and method == OFF:
            raise SettingsError(
                f"{ENABLE}={environ[ENABLE]} and {method_name}={OFF} contradict each other; "
                "leave one of them out."
            )
        return method if enabled else OFF
    if method_name in environ:
        return method
    if AUTHORS_ENABLE in environ:
        return method if authors_plugin_is_on(environ) else OFF
    return method if any(name in environ for name in AUTHORS_VARIABLES) else None
