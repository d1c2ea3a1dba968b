"""Forms that see latents in the units of a Gaussian in front, since networks expect numbers of mean 0 and deviation 1."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Sampling
from worldmodel.distributions.base import ConditionalDistribution
from worldmodel.distributions.gaussian import GaussianPosterior
from worldmodel.distributions.latent import Latent
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import SkipMLP


class Whitened(ConditionalDistribution):
    """x -> (x - mean) / std, by a `frame` or by `moments`, whichever the form has built:

    frame    network: context -> mean(h), std(h), since a transition is far narrower than all latents together
    moments  running mean and deviation of the latents, kept with the weights; they stand still in eval mode
    """

    MIN_STD = 1e-3
    """Of running statistics."""

    def __init__(self, latent: Latent, context_dim: int):
        super().__init__(latent, context_dim)
        self.frame: SkipMLP | None = None
        self.moments: RunningMoments | None = None

    def whitening(self, context: Tensor | None) -> GaussianPosterior:
        """The Gaussian in front, for each row of the context; of running statistics its batch shape is [1]."""
        if self.frame is not None:
            return self.latent.distribution(self.frame(context))
        return GaussianPosterior(self.moments.mean.float().unsqueeze(0), self.moments.deviation(self.MIN_STD).unsqueeze(0))

    def noise(self, shape: tuple[int, ...], sampling: Sampling) -> Float[Tensor, "*N D"]:
        """Noise of `shape` for draws: none for the mode, the caller's, or the generator's; at the temperature of `sampling`."""
        device = next(self.parameters()).device
        if sampling.mode:
            return torch.zeros(shape, device=device)
        noise = sampling.noise
        if noise is None:
            noise = torch.randn(shape, generator=sampling.generator, device=device)
        return noise.expand(shape) * sampling.temperature

    def update_moments(self, x: Float[Tensor, "*N D"]) -> None:
        """Takes latents into the running statistics, in training only and not where weights are frozen."""
        x = x.detach().flatten(0, -2)
        if self.frame is None and self.moments is not None and self.training and len(x) > 1:
            if next(self.parameters()).requires_grad:
                self.moments.update(x)

    def prepare_fit(self, latents: Float[Tensor, "N D"]) -> None:
        if self.frame is None and self.moments is not None:
            self.moments.reset_to(latents)
