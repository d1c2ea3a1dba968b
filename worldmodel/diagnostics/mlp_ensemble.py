"""An ensemble of perceptrons that predict the change of the observation: the model of PETS, which others are compared with.

Five perceptrons with three hidden layers see the standardised observation (or the last few: `frames`) and the action, and predict
the standardised change of the observation. They are trained by the squared error, all on all rows but with first weights and
batches of their own, by AdamW with a falling learning rate; of each those weights count that predict a held-out tenth of the
rows best. A roll-out follows each member along its own predictions, as PETS' "TS-infinity" does; their mean is the prediction.
What is predicted stays within three times the range of the rows, about their middle: without that a few roll-outs of fifty steps
run away, and their errors are hundreds of deviations.

Source: Chua et al. 2018 (PETS), without its learned variances, which cost accuracy where the world is determined.

`MlpWorld` shows it through those verbs of `worldmodel.model.WorldModel` that `diagnostics.rollouts` calls, so that windows,
contexts, starts and units are those of every other model. It knows neither reward nor end.
"""

from __future__ import annotations

import copy
import math
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.data import Batch, Dream, Episodes, Sampling, State
from worldmodel.encoders import VectorScaling
from worldmodel.spaces import ActionSpec, ObsSpec

MEMBERS, LAYERS = 5, 3
LR, LAST_LR, WEIGHT_DECAY = 1e-3, 1e-5, 1e-5
UPDATES, CHECK_EVERY = 4000, 100
"""Updates in all, and between two looks at the held-out rows."""
HELD_OUT_SHARE, BLOCK = 0.1, 25
"""Of the rows, in blocks of so many in a row: the neighbours of a single one would give it away."""


class Perceptrons(nn.Module):
    """MEMBERS perceptrons side by side: [E, N, inputs] -> [E, N, outputs]."""

    def __init__(self, inputs: int, units: int, outputs: int):
        super().__init__()
        sizes = [inputs, *[units] * LAYERS, outputs]
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(torch.randn(MEMBERS, i, o) / math.sqrt(i) for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(MEMBERS, 1, o) for _, o in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = nn.functional.silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])


class MlpWorld:
    """The peer, fitted on whole episodes of one vector.

    frames  how many observations it sees, the last ones; before an episode's first that one stands
    units   width of the perceptrons; PETS has 200
    batch   rows of each member in an update
    Its feature is these observations, one after the other, in the environment's units.
    """

    decoder, has_uncertainty = True, False  # it shows observations, and no disagreement
    device = torch.device("cpu")

    def __init__(
        self,
        obs: ObsSpec,
        action: ActionSpec,
        episodes: Episodes,
        seed: int,
        *,
        frames: int = 1,
        units: int = 128,
        batch: int = 128,
        updates: int = UPDATES,
    ):
        (self.name,), self.obs, self.frames = obs.keys, obs, frames
        since = time.perf_counter()
        torch.manual_seed(seed)
        rows, known = episodes.rows, obs.canonical(episodes.rows.obs)
        self.scaling = VectorScaling("standardise", obs)
        self.scaling.update({self.name: known[self.name][0]})
        x = known[self.name][0].double()
        self.size, goes_on = x.shape[-1], ~rows.is_last[0]
        stacked, change = self._stacks(x, rows.is_first[0]), torch.roll(x, -1, 0) - x
        inputs = torch.cat([stacked, rows.action[0]], -1)[goes_on]
        low, high = x.amin(0), x.amax(0)
        self.bounds = 2 * low - high, 2 * high - low
        self.moments = _moments(inputs), _moments(change[goes_on])
        self.net = Perceptrons(inputs.shape[-1], units, self.size)
        self.updates = self._fit(_scaled(inputs, self.moments[0]), _scaled(change[goes_on], self.moments[1]), batch, updates)
        self.seconds = time.perf_counter() - since

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def _stacks(self, x: Tensor, first: Tensor) -> Tensor:
        """[R, D] -> [R, frames * D], the oldest in front."""
        row = torch.arange(len(x))
        opens = torch.where(first, row, 0).cummax(0).values
        return torch.cat([x[torch.maximum(row - back, opens)] for back in reversed(range(self.frames))], -1)

    def _fit(self, inputs: Tensor, targets: Tensor, batch: int, updates: int) -> list[int]:
        """Trains the members; gives the updates after which each was best."""
        blocks = torch.arange(len(inputs)).split(BLOCK)
        order = torch.randperm(len(blocks)).tolist()
        count = max(1, round(HELD_OUT_SHARE * len(blocks)))
        held, used = torch.cat([blocks[i] for i in order[:count]]), torch.cat([blocks[i] for i in order[count:]])
        optimizer = torch.optim.AdamW(self.net.parameters(), LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, LAST_LR)
        lowest, at, best = torch.full((MEMBERS,), math.inf), [0] * MEMBERS, copy.deepcopy(self.net.state_dict())
        for update in range(1, updates + 1):
            pick = used[torch.randint(len(used), (MEMBERS, batch))]
            loss = (self.net(inputs[pick]) - targets[pick]).square().mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if update % CHECK_EVERY and update != updates:
                continue
            with torch.no_grad():
                errors = (self.net(inputs[held].expand(MEMBERS, -1, -1)) - targets[held]).square().mean((1, 2))
            for member in (errors < lowest).nonzero().flatten().tolist():
                lowest[member], at[member] = errors[member], update
                for name, value in self.net.state_dict().items():
                    best[name][member] = value[member]
        self.net.load_state_dict(best)
        return at

    # The verbs of a world model ---------------------------------------------------------------------------------------

    def eval(self) -> MlpWorld:  # torch's name for the mode in which models are measured; nothing is evaluated as code
        return self

    def preprocess(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.obs.canonical(rows)

    def trace(self, batch: Batch, state: State | None, sampling: Sampling) -> Any:
        """Filters a window: `feature` [B, T, F], and `last`, the state after it."""
        x, first = batch.obs[self.name].double(), batch.is_first.clone()
        first[:, 0] = True
        feature = torch.stack([self._stacks(*row) for row in zip(x, first)])
        return SimpleNamespace(feature=feature, last=State({"frames": feature[:, -1]}))

    def imagine(self, start: State, policy: Any, horizon: int, sampling: Sampling) -> Dream:
        """Roll-outs [B, horizon], B a multiple of MEMBERS: row i follows member i % MEMBERS."""
        frames, columns, actions = start["frames"], [start["frames"]], []
        for step in range(horizon):
            actions.append(policy(frames, step))
            inputs = _scaled(torch.cat([frames, actions[-1]], -1), self.moments[0])
            change = self.net(inputs.unflatten(0, (-1, MEMBERS)).transpose(0, 1)).transpose(0, 1).flatten(0, 1)
            newest = frames[:, -self.size :] + _unscaled(change.double(), self.moments[1])
            frames = torch.cat([frames, newest.clamp(*self.bounds)], -1)[:, self.size :]
            columns.append(frames)
        nothing = torch.zeros(len(frames), horizon)
        return Dream(torch.stack(actions, 1), nothing, nothing, nothing, torch.stack(columns, 1), State({"frames": frames}))

    def decode(self, feature: Tensor) -> dict[str, Tensor]:
        return {self.name: feature[..., -self.size :]}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) [D]; a constant number has deviation 1."""
    deviation = x.std(0)
    return x.mean(0), torch.where(deviation > 1e-8 * (1 + x.abs().amax(0)), deviation, 1.0)


def _scaled(x: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    return ((x - moments[0]) / moments[1]).float()


def _unscaled(x: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    return x * moments[1] + moments[0]
