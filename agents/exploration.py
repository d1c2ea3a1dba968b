"""Random actions that last, as long as rewards tell nothing about states.

Where each reward follows from the action alone (always 0, always -1, or what the action costs) an actor has nothing to learn from
it, and its own actions lead nowhere new. Then whole episodes are played at random: first all, or half of them where novelty rewards
the actor meanwhile (`agents/novelty.py`), and fewer with each episode that found more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from worldmodel.agents.novelty import Novelty
from worldmodel.data import Obs
from worldmodel.spaces import ActionSpec
from worldmodel.storage.replay import Replay

ENOUGH = 5
"""Episodes that found something, after which none is played at random."""
PIECE = 250
"""Steps of an episode that count as one where it goes on and on."""
LONGEST = 64
"""Steps that a random action lasts at most."""
FEWEST = 50
"""Rows that must be known before anything is said of rewards."""
OUTLIERS = 0.05
"""Share of rows with rewards that do not follow from the action, above which rewards are dense: there is nothing to search for."""
EXACT = 1e-3
"""Relative difference from what follows from the action that is rounding."""


class LastingActions:
    """Random actions, each of which lasts 1 to LONGEST steps, uniform in the logarithm.

    White noise averages out, and no one duration suits all environments (`python benchmarks/exploration.py`).
    Source: Dabney et al. 2021 (temporally extended exploration), with another distribution of durations.
    """

    def __init__(self, spec: ActionSpec, streams: int) -> None:
        self.spec = spec
        self._left, self._action = np.zeros(streams, int), np.zeros((streams, spec.dim), np.float32)

    def draw(
        self, wanted: Bool[np.ndarray, " N"], anew: Bool[np.ndarray, " N"], rng: np.random.Generator
    ) -> Float[np.ndarray, "N A"]:
        """Canonical actions of one step; only those that are `wanted` mean anything, and `anew` begins another action."""
        self._left[anew] = 0
        if count := int((fresh := wanted & (self._left == 0)).sum()):
            self._action[fresh] = self.spec.sample(count, rng)
            self._left[fresh] = LONGEST ** rng.random(count)
        self._left[wanted] -= 1
        return self._action


class Exploration:
    """Whether episodes are played by LastingActions, as the rewards and ends of real steps say.

    found    episodes in which a reward did not follow from the action, or that terminated where rewards are other than 0
    novelty  what an agent that learns in dreams is rewarded by until one was found; None: of an agent without
    """

    novelty: Novelty | None = None

    def __init__(self, spec: ActionSpec) -> None:
        self.spec, self.found = spec, 0
        self._rows: list[tuple[np.ndarray, ...]] = []  # not explained yet: action, reward, first, terminal, streams
        self._weights: np.ndarray | None = None  # [K]: reward from the action's features
        self._tolerance = 0.0

    def begin(self, streams: int, replay: Replay | None = None) -> None:
        """New episodes in all of `streams` environments; `replay` has what was seen before."""
        self._finds, self._steps = np.zeros(streams, bool), np.zeros(streams, int)  # in this piece of an episode
        self._random, self._actions = np.zeros(streams, bool), LastingActions(self.spec, streams)
        if self.novelty is not None and replay is not None and not self.found:
            self.novelty.recount(replay)

    @property
    def is_over(self) -> bool:
        return self.found >= ENOUGH

    @property
    def is_on(self) -> bool:
        """Whether some episodes are played at random."""
        return self._weights is not None and not self.is_over

    @property
    def found_nothing(self) -> bool:
        """Whether rewards are known to tell nothing so far."""
        return self.is_on and not self.found

    @property
    def intrinsic(self) -> Novelty | None:
        """The reward that dreams have as long as real ones tell nothing; None: real ones count, or nothing says what is new."""
        return self.novelty if self.found_nothing and self.novelty is not None and self.novelty.is_known else None

    @property
    def is_blind(self) -> bool:
        """Whether an actor has nothing to learn from."""
        return self.found_nothing and self.intrinsic is None

    def add(
        self,
        action: Float[np.ndarray, "N A"],
        reward: Float[np.ndarray, " N"],
        first: Bool[np.ndarray, " N"],
        terminal: Bool[np.ndarray, " N"],
        streams: np.ndarray,
        obs: Obs | None = None,
    ) -> None:
        """One row of each of `streams`: canonical action that led there, reward, flags; canonical observation, which is counted."""
        if self.is_over:
            return
        if self.novelty is not None and obs is not None and not self.found:
            self.novelty.count(obs)
        reward = np.float32(reward).astype(float)  # some vector environments give float32, others float64
        if self._weights is None:
            self._rows.append((action.copy(), reward, first.copy(), terminal.copy(), streams.copy()))
        else:
            self._count(action, reward, first, terminal, streams)

    def _count(self, action: np.ndarray, reward: np.ndarray, first: np.ndarray, terminal: np.ndarray, streams: np.ndarray) -> None:
        expected = self._features(action) @ self._weights
        at_stake = np.abs(expected) > self._tolerance
        tells = ~first & ((np.abs(reward - expected) > self._tolerance) | (terminal & at_stake))
        anew = first | (self._steps[streams] >= PIECE)
        self._steps[streams] = np.where(anew, 0, self._steps[streams] + 1)
        known = self._finds[streams] & ~anew
        self.found += int((tells & ~known).sum())
        self._finds[streams] = known | tells

    def _features(self, action: np.ndarray) -> np.ndarray:
        """[N, K] of actions [N, A]: what a cost of acting is made of."""
        one = np.ones((len(action), 1))
        return np.concatenate([one, action] if self.spec.kind != "continuous" else [one, action, action**2, np.abs(action)], 1)

    def _explain(self) -> None:
        """Fits rewards to actions, but for the rows that fit worst; then counts all rows so far."""
        action, reward, first = (np.concatenate([rows[i] for rows in self._rows]) for i in range(3))
        action, reward = action[~first], reward[~first]
        if len(reward) < FEWEST:
            return
        features, kept = self._features(action), np.ones(len(reward), bool)
        for _ in range(3):
            weights = np.linalg.lstsq(features[kept], reward[kept], rcond=None)[0]
            error = np.abs(reward - features @ weights)
            kept = error <= np.quantile(error, 1 - OUTLIERS)
        self._weights, self._tolerance = weights, EXACT * float(np.abs(reward[kept]).max()) + 1e-9
        if (error > self._tolerance).mean() > OUTLIERS:
            self.found = ENOUGH
        rows, self._rows = self._rows, []
        for row in rows:
            if not self.is_over:
                self._count(*row)
        if self.found and 2 * self.found >= first.sum():  # half of the episodes found something without any search
            self.found = ENOUGH

    def act(
        self, starts: Bool[np.ndarray, " N"], rng: np.random.Generator
    ) -> tuple[Bool[np.ndarray, " N"], Float[np.ndarray, "N A"]]:
        """(which environments are played at random at this step, their canonical actions); `starts` where an episode begins.

        An actor that learns from novelty plays half of the episodes. Draws nothing from rng where nothing is played at random.
        """
        if self._weights is None and not self.is_over:
            self._explain()
            starts = np.ones_like(starts)  # no episode that goes on is decided yet
        if not self.is_on:
            self._random[:] = False
        else:
            starts = starts | (self._steps >= PIECE)
            self._random[starts] = rng.random(starts.sum()) * (1 + self.found + (self.intrinsic is not None)) < 1
        return self._random, self._actions.draw(self._random, starts, rng)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        weights = None if self._weights is None else self._weights.tolist()
        rows = [[x.tolist() for x in row] for row in self._rows]
        return {"found": self.found, "weights": weights, "tolerance": self._tolerance, "rows": rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.found, self._tolerance = state["found"], state["tolerance"]
        self._weights = None if state["weights"] is None else np.asarray(state["weights"])
        kinds = np.float32, float, bool, bool, int
        self._rows = [tuple(map(np.asarray, row, kinds)) for row in state["rows"]]
