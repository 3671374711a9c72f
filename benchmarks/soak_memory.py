"""What a process of a soak's server holds, told from inside: memory that nobody refers to any more
is collected first, so what grows here is held by somebody.

Resident memory alone cannot tell a leak. vLLM leaves cycles of objects behind which Python collects
seldom in a process of millions of them, and freed memory often stays with the allocator.
"""

import ctypes
import gc
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = "SOAK_FOLDER"
_SECONDS_BETWEEN = 30.0


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of the GNU C library, 2.33 or newer; all in bytes or counts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def install() -> None:
    """A general plugin of vLLM: report from now on, in a thread that ends with the process."""
    threading.Thread(target=_report, daemon=True).start()


def path_of(folder: Path, pid: int) -> Path:
    """Where the process ``pid`` says what it holds: MiB of the C allocator, and Python's own small
    blocks (up to 512 bytes each), which are not among them."""
    return folder / f"memory.{pid}"


def _report() -> None:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    path = path_of(Path(os.environ[FOLDER]), os.getpid())
    # Beside the others': processes write at the same time.
    unfinished = path.with_name(f"{path.name}.part")
    while True:
        gc.collect()
        found = mallinfo2()
        in_use = (found.uordblks + found.hblkhd) / 2**20
        unfinished.write_text(f"{in_use} {sys.getallocatedblocks()}")
        unfinished.rename(path)
        time.sleep(_SECONDS_BETWEEN)
