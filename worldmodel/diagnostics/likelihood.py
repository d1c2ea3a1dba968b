"""ln p(x) of a latent-variable model, in nats: importance-weighted bounds, and an exact model to check them.

A bound grows with the number of samples K towards ln p(x); where its effective sample size is small it is still far below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from worldmodel.distributions import Latent, Posterior

LogDensity = Callable[[Tensor], Tensor]
"""Latents [*N, Z] -> nats [*N]."""


@dataclass(frozen=True)
class Importance:
    """K draws of z ~ q(z|x) for each of N observations, and their importance weights.

    log_weight  [K, N]  ln p(x|z) + ln p(z) - ln q(z|x)
    rate        [N]     mean over the draws of ln q(z|x) - ln p(z)
    distortion  [N]     mean over the draws of -ln p(x|z)
    """

    log_weight: Float[Tensor, "K N"]
    rate: Float[Tensor, " N"]
    distortion: Float[Tensor, " N"]

    @property
    def nats(self) -> Float[Tensor, " N"]:
        """The bound of all K draws: ln of the mean weight."""
        return self.bound(self.log_weight.shape[0])

    @property
    def ess(self) -> Float[Tensor, " N"]:
        """Effective sample size: (sum w)^2 / sum w^2, from 1 to K."""
        return (2 * self.log_weight.logsumexp(0) - (2 * self.log_weight).logsumexp(0)).exp()

    def bound(self, draws: int) -> Float[Tensor, " N"]:
        """The bound of `draws` draws, averaged over the K // draws groups of them; 1 gives the ELBO.

        Source: Burda, Grosse and Salakhutdinov 2016 (IWAE), eq. 8. ValueError where there are fewer.
        """
        available, observations = self.log_weight.shape
        if not 1 <= draws <= available:
            raise ValueError(f"A bound of {draws} draws needs as many weights, and there are {available}: draw more.")
        groups = self.log_weight[: available // draws * draws].reshape(-1, draws, observations)
        return (groups.logsumexp(1) - math.log(draws)).mean(0)

    def curve(self) -> dict[int, float]:
        """The mean bound over the observations at K = 1, 10, 100, ... and at all draws."""
        available = self.log_weight.shape[0]
        steps = [10**n for n in range(len(str(available)))]
        return {k: float(self.bound(k).mean()) for k in sorted({*steps, available})}


@torch.no_grad()
def importance(
    posterior: Posterior,
    latent: Latent,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    draws: int,
    generator: torch.Generator,
    chunk: int = 50,
) -> Importance:
    """Draws z ~ posterior [N] and weighs them, `chunk` draws of all observations at a time.

    log_prior [k, N, Z] -> [k, N]: ln p(z). log_likelihood [k, N, Z] -> [k, N]: ln p(x_n|z).
    Source: Burda, Grosse and Salakhutdinov 2016 (IWAE), section 3.
    """
    observations = posterior.mean.shape[0]
    logs, rates, distortions = [], [], []
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        z = posterior.sample(latent.noise((count, observations), generator, posterior.mean.device))
        rate, likelihood = posterior.log_prob(z) - log_prior(z), log_likelihood(z)
        logs.append(likelihood - rate)
        rates.append(rate.sum(0))
        distortions.append(-likelihood.sum(0))
    return Importance(torch.cat(logs), sum(rates) / draws, sum(distortions) / draws)


def concatenated(parts: Iterable[Importance]) -> Importance:
    """The results of several sets of observations as one."""
    parts = list(parts)
    return Importance(
        torch.cat([x.log_weight for x in parts], 1), torch.cat([x.rate for x in parts]), torch.cat([x.distortion for x in parts])
    )


@dataclass(frozen=True)
class FactorModel:
    """x = mean + weight z + sigma e with z, e ~ N(0, I): a VAE whose ln p(x) is known.

    mean [D], weight [D, Z], sigma > 0.
    """

    mean: Float[Tensor, " D"]
    weight: Float[Tensor, "D Z"]
    sigma: float

    @classmethod
    def fit(cls, x: Float[Tensor, "N D"], size: int) -> FactorModel:
        """Maximum likelihood with `size` factors: probabilistic PCA. Source: Tipping and Bishop 1999, eqs. 7 and 8."""
        if not 0 < size < x.shape[1]:
            raise ValueError(f"{size} factors of {x.shape[1]} numbers leave no noise. Choose 1 to {x.shape[1] - 1}.")
        values, vectors = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
        values, vectors = values.flip(0), vectors.flip(1)
        noise = values[size:].mean()
        weight = vectors[:, :size] * (values[:size] - noise).clamp_min(0).sqrt()
        return cls(x.mean(0), weight.to(x), float(noise.sqrt()))

    def log_prob(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """ln N(x; mean, weight weight^T + sigma^2 I), in nats and in double precision."""
        mean = self.mean.double()
        marginal = LowRankMultivariateNormal(mean, self.weight.double(), torch.full_like(mean, self.sigma**2))
        return marginal.log_prob(x.double())
