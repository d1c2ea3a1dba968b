"""Where episodes end, in one stream of rows."""

from __future__ import annotations


class Ends:
    """Sorted sequence numbers of one stream's is_last rows, dropped from the front as they are evicted."""

    def __init__(self) -> None:
        self._at: list[int] = []
        self._from = 0

    def __len__(self) -> int:
        return len(self._at) - self._from

    def __getitem__(self, i: int) -> int:
        """The i-th oldest, i >= 0."""
        return self._at[self._from + i]

    def append(self, sequence: int) -> None:
        self._at.append(sequence)

    def drop_before(self, sequence: int) -> None:
        while self._from < len(self._at) and self._at[self._from] < sequence:
            self._from += 1
        if self._from > 256 and 2 * self._from > len(self._at):  # so that dropping costs O(1) per row on average
            del self._at[: self._from]
            self._from = 0
