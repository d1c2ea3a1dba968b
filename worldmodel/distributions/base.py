"""One role, many forms: what every conditional distribution promises, and the beliefs that posteriors give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Obs, Sampling
from worldmodel.errors import ConfigError
from worldmodel.nn.networks import clip_each_norm


class UndefinedRate(TypeError):
    """A rate, density or entropy was asked of a belief that is a point."""


class Posterior(ABC):
    """A belief about z with any batch shape [*N]: what an encoder or a filter knows after seeing the observation."""

    @property
    @abstractmethod
    def mean(self) -> Float[Tensor, "*N Z"]:
        """The expected code, flat."""

    @property
    @abstractmethod
    def mode(self) -> Float[Tensor, "*N Z"]:
        """The most likely code: what deterministic prediction uses."""

    @abstractmethod
    def sample(self, noise: Tensor, temperature: float = 1.0) -> Float[Tensor, "*N Z"]:
        """A draw made from `noise` (see `Latent.noise`), differentiable in the belief's parameters."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N"]:
        """ln of the normalised density or mass, in nats."""

    def log_prob_each(self, x: Float[Tensor, "*M Z"]) -> Float[Tensor, "*M K"]:
        """`log_prob` of each code under each of K beliefs [*M K], or [K] with as many ones in front as needed."""
        return self.log_prob(x.unsqueeze(-2))

    def mirror(self, z: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N Z"] | None:
        """The draw on the other side of the mean, which is as likely; None where the family has no such thing."""
        return None

    @abstractmethod
    def entropy(self) -> Float[Tensor, "*N"]:
        """In nats, summed over the code's variables."""

    @abstractmethod
    def kl(self, other: Posterior) -> Float[Tensor, "*N"]:
        """KL(self || other) in closed form, in nats; TypeError for another family."""

    @abstractmethod
    def map(self, fn) -> Posterior:
        """The belief with `fn` applied to each parameter tensor."""

    def detach(self) -> Posterior:
        return self.map(torch.Tensor.detach)

    def index(self, rows) -> Posterior:
        return self.map(lambda x: x[rows])


class Latent(ABC):
    """A family of codes: how large they are, how noise becomes a draw, how a network's output becomes a belief."""

    kind: ClassVar[str]
    """The name under which configs know it."""
    deterministic: ClassVar[bool] = False
    """Whether beliefs are points: then no rate exists."""
    size: int
    """Z: numbers in a flat code."""
    variables: int
    """Independent variables of a belief: what a code can be cut between."""
    axis: ClassVar[int]
    """The axis of a belief's parameters along which its variables lie."""
    parameters: int
    """Numbers that a network must give for one belief."""
    continuous: ClassVar[bool]
    """Whether the size of a code's numbers means something: a network that normalises them away could not go beyond
    what it was trained on."""

    @property
    def family(self) -> Latent:
        """The codes over which laws are made: these, but for points, which a law knows as real numbers."""
        return self

    @abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Noise for one draw per element of `shape`."""

    @abstractmethod
    def distribution(self, parameters: Float[Tensor, "*N P"]) -> Posterior:
        """The belief that a network's output stands for."""

    @abstractmethod
    def part(self, variables: int) -> Latent:
        """The family of codes with that many variables of the same kind."""

    @abstractmethod
    def traverse(self, z: Float[Tensor, " Z"], latents: Float[Tensor, "N Z"], steps: int, width: float) -> Float[Tensor, "V S Z"]:
        """`code` with one of its V variables moved at a time, over what that variable does in `codes`."""

    def draw(self, distribution: Posterior, sampling: Sampling, shape: tuple[int, ...], device) -> Float[Tensor, "*N Z"]:
        """The mode, or a draw from the caller's noise, or from the generator's."""
        if sampling.mode:
            return distribution.mode
        noise = sampling.noise if sampling.noise is not None else self.noise(shape, sampling.generator, device)
        return distribution.sample(noise, sampling.temperature)


@dataclass(frozen=True)
class EncoderInterface:
    """What a dynamics model is told about the encoder.

    shapes   {key: shape} of a scaled canonical observation
    size     E: numbers in an embedding
    encode   observations {key: [N, ...]} -> embeddings [N, E]; a bound method of the model, so that a copied model has its own
             and an encoder that was exchanged is the one that is asked
    """

    shapes: dict[str, tuple[int, ...]]
    size: int
    encode: Callable[[Obs], Tensor]


@dataclass(frozen=True)
class PosteriorSource:
    """How the model comes to a belief: for forms whose components are posteriors. It holds bound methods and no module.

    encoder    the encoder's side
    carry_dim  D: numbers of the carry that the posterior reads beside the embedding; 0 where it reads none
    posterior  (embedding [*N, E], carry [*N, D]) -> belief about z; the two broadcast; a carry of width 0 where it reads none
    """

    encoder: EncoderInterface
    h_dim: int
    posterior: Callable[[Tensor, Tensor], Posterior]


class ConditionalDistribution(nn.Module, ABC):
    """p(x | context) over flat events of size D. `context_dim` 0: unconditional, and `context` is None.

    Every form is built with (config, latent, context_dim, source); only forms whose components are posteriors read the source.
    Readers branch on `density`, never on the class:
    exact: `log_prob` is normalised; bound: it is a lower bound; unnormalised: it is up to ln Z(context); none: no density.
    """

    density: ClassVar[Literal["exact", "bound", "unnormalised", "none"]]
    slots: ClassVar[frozenset[str]]
    """Where the form may stand: initial, transition, marginal."""
    latent_kinds: ClassVar[frozenset[str]]
    """The kinds of codes that it is a law of."""
    of_posteriors: ClassVar[bool] = False
    """Whether it is made of the model's own posteriors, which point codes do not have."""

    def __init__(self, latent: Latent, context_dim: int):
        super().__init__()
        if latent.kind not in self.latent_kinds:
            raise TypeError(
                f"{type(self).__name__} is a law of {' or '.join(sorted(self.latent_kinds))} codes, not of {latent.kind} ones: "
                f"set model.dynamics.latent.kind={min(self.latent_kinds)}."
            )
        self.latent = latent
        self.event_shape = (latent.size,)
        self.context_dim = context_dim

    @classmethod
    def check(cls, config: Frozen, latent: Latent, slot: str, where: str) -> None:
        """ConfigError where such a form cannot be the law of a model's codes in a slot; `where` is the key of its config.

        Asked when a config is read, of laws within laws too, whose slot is "transition" where they have a context.
        """
        if slot not in cls.slots:
            raise ConfigError(
                f"{where}.kind={config.kind} has no such slot: over latent codes it fills {' and '.join(sorted(cls.slots))}."
            )
        if latent.family.kind not in cls.latent_kinds:
            raise ConfigError(
                f"{where}.kind={config.kind} is a law of {' or '.join(sorted(cls.latent_kinds))} codes and does not fit "
                f"model.dynamics.latent.kind={latent.kind}: change one of them."
            )
        if cls.of_posteriors and latent.deterministic:
            raise ConfigError(
                f"{where}.kind={config.kind} is made of beliefs, and model.dynamics.latent.kind={latent.kind} has none: "
                "change one of them."
            )

    @abstractmethod
    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """`count` draws for each row of the context (one row where there is none)."""

    @abstractmethod
    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        """In nats; what it means is said by `density`."""

    def rate(
        self,
        posterior: Posterior,
        z: Float[Tensor, "*N D"],
        context: Tensor | None,
        *,
        frozen: bool = False,
        sampling: Sampling | None = None,
        rows: Tensor | None = None,
    ) -> Float[Tensor, "*N"]:
        """KL(posterior || self) estimated at z ~ posterior, in nats. `frozen`: no gradient into own parameters or context.

        `rows`: numbers of the rows in the store, which a form made of stored rows needs for leaving each out of its own law.
        """
        if frozen:
            own = {k: v.detach() for k, v in self.named_parameters()}
            context = None if context is None else context.detach()
            prior = torch.func.functional_call(self, own, (z, context))
        else:
            prior = self.log_prob(z, context)
        return posterior.log_prob(z) - prior

    def rates(
        self,
        posterior: Posterior,
        z: Float[Tensor, "*N D"],
        context: Tensor | None,
        *,
        sampling: Sampling | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        """The two one-sided rates: (trains self and the context, trains the posterior). Their values are equal.

        Without an exact density the first trains nothing: such a form learns by its own `loss`.
        """
        options = {"sampling": sampling, "rows": rows}
        rep = self.rate(posterior, z, context, frozen=True, **options)
        if self.density != "exact":
            return rep.detach(), rep
        return self.rate(posterior.detach(), z.detach(), context, **options), rep

    def antithetic(self, posterior: Posterior, z: Float[Tensor, "*N D"]) -> tuple[Tensor, ...]:
        """What a rate is averaged over: z and its mirror image in the belief, so that what is linear in the noise cancels.

        A law that is told single draws follows their noise, and dreams of it drift. Source: Hammersley and Morton 1956.
        """
        mirror = posterior.mirror(z)
        return (z,) if mirror is None else (z, mirror)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """`log_prob`: so that the module can be called with other parameters."""
        return self.log_prob(x, context)

    def loss(
        self, x: Float[Tensor, "*N D"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """What its own parameters minimise: for exact forms the negative log-likelihood."""
        return {"nll": Loss(-self.log_prob(x, context))}

    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """Numbers that show at codes x whether the form is at work as it should be; without gradient. {}: nothing to see."""
        return {}

    def fit(
        self,
        latents: Float[Tensor, "N D"],
        context: Float[Tensor, "N C"] | None = None,
        *,
        steps: int = 1000,
        batch: int = 256,
        lr: float = 3e-3,
        generator: torch.Generator | None = None,
    ) -> float:
        """Fit to frozen codes after the fact (two-stage); gives the last loss. Nothing upstream moves."""
        latents, sampling = latents.detach(), Sampling(generator=generator)
        context = None if context is None else context.detach()
        trainable = [p for p in self.parameters() if p.requires_grad]
        if not trainable:
            return float(sum(term.mean() for term in self.loss(latents, context, sampling=sampling).values()).detach())
        optimizer = torch.optim.Adam(trainable, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        value = torch.zeros(())
        for _ in range(steps):
            rows = torch.randint(len(latents), (min(batch, len(latents)),), generator=generator, device=latents.device)
            given = None if context is None else context[rows]
            value = sum(term.mean() for term in self.loss(latents[rows], given, sampling=sampling).values())
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            clip_each_norm(trainable, 10.0)
            optimizer.step()
            schedule.step()
        return float(value.detach())


def likelihood(distribution: ConditionalDistribution, x: Tensor, context: Tensor | None, log_z: Tensor | None = None) -> Tensor:
    """ln p(x | context) [*N] in nats, normalised, so that forms can be compared; of a bound, the bound.

    log_z   what an unnormalised law's own `log_z` estimated
    Raises ConfigError where a law is unnormalised and there is none, and where a law has no density.
    """
    name = type(distribution).__name__
    if distribution.density == "none":
        raise ConfigError(f"{name} has no density, and its likelihood was asked for. Use a form that has one, such as flow.")
    if distribution.density != "unnormalised":
        return distribution.log_prob(x, context)
    if log_z is None:
        raise ConfigError(
            f"{name} gives its density up to a factor Z(context), and its likelihood was asked for. Estimate ln Z with "
            "law.log_z(context), and see that the effective sample size which comes with it is no small share of its draws."
        )
    return distribution.log_prob(x, context) - log_z


class ClosedForm(ConditionalDistribution):
    """Forms whose law given the context is itself a belief of the latent's family, so that rates have a closed form."""

    density = "exact"

    @abstractmethod
    def given(self, context: Tensor | None) -> Posterior:
        """The law for each row of the context; without context its batch shape is [1]."""

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        distribution = self.given(context)
        mean = distribution.mean
        rows = distribution.map(lambda x: x.expand(count, *x.shape))
        return self.latent.draw(rows, sampling or Sampling(), (count, *mean.shape[:-1]), mean.device)

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        return self.given(context).log_prob(x)

    def antithetic(self, posterior, z):
        return (z,)  # no rate depends on it

    def rate(self, posterior, z, context, *, frozen: bool = False, sampling=None, rows=None):
        prior = self.given(context)
        return posterior.kl(prior.detach() if frozen else prior)

    def rates(self, posterior, z, context, *, sampling=None, rows=None):
        prior = self.given(context)
        return posterior.detach().kl(prior), posterior.kl(prior.detach())
