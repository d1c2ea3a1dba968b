"""The mathematics of diffusion and of flow matching, as free functions of one signature.

Both take data x to noise by a mixture whose *level* falls to 0 when noise becomes data again:

    edm   x_s = x + s e              s in (0, most)      Karras et al. 2022
    cfm   x_t = (1 - t) x + t e      t in (0, 1)         Lipman et al. 2023; Tong et al. 2024 (independent coupling)

and both give from a network F the expected data D(x_level; level). Where D is exact, the paths of

    dx / dlevel = (x - D(x; level)) / level

carry noise to data, in either frame; so samplers and likelihoods are written once. Levels are [N], data
[N, ...]; data are assumed to have mean 0 and deviation `DATA`.
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
"""F(scaled x [N, ...], condition on the level [N]) -> [N, ...]."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x [N, ...], level [N]) -> expected data [N, ...]."""


def per_row(level: Float[Tensor, " N"], like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], so that it multiplies rows of `like`."""
    return level.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class ProbabilityPath:
    """One way from data to noise.

    keep       level -> share of the data that is left in the mixture
    at         noise beside one unit of data, s = level / keep -> level: by s the levels of all paths can be compared
    condition  level -> the number by which the network is told of it
    weight     level -> factor of ||D - x||^2 in the loss
    drawn      uniform numbers in (0, 1) -> levels as training draws them
    grid       steps -> levels [steps + 1] of a sampler, from the most noise to exactly 0
    """

    keep: Callable[[Tensor], Tensor]
    at: Callable[[Tensor], Tensor]
    condition: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    drawn: Callable[[Tensor], Tensor]
    grid: Callable[[int], Tensor]

    def mix(self, x: Tensor, noise: Tensor, level: Float[Tensor, " N"]) -> Tensor:
        return per_row(self.keep(level), x) * x + per_row(level, x) * noise

    def denoised(self, network: Network, x: Tensor, level: Float[Tensor, " N"]) -> Tensor:
        """D = c_skip x + c_out F(c_in x; condition): with F = 0 exact for N(0, DATA^2); F has input and target of variance 1.

        Source: Karras et al. 2022, table 1 and appendix B.6, here for mixtures that keep less than all of the data.
        """
        keep, deviation = per_row(self.keep(level), x), per_row(self.deviation(level), x)
        scaled = x / deviation
        share = keep * SIGMA_DATA**2 / deviation
        return share * scaled + per_row(level, x) * SIGMA_DATA / deviation * network(scaled, self.condition(level))

    def deviation(self, level: Tensor) -> Tensor:
        """Of the mixture."""
        return (level.square() + (self.keep(level) * SIGMA_DATA).square()).sqrt()

    def loss(self, network: Network, x: Tensor, noise: Tensor, level: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """weight ||D(mixture) - x||^2, summed over the elements of each row."""
        error = self.denoised(network, self.mix(x, noise, level), level) - x
        return self.weight(level) * error.square().flatten(1).sum(-1)

    def start(self, noise: Tensor, level: Tensor) -> Tensor:
        """What the first level of a grid looks like: noise with the deviation of the mixture."""
        return noise * self.deviation(level)


def edm(
    mean: float = -1.2, std: float = 1.2, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> ProbabilityPath:
    """ln s ~ N(mean, std^2) in training, weighed so that F has as much to learn at all levels; a grid even in s^(1/rho).

    The defaults are those of Karras et al. 2022, table 1; DIAMOND (Alonso et al. 2024) samples images with most = 5.
    """
    return ProbabilityPath(
        keep=torch.ones_like,
        at=lambda s: s,
        condition=lambda s: s.log() / 4,
        weight=lambda s: (s.square() + SIGMA_DATA**2) / (s * SIGMA_DATA).square(),
        drawn=lambda uniform: torch.exp(mean + std * torch.special.ndtri(uniform)),
        grid=lambda steps: edm_grid(steps, sigma_min, sigma_max, rho),
    )


def edm_grid(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Float[Tensor, " S"]:
    """Evenly spaced in s^(1/rho) from `most` to `least` (eq. 5), then 0. One step goes from `most` to 0 at once."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).float()


def cfm(sigma_max: float = 0.999) -> ProbabilityPath:
    """Levels even in training and in sampling; the loss is the squared error of the velocity v = (x_t - D) / t against e - x.

    The network gives what v differs by from its form for Gaussian data. `most` stands for pure noise: at 1 the mixture says
    nothing of the data. Source: Lipman et al. 2023, eq. 9; Tong et al. 2024, section 3.2, without their sigma.
    """
    return ProbabilityPath(
        keep=lambda t: 1 - t,
        at=lambda s: s / (1 + s),
        condition=lambda t: t,
        weight=lambda t: t.square().reciprocal(),
        drawn=lambda uniform: uniform.clamp(1e-3, sigma_max),
        grid=lambda steps: torch.linspace(sigma_max, 0, steps + 1),
    )


