"""The settings as users read them: the table in the README and the help of the flag."""

from dataclasses import Field, fields
from typing import Any

from triattention_vllm.config import Settings, environment_name
from triattention_vllm.description import Description


def settings_table() -> str:
    """The table of settings in the README, as Markdown."""
    rows = [
        "| setting | default | allowed | meaning | variable |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in fields(Settings):
        description: Description = entry.metadata["description"]
        rows.append(
            f"| `{entry.name}` | {_default(entry)} | {description.allowed} | {description.help} "
            f"| `{environment_name(entry.name)}` |"
        )
    return "\n".join(rows) + "\n"


def settings_help() -> str:
    """Help of ``--kv-compression-config``: one clause per setting."""
    clauses = [
        f"{entry.name} ({entry.metadata['description'].allowed}; default {_default(entry)}): "
        f"{entry.metadata['description'].help}"
        for entry in fields(Settings)
        if entry.name != "method"
    ]
    return "Settings of KV compression as JSON, or one at a time as " + (
        "--kv-compression-config.NAME VALUE.\n\n" + "\n".join(f"- {clause}" for clause in clauses)
    )


def _default(entry: Field[Any]) -> str:
    """A default as the table and the help show it."""
    return "none" if entry.default is None else str(entry.default)
