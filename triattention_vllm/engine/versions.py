"""The vLLM versions that were verified, and what happens with any other."""

import logging
import re
from collections.abc import Mapping

import vllm

from triattention_vllm.environment import ALLOW_UNTESTED_VLLM, allows_untested_vllm
from triattention_vllm.errors import SeamError, UnsupportedError
from triattention_vllm.log import log_once

VERIFIED = ((0, 32),)
"""(major, minor) of every vLLM release line that the test suite has run on."""


def vllm_version() -> str:
    """The version of the vLLM that is imported."""
    return str(vllm.__version__)


def is_verified(version: str) -> bool:
    """Whether ``version`` belongs to a verified release line; a version that does not start
    with two numbers (a source build without tags) does not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) in VERIFIED


def require_verified(version: str, environ: Mapping[str, str]) -> None:
    """Raise UnsupportedError for a version that was never tested; where the user accepts it
    in the environment, warn instead."""
    if is_verified(version):
        return
    lines = ", ".join(f"{major}.{minor}" for major, minor in VERIFIED)
    found = f"KV compression was tested with vLLM {lines}, and this is {version}"
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