def low_discrepancy(count: int, generator: torch.Generator | None, device: torch.device | str) -> Float[Tensor, " N"]:
    """Numbers in (0, 1), each uniform, that lie evenly together: multiples of the golden ratio behind one random number.

    Rows at the same place of every batch still see all levels. Source of one number for a batch: Kingma et al. 2021, I.1.
    """
    first = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    steps = torch.arange(count, device=device, dtype=torch.float64) * 0.6180339887498949
    return (first + steps).frac().float().clamp(1e-6, 1 - 1e-6)


# Samplers: from `x` at the first level to the last, which is 0 ----------------------------------------------------------
# Only the last step leads to 0, which its place says: to ask the level would wait for the device at every step.


def euler(denoise: Denoiser, x: Tensor, levels: Float[Tensor, " S"]) -> Tensor:
    """First order, one evaluation a step: x' = D + (level' / level) (x - D)."""
    for now, then in pairwise(levels):
        expected = denoise(x, now.expand(len(x)))
        x = expected + then / now * (x - expected)
    return x


def heun(denoise: Denoiser, x: Tensor, levels: Float[Tensor, " S"]) -> Tensor:
    """Second order, two evaluations a step but one in the last, where the level is 0. Source: Karras et al. 2022, alg. 1."""
    for step, (now, then) in enumerate(pairwise(levels), 2):
        slope = (x - denoise(x, now.expand(len(x)))) / now
        predicted = x + (then - now) * slope
        if step < len(levels):
            slope = (slope + (predicted - denoise(predicted, then.expand(len(x)))) / then) / 2
            predicted = x + (then - now) * slope
        x = predicted
    return x


def multistep(denoise: Denoiser, x: Tensor, levels: Float[Tensor, " S"]) -> Tensor:
    """Second order with one evaluation a step: D goes on as it changed, linearly in ln(level), over the last step.

    Source: Lu et al. 2022 (DPM-Solver++), alg. 2, whose ln(level) is minus half the log signal-to-noise ratio.
    """
    last, width = None, None
    for step, (now, then) in enumerate(pairwise(levels), 2):
        expected = denoise(x, now.expand(len(x)))
        predicted, onward = expected, torch.log(now / then)
        if last is not None and step < len(levels):
            predicted = expected + (expected - last) * onward / (2 * width)
        x = predicted + then / now * (x - predicted)
        last, width = expected, onward
    return x


SAMPLERS = {"euler": euler, "heun": heun, "multistep": multistep}


def gaussian_variance(s: Tensor) -> Tensor:
    """Var(x | x + s e) of data N(0, DATA^2): c_out^2 of EDM."""
    return (s * SIGMA_DATA).square() / (s.square() + SIGMA_DATA**2)


# Likelihood -------------------------------------------------------------------------------------------------------------


def in_sigmas(path: ProbabilityPath, network: Network) -> Denoiser:
    """D as a function of x + s e and s, whatever the path."""

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        level = path.at(s)
        return path.denoised(network, per_row(path.keep(level), x) * x, level)

    return denoise


SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""Noise between which a likelihood looks at the network; beyond them data are taken for N(0, DATA^2)."""


def sigma_of_information(uniform: Float[Tensor, "*N"]) -> tuple[Float[Tensor, "*N"], float]:
    """(noise s at which that share of a Gaussian number's information is hidden, all of that information in nats).

    Of N(0, DATA^2) a view through noise s tells ln(1 + DATA^2 / s^2) / 2 nats. Levels even in this measure make every
    term of `bound` weigh the same.
    """
    information = [0.5 * math.log1p((SIGMA_DATA / s) ** 2) for s in (SIGMA_MIN, SIGMA_MAX)]
    nats = information[0] + uniform * (information[1] - information[0])
    return SIGMA_DATA / torch.expm1(2 * nats).sqrt(), information[0] - information[1]


def fixed_samples(levels: int, size: int) -> tuple[Float[Tensor, " K"], Float[Tensor, "K D"], Float[Tensor, " K"]]:
    """K = 4 size levels looks for `bound`, always the same: (uniform numbers in (0, 1), noise, weights that sum to one).

    At each of the evenly spaced levels the noise points up and down all axes of a turned cross, with the two lengths and
    weights of a Gauss quadrature: whatever is of third degree in the noise is averaged exactly. As many independent draws,
    the same for all rows, would leave an error of several tenths of a nat.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(levels, size, size, generator=generator))[0]
    a = size / 2 + 1  # squared lengths are chi-squared: generalised Laguerre polynomials, of which this is the second's zeros
    lengths, shares = zip(*[(math.sqrt(2 * (a + sign * math.sqrt(a))), 0.5 - sign * 0.5 / math.sqrt(a)) for sign in (1, -1)])
    noise = torch.stack([sign * length * axes for length in lengths for sign in (1, -1)], 1)  # [levels, 4, size, size]
    weights = torch.tensor(shares).repeat_interleave(2).view(1, 4, 1).expand(levels, 4, size) / (2 * size * levels)
    uniform = ((torch.arange(levels) + 0.5) / levels).repeat_interleave(4 * size)
    return uniform, noise.flatten(0, 2), weights.flatten()


