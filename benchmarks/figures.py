"""What the writers of README's blocks share: the rows, marked by whether they are stale, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rows import STALE, Row, Rows, marked, stale
from tables import markdown

BLOCKS: dict[str, Callable[[Figures], str]] = {}


class Figures:
    """The rows of all files, marked by whether the code with hash `of` made them; `fresh`: whether any of those used was."""

    def __init__(self, folder: Path, of: str):
        self.folder, self.of, self.fresh = folder, of, False

    def rows(self, name: str, **key: object) -> list[Row]:
        """The rows of a file whose keys have these values."""
        rows = Rows(name, self.folder, of=self.of)
        return [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]

    def mark(self, text: object, rows: Iterable[Row]) -> str:
        rows = list(rows)
        self.fresh |= any(not stale(row, self.of) for row in rows)
        return marked(text, rows, self.of)

    def table(self, head: Sequence[str], lines: Iterable[Sequence[object]], rows: Iterable[Row]) -> str:
        """A Markdown table and the dates of its rows; where there are none, says so."""
        dates = sorted({row["where"]["when"][:10] for row in rows})
        if not dates:
            return "Not measured yet.\n"
        drawn = markdown(head, lines)
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        legend = f"; {STALE} by other code" if STALE in drawn else ""
        return f"{drawn}\n\nRows of {when}{legend}.\n"

    def lines(
        self, head: Sequence[str], named: Iterable[tuple[object, Sequence[Row]]], cells: Callable[..., Iterable[object]]
    ) -> str:
        """A table with a line for each (name, rows): the marked name, and `cells` of the rows."""
        named = list(named)
        return self.table(
            head, [[self.mark(name, rows), *cells(rows)] for name, rows in named], [x for _, rows in named for x in rows]
        )


def block(name: str) -> Callable[[Callable[[Figures], str]], Callable[[Figures], str]]:
    """Registers what writes a block, with its newline at the end."""

    def register(write: Callable[[Figures], str]) -> Callable[[Figures], str]:
        BLOCKS[name] = write
        return write

    return register
