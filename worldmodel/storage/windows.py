"""Which windows of consecutive rows a batch is made of, and the importance weights of those that are drawn more often."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WindowStarts = tuple[np.ndarray, np.ndarray]
"""(streams [n], starts [n]) of windows; starts are sequence numbers."""


@dataclass(frozen=True)
class Windows:
    """All windows of `length` rows that the streams of a replay hold.

    next, stored  [S] sequence number of each stream's next row, and how many rows the stream holds
    ends          [S] sequence numbers of the is_last rows that it holds, ascending
    """

    next: np.ndarray
    stored: np.ndarray
    ends: Sequence[deque[int]]
    length: int

    @property
    def counts(self) -> np.ndarray:
        """How many windows each stream has, [S]."""
        return np.maximum(self.stored - self.length + 1, 0)

    def draw(
        self, batch: int, rng: np.random.Generator, recent_fraction: float, terminal_fraction: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(streams, starts, weights), each [batch]: drawn by the fractions of `Replay.sample`."""
        count = np.array([len(e) if n else 0 for e, n in zip(self.ends, self.counts.tolist())])
        if not count.any():
            terminal_fraction = 0.0
        n_recent, n_both = _rounded((recent_fraction * batch, (recent_fraction + terminal_fraction) * batch), rng)
        parts = self._recent(n_recent, rng), self._around_ends(n_both - n_recent, count, rng), self._uniform(batch - n_both, rng)
        streams, starts = (np.concatenate(side) for side in zip(*parts))
        return streams, starts, self._weight(streams, starts, recent_fraction, terminal_fraction, int(count.sum()))

    def _uniform(self, n: int, rng: np.random.Generator) -> WindowStarts:
        """Uniform over all windows of all streams."""
        cumulative = np.cumsum(self.counts)
        index = rng.integers(cumulative[-1], size=n)
        streams = np.searchsorted(cumulative, index, side="right")
        return streams, (self.next - self.stored)[streams] + index - (cumulative - self.counts)[streams]

    def _recent(self, n: int, rng: np.random.Generator) -> WindowStarts:
        """The last window of each stream in turn, from a random stream on."""
        able = np.flatnonzero(self.counts)
        first = rng.integers(len(able)) if n else 0
        streams = able[(first + np.arange(n)) % len(able)]
        return streams, self.next[streams] - self.length

    def _around_ends(self, n: int, count: np.ndarray, rng: np.random.Generator) -> WindowStarts:
        """An is_last row, uniformly (`count` [S] of them in each stream), then a window that contains it, uniformly."""
        if n == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        cumulative = np.cumsum(count)
        index = rng.integers(cumulative[-1], size=n)
        streams = np.searchsorted(cumulative, index, side="right")
        within = index - (cumulative - count)[streams]
        end = np.array([self.ends[s][i] for s, i in zip(streams.tolist(), within.tolist())])
        low, high = self._covering(end, streams)
        return streams, rng.integers(low, high + 1)

    def _covering(self, rows: np.ndarray, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, last) start of the windows that contain each of these rows."""
        last_start = self.next[streams] - self.length
        return np.maximum(rows - self.length + 1, (self.next - self.stored)[streams]), np.minimum(rows, last_start)

    def _weight(
        self, streams: np.ndarray, starts: np.ndarray, recent_fraction: float, terminal_fraction: float, count: int
    ) -> np.ndarray:
        """Importance weights: the uniform probability of each window over its probability in the mixture of `draw`.

        At most 1 / (1 - recent_fraction - terminal_fraction). Without a uniform share some windows are never drawn; then the
        weights have mean 1 in the batch. Source: Veach and Guibas 1995 (the balance heuristic); Owen and Zhou 2000.
        """
        counts = self.counts
        uniform = np.full(len(streams), 1 / counts.sum())
        mixture = max(0.0, 1 - recent_fraction - terminal_fraction) * uniform
        mixture += recent_fraction * (starts == self.next[streams] - self.length) / np.count_nonzero(counts)
        if terminal_fraction:
            inside = [_within(self.ends[s], q, q + self.length) for s, q in zip(streams.tolist(), starts.tolist())]
            which = np.repeat(np.arange(len(streams)), [len(e) for e in inside])
            low, high = self._covering(np.array([e for some in inside for e in some], np.int64), streams[which])
            mixture += terminal_fraction / count * np.bincount(which, 1 / (high - low + 1), len(streams))
        weight = uniform / mixture
        return weight if recent_fraction + terminal_fraction < 1 else weight / weight.mean()


def _within(ends: deque[int], start: int, stop: int) -> list[int]:
    """Those of the ascending numbers that lie in start..stop - 1."""
    return [ends[i] for i in range(bisect_left(ends, start), bisect_left(ends, stop))]


def _rounded(numbers: tuple[float, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """Each rounded to a neighbouring integer so that its mean is kept, and their order; draws only where one is no integer."""
    draw = rng.random() if any(x > int(x) for x in numbers) else 1.0
    return tuple(int(x) + int(draw < x - int(x)) for x in numbers)