def bound(denoise: Denoiser, x: Float[Tensor, "N D"], s: Float[Tensor, " N"], noise: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """One noisy look at how much better than N(0, DATA^2) the denoiser explains x, in nats per nat of information.

        ln p(x) >= ln N(x; 0, DATA^2) + E_s,e [range * bound],   s and range from `informative`

    This is the evidence bound of the continuous diffusion, minus what it is for Gaussian data, where it holds with
    equality; the difference has little variance, and is 0 for an untrained EDM network.
    Source: Kingma et al. 2021 (VDM), eq. 15 and 19; as a difference to a Gaussian: Kong et al. 2023, eq. 9.
    """
    ratio = per_row(s, x)
    noisy = x + ratio * noise
    total = ratio.square() + SIGMA_DATA**2
    plain, own = x - noisy * SIGMA_DATA**2 / total, x - denoise(noisy, s)
    return ((plain.square() - own.square()) / gaussian_variance(ratio)).flatten(1).sum(-1)


def gaussian_log_prob(x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """ln N(x; 0, DATA^2)."""
    return -0.5 * ((x / SIGMA_DATA).square() + math.log(2 * math.pi * SIGMA_DATA**2)).sum(-1)


def ode_log_prob(denoise: Denoiser, x: Float[Tensor, "N D"], steps: int) -> Float[Tensor, " N"]:
    """ln p(x) of the law whose draws the sampler's ODE would give without error, with the exact trace; D backward passes a step.

    In u = x / sqrt(s^2 + DATA^2) and the angle a = arctan(s / DATA) the ODE is du / da = -F, F = (D - c_skip x) / c_out,
    and stands still for Gaussian data: d ln p(u) = trace(dF / du) da. Classical Runge-Kutta steps, on EDM's grid.
    Source: Song et al. 2021, eq. 39; the angle: Lu and Song 2025 (TrigFlow), section 3.
    """
    # From the grid of s^(1/7): structures of any size get their share of the steps.
    angles = torch.atan(edm_grid(steps + 1, SIGMA_MIN, SIGMA_MAX, 7.0)[:-1].double().flip(0) / SIGMA_DATA).to(x)
    u, log_det = x / math.sqrt(SIGMA_MIN**2 + SIGMA_DATA**2), x.new_zeros(len(x))
    for now, then in pairwise(angles):
        width = then - now
        slopes = []
        for share, before in ((0.0, None), (0.5, 0), (0.5, 1), (1.0, 2)):
            at = u if before is None else u + share * width * slopes[before][0]
            slopes.append(_velocity(denoise, at, now + share * width))
        for weight, (speed, spread) in zip((1, 2, 2, 1), slopes, strict=True):
            u, log_det = u + weight / 6 * width * speed, log_det + weight / 6 * width * spread
    normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
    return normal + log_det - x.shape[-1] * 0.5 * math.log(SIGMA_MIN**2 + SIGMA_DATA**2)


def _velocity(denoise: Denoiser, u: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(du / da, its divergence) at an angle."""
    s = SIGMA_DATA * torch.tan(angle)
    root = (s.square() + SIGMA_DATA**2).sqrt()
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        x = u * root
        speed = (SIGMA_DATA**2 / root.square() * x - denoise(x, s.expand(len(u)))) * root / (s * SIGMA_DATA)
        columns = [torch.autograd.grad(speed[:, i].sum(), u, retain_graph=True)[0][:, i] for i in range(u.shape[1])]
    return speed.detach(), torch.stack(columns).sum(0)
