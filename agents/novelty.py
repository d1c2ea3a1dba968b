"""An intrinsic reward for what is seldom seen or badly known, as long as real rewards tell nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.data import Dream, Obs
from worldmodel.distributions.anchored import Anchor
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ObsSpec
from worldmodel.storage.replay import Replay

BUCKETS = 2**16
"""Discrete observations that are counted apart; two in the same bucket are counted as one."""
CHUNK = 4096
"""Rows that are counted at once."""


class Novelty:
    """A reward for each imagined step: 1 on average over a dream, more where the next state is less known.

    discrete observations   1 / sqrt(1 + n), n: how often the replay has the same categories and bits
    numbers                 the deviation between the predictions of the transition's members

    Each is divided by its mean over the dream, and they are averaged where an observation has both. Only a latent that is the
    observation itself (model=anchored) has the first.

    Source: Bellemare et al. 2016 and Tang et al. 2017 (counts, hashed); Sekar et al. 2020 (Plan2Explore: disagreement in dreams).
    """

    def __init__(self, world: WorldModel, spec: ObsSpec) -> None:
        self.world, self.spec = world, spec
        self.anchor: Anchor | None = getattr(world.dynamics, "anchor", None)
        width = 0 if self.anchor is None else self.anchor.discrete
        generator = torch.Generator().manual_seed(0)  # of all runs: counts are the replay's alone
        self._weights = torch.randint(2**31, (width,), generator=generator).to(world.device)
        self._visits = torch.zeros(BUCKETS, device=world.device)

    @property
    def is_known(self) -> bool:
        """Whether anything says how new a state is."""
        return self.world.has_uncertainty or bool(len(self._weights))

    def _bucket(self, z: Float[Tensor, "*N Z"]) -> Int[Tensor, "*N"]:
        return (z[..., : len(self._weights)].long() * self._weights).sum(-1) % BUCKETS

    def count(self, obs: Obs) -> None:
        """Takes in canonical observations {key: [N, ...]}."""
        if len(self._weights):
            latent = torch.cat([obs[name] for name, (_, last) in self.anchor.keys.items() if last <= len(self._weights)], -1)
            bucket = self._bucket(latent)
            self._visits.index_add_(0, bucket, torch.ones_like(bucket, dtype=self._visits.dtype))

    def recount(self, replay: Replay) -> None:
        """Counts what a replay holds, and nothing else."""
        self._visits.zero_()
        if not len(self._weights):
            return
        for stream, length in enumerate(replay.lengths):
            for start in range(0, length, CHUNK):
                rows = replay.observations(stream, start, min(start + CHUNK, length))
                self.count(self.spec.canonical(tensors(rows, self.world.device)))

    def __call__(self, dream: Dream) -> Float[Tensor, "B H"]:
        parts = []
        if len(self._weights):
            z = self.world.dynamics.z_of(dream.feature[:, 1:])
            parts.append((1 + self._visits[self._bucket(z.detach())]).rsqrt())
        if self.world.has_uncertainty:
            parts.append(dream.uncertainty)
        return sum(part / part.detach().mean().clamp_min(torch.finfo(part.dtype).tiny) for part in parts) / len(parts)
