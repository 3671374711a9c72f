"""vLLM 0.33 has no CPU build: its seams are those that ``make seams-033`` read in its wheel."""

import hashlib
import json
from pathlib import Path

import pytest
from seams_installed import installed_line, installed_source, named, overrides, owner_and_name
from seams_of_wheel import RECORD, read, recorded
from seams_table import Seam, seams, versions
from vllm_source import Source

LINE = (0, 33)
PASSED_ON = {
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": ("self", "request"),
}
"""Wrapped, and whatever follows these parameters is passed on as it comes."""
WHEELS = Path(__file__).parents[2] / ".cache" / "wheels"


@pytest.mark.parametrize("seam", seams(), ids=str)
def test_the_wheel_has_the_symbols_of_its_line_and_no_other(seam: Seam) -> None:
    reading = recorded().get((seam.kind, str(seam)))
    assert reading, f"nobody has read {seam} in vLLM 0.33 yet; run: make seams-033"
    listed = LINE in seam.lines
    assert reading.found == listed, (
        f"{seam} is {'no' if listed else 'a'} {seam.kind} of vLLM 0.33; "
        f"its row says {versions.names(seam.lines)}"
    )


def test_every_override_takes_the_parameters_that_the_wheel_has() -> None:
    rows = [(owner_and_name(seam), seam) for seam in seams() if seam.kind == "method"]
    checked = 0
    for cls, _, name in overrides():
        ours, passes_on = named(getattr(cls, name))
        for (owner, listed), seam in rows:
            if listed == name and issubclass(cls, owner) and LINE in seam.lines:
                written = recorded()["method", str(seam)].parameters
                assert written is not None
                theirs = [word.strip("*=") for word in written if word != "*"]
                names = [parameter for parameter, _ in ours if parameter != "cls"]
                assert names == (theirs[: len(names)] if passes_on else theirs), (
                    f"{cls.__qualname__}.{name} overrides {seam}"
                )
                checked += 1
    assert checked >= 14


@pytest.mark.skipif(
    installed_line() != max(versions.VERIFIED),
    reason="0.33 is held against the newest line that the suite runs on",
)
@pytest.mark.parametrize(
    "seam",
    [
        seam
        for seam in seams()
        if seam.kind in ("method", "function") and {LINE, max(versions.VERIFIED)} <= {*seam.lines}
    ],
    ids=str,
)
def test_what_is_called_takes_the_same_parameters_as_where_the_suite_runs(seam: Seam) -> None:
    found = installed_source().parameters(seam.module, seam.qualname)
    written = recorded()[seam.kind, str(seam)].parameters
    assert found is not None
    assert written is not None
    first = PASSED_ON.get(str(seam))
    if first is None:
        assert written == found
    else:
        assert written[: len(first)] == found[: len(first)] == first


def test_the_record_is_what_the_wheel_says() -> None:
    assert recorded().keys() == {(s.kind, str(s)) for s in seams()}, "run: make seams-033"
    first = json.loads(RECORD.read_text(encoding="utf-8").splitlines()[0])
    wheel = WHEELS / first["wheel"]
    if not wheel.is_file():
        pytest.skip(f"{wheel.name} (336 MB) is not here; make seams-033 downloads it")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == first["sha256"]
    assert read(Source(wheel)) == recorded()
