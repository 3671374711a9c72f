"""Tables and sentences on standard output: rich in a terminal, plain text elsewhere."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# Wide enough that no row of a table is broken where a file or a pipe is written.
_PLAIN_WIDTH = 200


def console() -> Console:
    """Standard output. Nothing is coloured by guessing, and plain text is not broken to lines."""
    found = Console(highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = _PLAIN_WIDTH
    return found


def say(out: Console, sentence: str) -> None:
    """One sentence, broken to lines in a terminal only."""
    out.print(sentence, soft_wrap=not out.is_terminal)


def table(out: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is a name and whose others are numbers."""
    shape = box.ROUNDED if out.is_terminal else None
    built = Table(box=shape, pad_edge=out.is_terminal, padding=(0, 1))
    for idx, column in enumerate(columns):
        built.add_column(column, justify="right" if idx else "left")
    for row in rows:
        built.add_row(*row)
    out.print(f"\n{title}")
    out.print(built)
