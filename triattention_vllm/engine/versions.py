"""The vLLM versions that were verified, and what happens with any other.

What those versions do differently is in ``differences``, and nowhere else.
"""

import logging
import re
from collections.abc import Mapping

import vllm

from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, allows_untested_vllm
from triattention_vllm.errors import SeamError, UnsupportedError
from triattention_vllm.log import log_once

Line = tuple[int, int]
"""(major, minor) of a release line of vLLM."""

VERIFIED: tuple[Line, ...] = ((0, 28), (0, 29), (0, 30), (0, 31), (0, 32))
"""Release lines that are served, in order: the whole suite passed on the newest, and on the others
the part of it that a release can change."""

SOURCE_CHECKED: tuple[Line, ...] = ((0, 33),)
"""Release lines without a CPU build: a test reads every seam in their source, and nothing ran."""


def vllm_version() -> str:
    """The version of the vLLM that is imported."""
    return str(vllm.__version__)


def release_line(version: str) -> Line | None:
    """The release line of ``version``, or None where it does not start with two numbers (a
    source build without tags)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def line_of_behaviour(version: str) -> Line:
    """The line whose behaviour ``version`` is taken to have: its own, or the newest known one
    for a version without a number, which only runs where the user accepts untested versions."""
    return release_line(version) or max(VERIFIED + SOURCE_CHECKED)


def is_verified(version: str) -> bool:
    """Whether ``version`` belongs to a verified release line."""
    return release_line(version) in VERIFIED


def names(lines: tuple[Line, ...]) -> str:
    """Release lines in words: ``0.28, 0.29``."""
    return ", ".join(f"{major}.{minor}" for major, minor in lines)


def require_verified(version: str, environ: Mapping[str, str]) -> None:
    """Raise UnsupportedError for a version that was never run; where the user accepts it in
    the environment, warn instead."""
    if is_verified(version):
        return
    found = f"KV compression was tested with vLLM {names(VERIFIED)}, and this is {version}"
    if release_line(version) in SOURCE_CHECKED:
        found += ", whose source has every seam that is needed but which has not been run"
    if not allows_untested_vllm(environ):
        raise UnsupportedError(
            f"{found}; install one of those, turn compression off, or set "
            f"{ALLOW_UNTESTED_VLLM}=1 to try."
        )
    log_once(logging.WARNING, f"{found}; continuing because {ALLOW_UNTESTED_VLLM} is set.")


def require_attributes(owner: type, kinds: Mapping[str, type]) -> None:
    """Raise SeamError unless ``owner`` itself defines each name as an object of its kind."""
    for name, kind in kinds.items():
        if not isinstance(vars(owner).get(name), kind):
            raise SeamError(
                f"{owner.__module__}.{owner.__qualname__}.{name} of vLLM {vllm_version()} is not "
                f"a {kind.__name__}, so the flags of KV compression cannot be added; install a "
                "verified vLLM version, or leave this plugin out with VLLM_PLUGINS."
            )
