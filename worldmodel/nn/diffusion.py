"""EDM diffusion (Karras et al. 2022): noise levels, preconditioning, samplers, and likelihoods from a denoiser.

Data x of mean 0 and deviation SIGMA_DATA are noised to x + sigma e with e ~ N(0, I). A denoiser D(noisy; sigma) gives the
expected data. Draws follow the probability-flow ODE from much noise to none:

    dx / dsigma = (x - D(x; sigma)) / sigma

Shapes: data [N, ...], noise levels sigma [N], one for each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA_DATA = 0.5
"""Deviation that data are scaled to (sigma_data of EDM, table 1)."""

Network = Callable[[Tensor, Tensor], Tensor]
"""F(scaled x [N, ...], ln(sigma) / 4 [N]) -> [N, ...]."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(noisy x [N, ...], sigma [N]) -> expected data [N, ...]."""


def per_row(sigma: Float[Tensor, " N"], like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], so that it multiplies rows of `like`."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class EDM:
    """Noise levels of training and sampling, and the denoiser that a network F stands for.

    In training ln sigma ~ N(log_sigma_mean, log_sigma_std^2). The defaults are those of Karras et al. 2022, table 1; DIAMOND
    (Alonso et al. 2024) samples images with sigma_max = 5.
    """

    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def training_levels(self, uniform: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Uniform numbers in (0, 1) -> sigma."""
        return torch.exp(self.log_sigma_mean + self.log_sigma_std * torch.special.ndtri(uniform))

    def grid(self, steps: int) -> Float[Tensor, " S"]:
        """[steps + 1] levels of a sampler, from `sigma_max` to exactly 0."""
        return edm_grid(steps, self.sigma_min, self.sigma_max)

    def start(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """Where a sampler starts: noise with the deviation of noisy data."""
        return noise * noisy_std(sigma)

    def denoised(self, network: Network, x: Tensor, sigma: Float[Tensor, " N"]) -> Tensor:
        """D = c_skip x + c_out F(c_in x; c_noise): input and target of F have variance 1; with F = 0 D is exact for
        N(0, SIGMA_DATA^2). Source: Karras et al. 2022, table 1 and appendix B.6.
        """
        std = per_row(noisy_std(sigma), x)
        scaled = x / std
        return SIGMA_DATA**2 / std * scaled + per_row(sigma, x) * SIGMA_DATA / std * network(scaled, sigma.log() / 4)

    def loss(self, network: Network, x: Tensor, noise: Tensor, sigma: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """||D(x + sigma noise) - x||^2 / c_out^2, summed over a row's elements: the squared error of F, alike at all levels."""
        error = self.denoised(network, x + per_row(sigma, x) * noise, sigma) - x
        weight = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
        return weight * error.square().flatten(1).sum(-1)

    def training_loss(self, network: Network, x: Tensor, generator: torch.Generator | None) -> Float[Tensor, " N"]:
        """`loss` at one drawn level and noise for each row."""
        sigma = self.training_levels(low_discrepancy(len(x), generator, x.device))
        return self.loss(network, x, torch.randn(x.shape, generator=generator, device=x.device), sigma)

    def sample(self, denoise: Denoiser, noise: Float[Tensor, "N ..."], steps: int, sampler: str = "euler") -> Tensor:
        """Data from noise of N(0, I), in some steps of a sampler (a key of SAMPLERS)."""
        sigmas = self.grid(steps).to(noise)
        return SAMPLERS[sampler](denoise, self.start(noise, sigmas[0]), sigmas)


def noisy_std(sigma: Tensor) -> Tensor:
    """Deviation of noisy data."""
    return (sigma.square() + SIGMA_DATA**2).sqrt()


def edm_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Float[Tensor, " S"]:
    """Evenly spaced in sigma^(1/rho) from `sigma_max` to `sigma_min`, then 0 (eq. 5). One step goes straight to 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def low_discrepancy(count: int, generator: torch.Generator | None, device: torch.device | str) -> Float[Tensor, " N"]:
    """Numbers in (0, 1), each uniform, that lie evenly together: multiples of the golden ratio after one random number.

    Rows at the same place of every batch still see all levels. One random number for a whole batch: Kingma et al. 2021, I.1.
    """
    first = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    steps = torch.arange(count, device=device, dtype=torch.float64) * 0.6180339887498949
    return (first + steps).frac().float().clamp(1e-6, 1 - 1e-6)


# Samplers: from `x` at the first level of a grid to the last, which is 0 ------------------------------------------------
# The last step is known by its position: reading its level from a GPU would wait for it.


def euler(denoise: Denoiser, x: Tensor, sigmas: Float[Tensor, " S"]) -> Tensor:
    """First order, one evaluation a step: x' = D + (sigma' / sigma) (x - D)."""
    for now, then in pairwise(sigmas):
        expected = denoise(x, now.expand(len(x)))
        x = expected + then / now * (x - expected)
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Float[Tensor, " S"]) -> Tensor:
    """Second order, two evaluations a step but one in the last. Source: Karras et al. 2022, alg. 1."""
    for step, (now, then) in enumerate(pairwise(sigmas), 2):
        slope = (x - denoise(x, now.expand(len(x)))) / now
        predicted = x + (then - now) * slope
        if step < len(sigmas):
            slope = (slope + (predicted - denoise(predicted, then.expand(len(x)))) / then) / 2
            predicted = x + (then - now) * slope
        x = predicted
    return x


def multistep(denoise: Denoiser, x: Tensor, sigmas: Float[Tensor, " S"]) -> Tensor:
    """Second order, one evaluation a step: D is extrapolated linearly in ln sigma from the last step.

    Source: Lu et al. 2022 (DPM-Solver++), alg. 2, whose ln sigma is minus half the log signal-to-noise ratio.
    """
    last, width = None, None
    for step, (now, then) in enumerate(pairwise(sigmas), 2):
        expected = denoise(x, now.expand(len(x)))
        predicted, onward = expected, torch.log(now / then)
        if last is not None and step < len(sigmas):
            predicted = expected + (expected - last) * onward / (2 * width)
        x = predicted + then / now * (x - predicted)
        last, width = expected, onward
    return x


SAMPLERS = {"euler": euler, "heun": heun, "multistep": multistep}


# A lower bound of ln p(x) ------------------------------------------------------------------------------------------------
# The evidence bound of continuous diffusion is an integral over noise levels of the denoiser's squared error. It is taken as a
# difference to the Gaussian N(0, SIGMA_DATA^2), whose own bound is exact: the integrand is then small and varies little.

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""Noise levels between which a likelihood evaluates the denoiser; beyond them data are taken for N(0, SIGMA_DATA^2)."""


