"""The statistics file: safetensors whose metadata describes it, written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from triattention_vllm.errors import StatisticsError
from triattention_vllm.method.statistics.fingerprint import Fingerprint, shown

SCHEMA_VERSION = "2"
MAKE_ANOTHER = "run `triattention calibrate --model MODEL --output FILE` to make another"
_FORMAT = "triattention-statistics"
_MEMBERS = ("content_hash", "fingerprint", "provenance")


def new_provenance(tokens_seen: str, text: str, versions: str) -> dict[str, str]:
    """How statistics that are made now came to be. tokens_seen: a number of them, or "unknown"."""
    return {
        "tokens_seen": tokens_seen,
        "text": text,
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "schema_version": SCHEMA_VERSION,
    }


def write_file(
    target: Path,
    tensors: Mapping[str, Tensor],
    fingerprint: Fingerprint,
    provenance: Mapping[str, str],
) -> None:
    """Write atomically: a temporary file in the same folder, flushed, then renamed; mode 0600.
    A link that lies in the place is replaced, not followed.

    Raises StatisticsError where the folder cannot be written; no temporary file is left then.
    """
    written = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    described = {"fingerprint": fingerprint.to_json(), "provenance": json.dumps(dict(provenance))}
    content = to_safetensors(
        written,
        metadata={
            "format": _FORMAT,
            "schema_version": SCHEMA_VERSION,
            "content_hash": content_hash(written, described),
            **described,
        },
    )
    try:
        _replace_file(target, content)
    except OSError as error:
        raise StatisticsError(
            f"statistics could not be written to {target} ({error}); "
            "choose a file in a folder that exists and that this user may write"
        ) from error


def read_file(
    path: str, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], Fingerprint, dict[str, str]]:
    """The tensors of these names, the fingerprint and the provenance.

    Raises StatisticsError for a file of another format, schema version or content, and for one
    that was changed after it was written; OSError and SafetensorError for one that is missing,
    unreadable or not whole.
    """
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        _check_metadata(metadata)
        found = sorted(file.keys())
        if found != sorted(names):
            raise StatisticsError(
                f"it holds the tensors {shown(found)}; it must hold {sorted(names)}"
            )
        tensors = {name: file.get_tensor(name) for name in names}
    if metadata["content_hash"] != content_hash(tensors, metadata):
        raise StatisticsError("its content is not what was written: the file is damaged")
    fingerprint = Fingerprint.from_json(metadata["fingerprint"])
    return tensors, fingerprint, _provenance_from_json(metadata["provenance"])


def explain_unreadable(path: str, error: OSError | SafetensorError) -> StatisticsError:
    """The error to raise for a file that is missing, unreadable or not whole."""
    if isinstance(error, FileNotFoundError):
        return StatisticsError(
            f"statistics file {path}: there is no such file; run `triattention calibrate --model "
            "MODEL --output FILE` to make it, or leave the setting `statistics` out"
        )
    return StatisticsError(
        f"statistics file {path}: it is not a whole safetensors file ({error}); {MAKE_ANOTHER}; "
        "a file of the public reference (.pt) is converted with "
        "`triattention calibrate --import FILE.pt`"
    )


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the tensors' bytes, by name, and the metadata that describes them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    for name in ("fingerprint", "provenance"):
        digest.update(f"{name} {metadata[name]}".encode())
    return digest.hexdigest()


def _replace_file(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with ExitStack() as undo:
        undo.callback(os.unlink, temporary)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        undo.pop_all()


def _check_metadata(metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise StatisticsError(
            f"it is a safetensors file with metadata {shown(sorted(metadata))}, not "
            "statistics; its "
            f"metadata must have format {_FORMAT!r}"
        )
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise StatisticsError(
            f"its schema version is {shown(metadata.get('schema_version'))}; this version of "
            f"triattention-vllm reads {SCHEMA_VERSION!r}"
        )
    missing = [name for name in _MEMBERS if name not in metadata]
    if missing:
        raise StatisticsError(f"its metadata lacks {missing}")


def _provenance_from_json(text: str) -> dict[str, str]:
    try:
        provenance = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"its provenance is not JSON ({error})") from error
    if not isinstance(provenance, dict) or not all(
        isinstance(value, str) for value in provenance.values()
    ):
        raise StatisticsError("its provenance is not a JSON object of strings, as it must be")
    return provenance
