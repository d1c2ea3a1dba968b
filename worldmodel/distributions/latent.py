"""Kinds of latents, and the posteriors over them that encoders and filters give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Sampling


class UndefinedRate(TypeError):
    """A KL, density or entropy was asked of a posterior that is a point."""


class Posterior(ABC):
    """A distribution over latents z with any batch shape [*N], such as q(z | observation)."""

    mean: Float[Tensor, "*N Z"]
    """The expected latent, flat."""

    @property
    def mode(self) -> Float[Tensor, "*N Z"]:
        """The most likely latent: what deterministic prediction uses."""
        return self.mean

    @abstractmethod
    def sample(self, noise: Tensor, temperature: float = 1.0) -> Float[Tensor, "*N Z"]:
        """A draw made from `noise` (see `Latent.noise`), differentiable in the parameters."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N"]:
        """ln of the normalised density or mass, in nats."""

    def log_prob_each(self, x: Float[Tensor, "*M Z"]) -> Float[Tensor, "*M K"]:
        """`log_prob` of each latent under each of K distributions [*M K], or [K] with as many ones in front as needed."""
        return self.log_prob(x.unsqueeze(-2))

    def mirror(self, z: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N Z"] | None:
        """The draw on the other side of the mean, which is as likely; None where there is none."""
        return None

    @abstractmethod
    def entropy(self) -> Float[Tensor, "*N"]:
        """In nats, summed over the latent's variables."""

    @abstractmethod
    def kl_elements(self, other: Posterior) -> Float[Tensor, "*N V"]:
        """KL(self || other) of each of the latent's V variables, in closed form, in nats; TypeError for another family."""

    def kl(self, other: Posterior) -> Float[Tensor, "*N"]:
        """`kl_elements`, summed."""
        return self.kl_elements(other).sum(-1)

    @abstractmethod
    def map(self, fn: Callable[[Tensor], Tensor]) -> Posterior:
        """The distribution with `fn` applied to each parameter tensor."""

    def detach(self) -> Posterior:
        return self.map(torch.Tensor.detach)

    def index(self, rows: Any) -> Posterior:
        return self.map(lambda x: x[rows])


class Latent(ABC):
    """A kind of latents: their size, how noise becomes a draw, how a network's output becomes a posterior."""

    kind: ClassVar[str]
    """Its name in configs."""
    deterministic: ClassVar[bool] = False
    """Whether posteriors are points: then no KL exists."""
    size: int
    """Z: numbers in a flat latent."""
    variables: int
    """V: independent variables of a posterior, between which a latent can be split."""
    axis: ClassVar[int]
    """The axis of a posterior's parameters along which its variables lie."""
    parameters: int
    """P: numbers that a network gives for one posterior."""
    continuous: ClassVar[bool]
    """Whether a latent's numbers have a scale: networks that give them then have a linear path, so that they can extrapolate."""

    @property
    def family(self) -> Latent:
        """The kind that priors are made over: this one, but Gaussian latents for points."""
        return self

    @abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Noise for one draw per element of `shape`."""

    @abstractmethod
    def distribution(self, parameters: Float[Tensor, "*N P"]) -> Posterior:
        """The posterior that a network's output parametrises."""

    @abstractmethod
    def part(self, variables: int) -> Latent:
        """The same kind with that many variables."""

    @abstractmethod
    def traverse(self, z: Float[Tensor, " Z"], latents: Float[Tensor, "N Z"], steps: int, width: float) -> Float[Tensor, "V S Z"]:
        """`z` with one of its V variables moved at a time, over the range that this variable has in `latents`."""

    def draw(
        self, distribution: Posterior, sampling: Sampling, shape: tuple[int, ...], device: torch.device | str | None
    ) -> Float[Tensor, "*N Z"]:
        """The mode, or a draw from the caller's noise, or from the generator's."""
        if sampling.mode:
            return distribution.mode
        noise = sampling.noise if sampling.noise is not None else self.noise(shape, sampling.generator, device)
        return distribution.sample(noise, sampling.temperature)
