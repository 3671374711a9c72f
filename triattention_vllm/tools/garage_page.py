"""A recorded request as one HTML page that needs nothing else: charts and the garage itself."""

import json
from importlib import resources
from pathlib import Path

from triattention_vllm.errors import SettingsError
from triattention_vllm.tools.recording import RequestRecording

_PLACE = "/*RECORDING*/null"


def write_page(recording: RequestRecording, path: Path) -> None:
    """Write the page; the recording is inside, nothing is loaded from elsewhere.

    Raises SettingsError where ``path`` cannot be written.
    """
    template = resources.files("triattention_vllm.tools").joinpath("garage.html")
    page = template.read_text(encoding="utf-8")
    try:
        path.write_text(page.replace(_PLACE, _script_json(recording)), encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written ({error.strerror}); give a file in a folder that exists and "
            "that you may write to."
        ) from error


def _script_json(recording: RequestRecording) -> str:
    """JSON that may stand in a script element: no request can end it."""
    content = {
        "request": recording.request,
        "block_size": recording.block_size,
        "settings": dict(recording.settings),
        "rows": recording.rows,
        "rounds": [
            {
                "boundary": one.boundary,
                "evicted_before": one.num_evicted_before,
                "region_start": one.region_start,
                "first_candidate": one.first_candidate,
                "num_source": one.num_source,
                "freed": one.num_freed,
            }
            for one in recording.rounds
        ],
        "evicted_at": recording.evicted_at,
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