def log_prob_bound(
    denoise: Denoiser, x: Float[Tensor, "N D"], uniform: Float[Tensor, "K N"], noise: Float[Tensor, "K N D"], weight: Tensor
) -> Float[Tensor, " N"]:
    """ln p(x) >= ln N(x; 0, SIGMA_DATA^2) + nats * E[gain], the mean estimated from K noisy samples of each row.

    nats are those of `sigma_of_information`.
    uniform  [K, N] numbers in (0, 1) that choose the noise levels
    weight   [K, N] weights of the samples, which sum to one over K
    """
    sigma, nats = sigma_of_information(uniform)
    gains = information_gain(denoise, x.expand(len(sigma), *x.shape).flatten(0, 1), sigma.flatten(), noise.flatten(0, 1))
    return gaussian_log_prob(x) + nats * (weight * gains.view(sigma.shape)).sum(0)


def gaussian_log_prob(x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """ln N(x; 0, SIGMA_DATA^2)."""
    return -0.5 * ((x / SIGMA_DATA).square() + math.log(2 * math.pi * SIGMA_DATA**2)).sum(-1)


def sigma_of_information(uniform: Float[Tensor, "*N"]) -> tuple[Float[Tensor, "*N"], float]:
    """(sigma that hides this share of a Gaussian number's information, the nats between SIGMA_MIN and SIGMA_MAX).

    Seen through noise sigma, a number of N(0, SIGMA_DATA^2) keeps ln(1 + SIGMA_DATA^2 / sigma^2) / 2 nats. Integrated over
    these nats, all levels weigh the same in the bound.
    """
    upper, lower = (0.5 * math.log1p((SIGMA_DATA / sigma) ** 2) for sigma in (SIGMA_MIN, SIGMA_MAX))
    nats = upper + uniform * (lower - upper)
    return SIGMA_DATA / torch.expm1(2 * nats).sqrt(), upper - lower


def information_gain(
    denoise: Denoiser, x: Float[Tensor, "N D"], sigma: Float[Tensor, " N"], noise: Float[Tensor, "N D"]
) -> Float[Tensor, " N"]:
    """The integrand: how much better than the denoiser of N(0, SIGMA_DATA^2) D recovers x, per nat of information.

    It is 0 for an untrained EDM network.
    Source: Kingma et al. 2021 (VDM), eq. 15 and 19; as a difference to a Gaussian: Kong et al. 2023, eq. 9.
    """
    s = per_row(sigma, x)
    noisy, total = x + s * noise, s.square() + SIGMA_DATA**2
    gaussian_error, error = x - noisy * SIGMA_DATA**2 / total, x - denoise(noisy, sigma)
    posterior_variance = (s * SIGMA_DATA).square() / total  # Var(x | noisy) where x ~ N(0, SIGMA_DATA^2)
    return ((gaussian_error.square() - error.square()) / posterior_variance).flatten(1).sum(-1)


def fixed_samples(levels: int, size: int) -> tuple[Float[Tensor, " K"], Float[Tensor, "K D"], Float[Tensor, " K"]]:
    """(uniform, noise, weight) of K = 4 * size * levels samples for `log_prob_bound`, the same at each call.

    At each of the evenly spaced levels the noise points both ways along `size` orthogonal axes, with the two lengths and weights
    of a Gauss quadrature: polynomials of degree three in the noise are averaged exactly. As many independent draws, the same for
    all rows, would leave an error of several tenths of a nat.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(levels, size, size, generator=generator))[0]
    a = size / 2 + 1  # squared lengths are chi-squared: these are the zeros of the second generalised Laguerre polynomial
    lengths, shares = zip(*[(math.sqrt(2 * (a + sign * math.sqrt(a))), 0.5 - sign * 0.5 / math.sqrt(a)) for sign in (1, -1)])
    noise = torch.stack([sign * length * axes for length in lengths for sign in (1, -1)], 1)  # [levels, 4, size, size]
    weight = torch.tensor(shares).repeat_interleave(2).view(1, 4, 1).expand(levels, 4, size) / (2 * size * levels)
    uniform = ((torch.arange(levels) + 0.5) / levels).repeat_interleave(4 * size)
    return uniform, noise.flatten(0, 2), weight.flatten()


# The exact ln p(x) of the ODE --------------------------------------------------------------------------------------------


def ode_log_prob(denoise: Denoiser, x: Float[Tensor, "N D"], steps: int) -> Float[Tensor, " N"]:
    """ln p(x) of the distribution that the ODE draws from, solved without error, by the change of variables along it.

    In u = x / noisy_std and the angle a = arctan(sigma / SIGMA_DATA) the ODE is du / da = -F, with D = c_skip x + c_out F, and
    d ln p(u) = trace(dF / du) da. The trace is exact: D backward passes for each evaluation. Classical Runge-Kutta steps, on
    EDM's grid, which gives structures of any size their share of the steps.
    Source: Song et al. 2021, eq. 39; the angle: Lu and Song 2025 (TrigFlow), section 3.
    """
    angles = torch.atan(edm_grid(steps + 1, SIGMA_MIN, SIGMA_MAX)[:-1].double().flip(0) / SIGMA_DATA).to(x)
    u, log_det = x / math.sqrt(SIGMA_MIN**2 + SIGMA_DATA**2), x.new_zeros(len(x))
    for now, then in pairwise(angles):
        width = then - now
        slopes = []
        for share, before in ((0.0, None), (0.5, 0), (0.5, 1), (1.0, 2)):
            at = u if before is None else u + share * width * slopes[before][0]
            slopes.append(_velocity(denoise, at, now + share * width))
        for weight, (speed, divergence) in zip((1, 2, 2, 1), slopes, strict=True):
            u, log_det = u + weight / 6 * width * speed, log_det + weight / 6 * width * divergence
    normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
    return normal + log_det - x.shape[-1] * 0.5 * math.log(SIGMA_MIN**2 + SIGMA_DATA**2)


def _velocity(denoise: Denoiser, u: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(du / da [N, D], its divergence [N]) at an angle."""
    sigma = SIGMA_DATA * torch.tan(angle)
    std = noisy_std(sigma)
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        x = u * std
        speed = (SIGMA_DATA**2 / std.square() * x - denoise(x, sigma.expand(len(u)))) * std / (sigma * SIGMA_DATA)
        diagonal = [torch.autograd.grad(speed[:, i].sum(), u, retain_graph=True)[0][:, i] for i in range(u.shape[1])]
    return speed.detach(), torch.stack(diagonal).sum(0)
