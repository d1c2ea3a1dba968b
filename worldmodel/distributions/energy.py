"""Energy-based priors: an exact base distribution, tilted by a learned function f of the latent.

    p(z | c) = base(z | c) exp(f(z, c)) / Z(c)

It starts as its base, with f = 0. base = N(0, I) is the latent energy-based prior of Pang et al. 2020, a trained base the prior
of NCP-VAE (Aneja et al. 2021), a Gaussian transition an energy-based dynamics.

| trainer | f learns | from |
|---|---|---|
| `nce` | to tell latents from draws of the base; then Z is near 1 | Gutmann and Hyvarinen 2010, eq. 8 |
| `cd`  | f(latent) up, f(end of a chain that starts there) down | Hinton 2002; Du and Mordatch 2019 (magnitude term) |
| `pcd` | the same with chains that persist, but for a share that restarts | Tieleman 2008 |
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from worldmodel.config import Frozen, Part
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import ConditionalDistribution, PosteriorSource
from worldmodel.distributions.gaussian import GaussianConfig, GaussianPosterior
from worldmodel.distributions.langevin import LogDensity, gradient_ascent, langevin
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.distributions.whitening import Whitened
from worldmodel.errors import ConfigError, NumericsError
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import MLP
from worldmodel.registry import build, part, register

TEMPERATURES = 100
"""Steps of annealed importance sampling from the base to the tilted distribution."""


class EnergyConfig(Frozen):
    """The base, the network f, how f learns and how draws are made."""

    kind: Literal["energy"] = "energy"
    base: Annotated[Any, Part("distribution")] = Field(
        GaussianConfig(), description="the exact distribution that f tilts; it learns by its own likelihood"
    )
    units: int = Field(128, ge=1, description="width of f")
    layers: int = Field(2, ge=1, description="hidden layers of f")
    trainer: Literal["nce", "cd", "pcd"] = Field(
        "nce", description="noise-contrastive estimation, contrastive divergence, or the persistent one (without a context)"
    )
    negatives: int = Field(8, ge=1, description="nce: draws of the base for each latent")
    context_negatives: int = Field(4, ge=0, description="nce with a context: other rows' contexts as negatives for each latent")
    magnitude: float = Field(0.001, ge=0, description="weight of f squared, at latents and at chains: keeps energies near 0")
    buffer: int = Field(1024, ge=1, description="pcd: chains that are kept, and saved with the weights")
    reinit: float = Field(0.05, ge=0, le=1, description="pcd: share of the chains that restart at a draw of the base")
    sampler: Literal["langevin", "resampling"] = Field(
        "resampling", description="Langevin chains from draws of the base, or one of `candidates` such draws by its weight"
    )
    candidates: int = Field(32, ge=2, description="resampling: draws of the base of which one is taken")
    steps: int = Field(20, ge=1, description="Langevin steps of a chain: in sampling, in cd and pcd, and uphill to the mode")
    step: float = Field(0.5, gt=0, description="size of a Langevin step, in deviations of the base")
    clip: float = Field(10.0, gt=0, description="largest gradient in a step, per deviation of the base")
    normaliser: int = Field(32, ge=2, description="draws of the base that estimate ln Z in a rate")
    max_gap: float = Field(100.0, gt=0, description="cd, pcd: |mean f(latents) - mean f(chains)| at which training has diverged")
    max_displacement: float = Field(
        20.0, gt=0, description="cd: the same for the mean distance of chains, in deviations of the base"
    )

    @model_validator(mode="after")
    def _base_is_exact(self) -> EnergyConfig:
        base_class = part("distribution", self.base.kind)
        if base_class.density != "exact" or not base_class.latent_kinds & Energy.latent_kinds:
            raise ValueError(
                f"base={self.base.kind} is no exact distribution over gaussian latents: use one that is, such as base=gaussian."
            )
        if base_class.of_posteriors:
            raise ValueError(
                f"base={self.base.kind} is made of the encoder's posteriors, which an energy's base, trained by latents alone, "
                "must not reach: use base=mixture, or the form itself without an energy."
            )
        return self


@register("distribution", "energy", EnergyConfig)
class Energy(Whitened):
    """Residual energy model. `log_prob` is ln base + f, that is ln p + ln Z(c); `log_z` estimates ln Z(c).

    f reads whitened latents: by the base given the context where that has a closed form, else by running statistics. Chains are
    Metropolis-adjusted, so that longer ones only come nearer to the distribution.
    """

    density = "unnormalised"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    fits_in_training = True
    MEMORY = 0.99
    """The share of the running mean and deviation that stays at each update."""

    def __init__(self, config: EnergyConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.check(config, latent, "transition" if context_dim else "initial", "energy")
        self.config = config
        self.base: ConditionalDistribution = build("distribution", config.base, latent, context_dim, source)
        self.net = MLP(latent.size + context_dim, config.units, config.layers, 1, scale=0, norm=False)
        if not self.base.closed_form:
            self.moments = RunningMoments(latent.size, self.MEMORY)
        if config.trainer == "pcd":
            self.register_buffer("chains", torch.randn(config.buffer, latent.size))

    @classmethod
    def check(cls, config: Any, latent: Latent, slot: str, where: str) -> None:
        super().check(config, latent, slot, where)
        if config.trainer == "pcd" and slot == "transition":
            raise ConfigError(
                f"{where}.trainer=pcd keeps chains of one distribution, but here each context has its own, of which old chains are "
                "no draws. Use trainer=nce or trainer=cd in the transition; pcd is for the initial and marginal slots."
            )
        inner = "transition" if slot == "transition" else "initial"
        part("distribution", config.base.kind).check(config.base, latent, inner, f"{where}.base")

    # The density ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def whitening(self, context: Tensor | None) -> GaussianPosterior:
        return self.base.given(context) if self.moments is None else super().whitening(context)

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        return self.base.log_prob(x, context) + self.tilt(x, context)

    def tilt(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        """f(x, context), in nats."""
        frame = self.whitening(context)
        whitened = (x - frame.mean) / frame.std
        if context is not None:
            whitened = torch.cat([whitened, context.expand(*whitened.shape[:-1], -1)], -1)
        return self.net(whitened).squeeze(-1)

    @torch.no_grad()
    def log_z(
        self, context: Float[Tensor, "N C"] | None, count: int = 1000, sampling: Sampling | None = None, *, ais: bool = False
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(ln Z(context) in nats, effective sample size) from `count` weighted draws of the base.

        The estimate is low on average, so that likelihoods made with it flatter; the more so the smaller the effective sample
        size. Below a tenth of `count` use `ais`: annealed importance sampling, in which each draw goes from the base to the
        tilted distribution by 100 Langevin steps. Without `sampling` the noise is fixed. Source: Neal 2001.
        """
        sampling = Sampling(generator=self._fixed_generator()) if sampling is None else Sampling(generator=sampling.generator)
        z = self.base.sample(context, count, sampling)
        if not ais:
            weight = self.tilt(z, context)
        else:
            weight = z.new_zeros(z.shape[:-1])
            for step in range(1, TEMPERATURES + 1):
                weight = weight + self.tilt(z, context) / TEMPERATURES
                z = self._langevin(z, context, 1, sampling, step / TEMPERATURES)
        total = weight.logsumexp(0)
        return total - math.log(count), (2 * total - (2 * weight).logsumexp(0)).exp()

    def forward(
        self, posterior: Posterior, z: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, **options: Any
    ) -> Float[Tensor, "*N"]:
        """With an estimate of ln Z from `normaliser` draws, which has no gradient: f learns by its own loss."""
        log_z, _ = self.log_z(None if context is None else context.flatten(0, -2), self.config.normaliser, sampling)
        return super().forward(posterior, z, context) + (log_z if context is None else log_z.view(context.shape[:-1]))

    # Drawing --------------------------------------------------------------------------------------------------------

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """Draws with the gradient of the base's draws. Chains have `sampling.steps` steps, by default the config's."""
        sampling = replace(sampling or Sampling(), noise=None)
        steps = sampling.steps or self.config.steps
        if sampling.mode:
            start = self.base.sample(context, 1, sampling)
            scale = self.config.step * self.whitening(context).std
            top = gradient_ascent(self._level(context), start.detach(), scale, steps, self.config.clip)
            return (start + (top - start).detach()).expand(count, -1, -1)
        if self.config.sampler == "langevin":
            start = self.base.sample(context, count, sampling)
            return start + (self._langevin(start, context, steps, sampling) - start).detach()
        pool = self.base.sample(context, count * self.config.candidates, sampling).unflatten(0, (-1, count))  # [M, K, N, D]
        with torch.no_grad():
            share = (self.tilt(pool, context) / sampling.temperature**2).softmax(0).cumsum(0)
            uniform = torch.rand(share.shape[1:], generator=sampling.generator, device=share.device)
            chosen = (share[:-1] < uniform).sum(0)
        return pool.gather(0, chosen[None, ..., None].expand(1, *pool.shape[1:]))[0]

    def _langevin(
        self, z: Float[Tensor, "*N D"], context: Tensor | None, steps: int, sampling: Sampling, weight: float = 1.0
    ) -> Float[Tensor, "*N D"]:
        """Langevin steps on base exp(weight f) at the temperature of `sampling`; no gradient."""
        scale = self.config.step * self.whitening(context).std * sampling.temperature
        level = self._level(context, weight, sampling.temperature)
        return langevin(level, z, scale, steps, sampling.generator, self.config.clip)

    def _level(self, context: Tensor | None, weight: float = 1.0, temperature: float = 1.0) -> LogDensity:
        """ln of base exp(weight f) at a temperature, which scales deviations."""

        def level(z: Tensor) -> Tensor:
            wide = None if context is None else context.detach().expand(*z.shape[:-1], -1)
            return (self.base.log_prob(z, wide) + weight * self.tilt(z, wide)) / temperature**2

        return level

    # Learning -------------------------------------------------------------------------------------------------------

    def loss(
        self, x: Float[Tensor, "*N D"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """ "base/...": the base's own terms; the trainer's and "magnitude", scores. NumericsError where chains diverge."""
        sampling = Sampling(generator=None if sampling is None else sampling.generator)
        self.update_moments(x)
        options = {"sampling": sampling, "rows": rows}
        high = self.tilt(x, context)
        if self.config.trainer == "nce":
            terms, low_squared = self._nce_loss(x, high, context, sampling)
        else:
            low = self.tilt(self._chain_ends(x.detach(), context, sampling), context)
            low = low if self.config.trainer == "cd" else low.mean()  # chains that persist belong to no row
            self._check_divergence(x, "latents and chains differ in f", float((high.mean() - low.mean()).detach()), "max_gap")
            terms, low_squared = {"cd": Loss(low - high, "score")}, low.square()
        far = 0.5 * self.config.magnitude * (high.square() + low_squared)
        base = {f"base/{name}": term for name, term in self.base.loss(x, context, **options).items()}
        return {**base, **terms, "magnitude": Loss(far, "score")}

    def _nce_loss(
        self, x: Float[Tensor, "*N D"], high: Float[Tensor, "*N"], context: Tensor | None, sampling: Sampling
    ) -> tuple[dict[str, Loss], Float[Tensor, "*N"]]:
        """(loss, mean square of f at draws of the base); at the minimum of the logistic loss f is ln p / base.

        With a context each latent is also classified among other rows' contexts: (z, c_j) by ln p(z | c_j). Other rows' latents
        as negatives under one context would do only if their own density were known: they favour ln p(z | c) / q(z).
        """
        count = self.config.negatives
        rows, given = x.flatten(0, -2), None if context is None else context.flatten(0, -2)
        with torch.no_grad():
            noise = self.base.sample(given, count if given is not None else count * len(rows), sampling).view(count, *rows.shape)
        low = self.tilt(noise, given)
        logistic = F.softplus(math.log(count) - high.flatten()) + F.softplus(low - math.log(count)).sum(0)
        terms = {"nce": Loss(logistic.view(high.shape), "score")}
        if given is not None and self.config.context_negatives and len(rows) > 1:
            shift = torch.randint(1, len(rows), (self.config.context_negatives, 1), generator=sampling.generator, device=x.device)
            each = torch.arange(len(rows), device=x.device)
            contexts = given[torch.cat([each.unsqueeze(0), (each + shift) % len(rows)])]  # own context first
            wide = rows.expand(len(contexts), -1, -1)
            with torch.no_grad():
                level = self.base.log_prob(wide, contexts)
            own = -(level + self.tilt(wide, contexts)).log_softmax(0)[0]
            terms["contexts"] = Loss(own.view(high.shape), "score")
        return terms, low.square().mean(0).view(high.shape)

    @torch.no_grad()
    def _chain_ends(self, x: Float[Tensor, "*N D"], context: Tensor | None, sampling: Sampling) -> Float[Tensor, "*M D"]:
        """Ends of Langevin chains: from the latents, or from where those of earlier updates ended."""
        steps = self.config.steps
        if self.config.trainer == "cd":
            ends = self._langevin(x, context, steps, sampling)
            moved = ((ends - x) / self.whitening(context).std).square().mean().sqrt()
            self._check_divergence(x, "chains moved by", float(moved), "max_displacement")
            return ends
        count, stored = min(len(x.flatten(0, -2)), len(self.chains)), len(self.chains)
        rows = torch.randperm(stored, generator=sampling.generator, device=x.device)[:count]
        restarted = torch.rand(count, 1, generator=sampling.generator, device=x.device) < self.config.reinit
        start = torch.where(restarted, self.base.sample(None, count, sampling)[:, 0], self.chains[rows])
        ends = self._langevin(start, None, steps, sampling)
        if self.training:
            self.chains[rows] = ends
        return ends

    def _check_divergence(self, latents: Tensor, what: str, value: float, option: str) -> None:
        """NumericsError where training has diverged."""
        limit = getattr(self.config, option)
        if not abs(value) < limit and bool(latents.isfinite().all()):  # a NaN in the latents is reported elsewhere
            raise NumericsError(
                f"The energy model diverges: {what} {abs(value):.4g}, and {option}={limit:g} is the limit. "
                "Lower its step or train.lr, raise its magnitude, or use trainer=nce, which needs no chains."
            )

    @torch.no_grad()
    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """f: mean of ln p / base, in nats; effective: share of the base's draws that count in ln Z; base/...: its own."""
        count = self.config.normaliser
        log_z, size = self.log_z(context, count)
        base = {f"base/{name}": value for name, value in self.base.measures(x, context).items()}
        return {"f": float((self.tilt(x, context) - log_z).mean()), "effective": float(size.mean() / count), **base}

    def fit(
        self,
        latents: Float[Tensor, "M D"],
        context: Float[Tensor, "M C"] | None = None,
        *,
        steps: int = 500,
        batch: int = 256,
        lr: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> float:
        """The base first, by itself; then f, with the base still learning."""
        options = {"steps": steps, "batch": batch, "lr": lr, "generator": generator}
        self.base.fit(latents, context, **options)
        if self.config.trainer == "pcd":
            with torch.no_grad():
                self.chains.copy_(self.base.sample(None, len(self.chains), Sampling(generator=generator))[:, 0])
        return super().fit(latents, context, **options)

    def _fixed_generator(self) -> torch.Generator:
        """Noise that is the same at each call."""
        device = next(self.net.parameters()).device
        return torch.Generator(device).manual_seed(0)
