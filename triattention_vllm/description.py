"""What a setting means and what it may be, in words and as a check."""

import re
from dataclasses import dataclass

from triattention_vllm.errors import SettingsError


@dataclass(frozen=True)
class Description:
    """What a setting means and what it may be.

    kinds: allowed Python types (``bool`` never counts as ``int``).
    choices: allowed strings; empty where any string is. pattern, form: further allowed strings, as
    a regular expression and in words.
    minimum, maximum: smallest and largest allowed number; no largest where it is None.
    """

    help: str
    kinds: tuple[type, ...]
    unit: str = ""
    choices: tuple[str, ...] = ()
    pattern: str = ""
    form: str = ""
    minimum: int = 0
    maximum: int | None = None

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        parts = [f'"{choice}"' for choice in self.choices]
        if str in self.kinds and not self.choices:
            parts.append("a path")
        if self.form:
            parts.append(self.form)
        if int in self.kinds:
            most = "" if self.maximum is None else f" and at most {self.maximum}"
            parts.append(f"a whole number of {self.unit}, at least {self.minimum}{most}")
        return " or ".join(parts)

    def refuse(self, name: str, value: object) -> None:
        """Raise SettingsError unless ``value`` has an allowed type and lies in range."""
        if type(value) not in self.kinds:
            found = f"{value!r} ({type(value).__name__})"
            raise SettingsError(f"{name} is {found}, allowed is {self.allowed}.")
        too_large = isinstance(value, int) and self.maximum is not None and value > self.maximum
        if isinstance(value, int) and (value < self.minimum or too_large):
            raise SettingsError(f"{name} is {value}, allowed is {self.allowed}.")
        if not isinstance(value, str):
            return
        known = value in self.choices if self.choices else value != ""
        if not known and not (self.pattern and re.fullmatch(self.pattern, value)):
            raise SettingsError(f"{name} is {value!r}, allowed is {self.allowed}.")
