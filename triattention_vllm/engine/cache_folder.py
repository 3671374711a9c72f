"""Statistics that were made at an earlier start, kept in the user's cache folder."""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from triattention_vllm.environment import CACHE
from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics import SCHEMA_VERSION, Fingerprint, Statistics

_CHOOSE = (
    f"set {CACHE} to a folder that this user may write, or give a statistics file with the setting "
    "`statistics`"
)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``$TRIATTENTION_CACHE``, else ``$XDG_CACHE_HOME/triattention``, else
    ``~/.cache/triattention``. An empty variable counts as unset.

    Raises StatisticsError where no home folder is known either.
    """
    if environment.get(CACHE):
        return Path(environment[CACHE]).expanduser()
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]).expanduser() / "triattention"
    try:
        return Path.home() / ".cache" / "triattention"
    except RuntimeError as error:
        raise StatisticsError(
            f"there is no home folder to keep statistics in; {_CHOOSE}"
        ) from error


def cached_file(fingerprint: Fingerprint) -> Path:
    """Where the statistics of this model are kept: one file per fingerprint and schema version,
    so that an older file is not in the way."""
    described = f"{SCHEMA_VERSION} {fingerprint.to_json()}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    architecture = re.sub(r"[^A-Za-z0-9_.-]", "_", fingerprint.architecture or "model")
    return cache_folder() / f"{architecture}-{digest}.safetensors"


def load_or_none(fingerprint: Fingerprint) -> Statistics | None:
    """The kept statistics of this model; None if none were made yet.

    Raises StatisticsError where something else, or a damaged file, lies in that place: it is
    never overwritten.
    """
    path = cached_file(fingerprint)
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read ({error}); {_CHOOSE}") from error
    try:
        statistics = Statistics.load(path)
        statistics.check_fits(fingerprint)
    except StatisticsError as error:
        raise StatisticsError(
            f"the file in the cache folder is not what this model left there ({error}). Delete "
            f"{path} and start again: it will be made anew"
        ) from error
    return statistics


def check_writable() -> None:
    """Create the cache folder and write to it, so that a long calibration is not in vain.

    Folders that are made are for this user alone, whatever the umask. The file that is written
    has no name, so that it meets no other process' and no link that somebody left there.
    Raises StatisticsError where that fails.
    """
    folder = cache_folder()
    try:
        for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StatisticsError(
            f"statistics cannot be kept in the cache folder {folder} ({error}); {_CHOOSE}"
        ) from error


def keep(statistics: Statistics) -> Path:
    """Write statistics to their place in the cache folder, atomically; returns the file."""
    check_writable()
    path = cached_file(statistics.fingerprint)
    statistics.save(path)
    return path
