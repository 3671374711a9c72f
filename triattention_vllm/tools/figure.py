"""Pictures: an empty figure without a screen, and writing it where the user said."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from triattention_vllm.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


@contextmanager
def drawn_to(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of ``width`` x ``height`` inches that is written to ``path`` behind the block.

    Raises SettingsError where ``path`` ends in none of SUFFIXES or cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"{path} is no picture; give a file that ends in {_ALLOWED}.")
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written ({error.strerror}); give a file in a folder that exists and "
            "that you may write to."
        ) from error


_ALLOWED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
