"""One role, many forms: the contract of every conditional distribution over latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldmodel.data import Loss, Obs, Sampling
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.errors import ConfigError
from worldmodel.nn.networks import clip_each_norm


@dataclass(frozen=True)
class EncoderInterface:
    """What a dynamics model is given of the encoder.

    shapes   {key: shape} of a scaled canonical observation
    size     E: numbers in an embedding
    encode   observations {key: [N, ...]} -> embeddings [N, E]; a bound method of the model, so that a copied model has its own
             and an exchanged encoder is the one that is called
    anchor   what the end of an embedding holds of the observation itself (`Anchor`); None: nothing
    """

    shapes: dict[str, tuple[int, ...]]
    size: int
    encode: Callable[[Obs], Tensor]
    anchor: Any = None


@dataclass(frozen=True)
class PosteriorSource:
    """The model's posterior, for distributions whose components are posteriors. It holds bound methods and no module.

    encoder    the encoder's side
    h_dim      D: size of the recurrent state h that the posterior reads beside the embedding; 0 where it reads none
    posterior  (embedding [*N, E], h [*N, D]) -> posterior over z; the two broadcast
    """

    encoder: EncoderInterface
    h_dim: int
    posterior: Callable[[Tensor, Tensor], Posterior]


class ConditionalDistribution(nn.Module, ABC):
    """p(x | context) over flat latents x of size D. `context_dim` 0: unconditional, and `context` is None.

    Every form is built with (config, latent, context_dim, source). Callers use the members below and never the class:

    | member | default | what it is for |
    |---|---|---|
    | `density` | - | exact: `log_prob` is normalised; bound: a lower bound; unnormalised: up to ln Z(context); none |
    | `sample`, `log_prob` | abstract | draws, which follow `Sampling`; nats |
    | `rate` | sampled at z | KL(posterior || self), which trains posterior and prior |
    | `rates` | two calls of `rate` | the same, for the prior and the posterior apart |
    | `loss` | -log_prob | what its own parameters minimise; a form without an exact density learns by it alone |
    | `fit` | Adam on `loss` | fitting to frozen latents |
    | `closed_form`, `given` | False | p(x given the context) is a `Posterior`, so that KLs are exact |
    | `antithetic` | z and its mirror | latents over which a sampled rate is averaged |
    | `log_z` | NotImplementedError | estimate of ln Z(context), where `density` is unnormalised |
    | `ode_log_prob` | NotImplementedError | exact ln p of a diffusion's ODE, where `density` is a bound |
    | `num_pseudo_inputs`, `init_pseudo_inputs` | 0, no-op | observations that components start from |
    | `has_exemplars`, `replace_exemplars` | False, no-op | observations of the replay that components are made of |
    | `measures` | {} | diagnostics |
    """

    density: ClassVar[Literal["exact", "bound", "unnormalised", "none"]]
    slots: ClassVar[frozenset[str]]
    """Where the form may stand: initial, transition, marginal."""
    latent_kinds: ClassVar[frozenset[str]]
    """The kinds of latents that it is a distribution over."""
    closed_form: ClassVar[bool] = False
    of_posteriors: ClassVar[bool] = False
    """Whether its components are the model's own posteriors, which point latents do not have."""
    fits_in_training: ClassVar[bool] = False
    """Whether `fit` runs in training mode; elsewhere running statistics stand still meanwhile."""
    num_pseudo_inputs: int = 0
    has_exemplars: bool = False

    def __init__(self, latent: Latent, context_dim: int):
        super().__init__()
        if latent.kind not in self.latent_kinds:
            raise TypeError(
                f"{type(self).__name__} is a distribution over {' or '.join(sorted(self.latent_kinds))} latents, not over "
                f"{latent.kind} ones: set model.dynamics.latent.kind={min(self.latent_kinds)}."
            )
        self.latent = latent
        self.context_dim = context_dim

    @classmethod
    def check(cls, config: Any, latent: Latent, slot: str, where: str) -> None:
        """ConfigError where such a form cannot fill a model's slot; `where` is the key of its config.

        Called when a config is read, for nested distributions too, whose slot is "transition" where they have a context.
        """
        if slot not in cls.slots:
            raise ConfigError(
                f"{where}.kind={config.kind} has no such slot: over latents it fills {' and '.join(sorted(cls.slots))}."
            )
        if latent.family.kind not in cls.latent_kinds:
            raise ConfigError(
                f"{where}.kind={config.kind} is a distribution over {' or '.join(sorted(cls.latent_kinds))} latents and does not "
                f"fit model.dynamics.latent.kind={latent.kind}: change one of them."
            )
        if cls.of_posteriors and latent.deterministic:
            raise ConfigError(
                f"{where}.kind={config.kind} is made of posteriors, and model.dynamics.latent.kind={latent.kind} has none: "
                "change one of them."
            )

    # Draws and density

    @abstractmethod
    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """`count` draws for each row of the context (one row where there is none)."""

    @abstractmethod
    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        """In nats; `density` says what it means."""

    def given(self, context: Tensor | None, rows: Tensor | None = None) -> Any:
        """p(x | context) for each row of the context, where `closed_form`; without context its batch shape is [1]."""
        raise self._has_no("closed form")

    def log_z(
        self, context: Float[Tensor, "N C"] | None, count: int = 1000, sampling: Sampling | None = None, *, ais: bool = False
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(estimate of ln Z(context) in nats, effective sample size) from `count` draws."""
        raise self._has_no("normaliser to estimate")

    def ode_log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None, steps: int = 32) -> Float[Tensor, "*N"]:
        """The exact ln p(x | context) of the ODE that draws follow, in nats; no gradient."""
        raise self._has_no("ODE")

    def _has_no(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {what}. Its density is {self.density}.")

    # The rate

    def rate(
        self,
        posterior: Posterior,
        z: Float[Tensor, "*N D"],
        context: Tensor | None,
        *,
        frozen: bool = False,
        sampling: Sampling | None = None,
        rows: Int[Tensor, "*N"] | None = None,
    ) -> Float[Tensor, "*N"]:
        """KL(posterior || self) in nats, estimated at z ~ posterior. `frozen`: no gradient into own parameters or context.

        `rows`: numbers of the replay's rows that z belongs to; components that are exemplars leave out their own row.
        """
        if not frozen:
            return self(posterior, z, context, sampling=sampling, rows=rows)
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        arguments = (posterior, z, None if context is None else context.detach())
        return torch.func.functional_call(self, own, arguments, {"sampling": sampling, "rows": rows})

    def forward(self, posterior: Posterior, z: Tensor, context: Tensor | None, **options: Any) -> Float[Tensor, "*N"]:
        """The rate with whatever parameters the module has at the moment."""
        return posterior.log_prob(z) - self.log_prob(z, context)

    def rates(
        self, posterior: Posterior, z: Float[Tensor, "*N D"], context: Tensor | None, **options: Any
    ) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        """Two one-sided rates of equal value: (trains self and the context, trains the posterior). Options as of `rate`.

        Without an exact density the first trains nothing: such a form learns by its own `loss`.
        """
        rep = self.rate(posterior, z, context, frozen=True, **options)
        if self.density != "exact":
            return rep.detach(), rep
        return self.rate(posterior.detach(), z.detach(), context, **options), rep

    def antithetic(self, posterior: Posterior, z: Float[Tensor, "*N D"]) -> tuple[Tensor, ...]:
        """What a rate is averaged over: z and its mirror image, so that terms linear in the noise cancel.

        A prior trained on single draws follows their noise, and dreams of it drift. Source: Hammersley and Morton 1956.
        """
        mirror = posterior.mirror(z)
        return (z,) if mirror is None else (z, mirror)

    # Learning

    def loss(
        self, x: Float[Tensor, "*N D"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """What its own parameters minimise: for exact forms the negative log-likelihood."""
        return {"nll": Loss(-self.log_prob(x, context))}

    def prepare_fit(self, latents: Float[Tensor, "N D"]) -> None:
        """Sets running statistics to those of all latents before a `fit`."""

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
        """Fits to frozen latents (two-stage); returns the last loss. Nothing upstream is trained."""
        latents, context = latents.detach(), None if context is None else context.detach()
        self.prepare_fit(latents)
        training = self.training
        self.train(self.fits_in_training)
        try:
            return self._minimise(latents, context, steps, batch, lr, generator)
        finally:
            self.train(training)

    def _minimise(
        self, latents: Tensor, context: Tensor | None, steps: int, batch: int, lr: float, generator: torch.Generator | None
    ) -> float:
        sampling = Sampling(generator=generator)
        trainable = [p for p in self.parameters() if p.requires_grad]
        if not trainable:
            return float(sum(term.mean() for term in self.loss(latents, context, sampling=sampling).values()).detach())
        optimizer = torch.optim.Adam(trainable, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        value = torch.zeros((), device=latents.device)
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

    # Components that are observations

    def init_pseudo_inputs(self, obs: Obs, h: Float[Tensor, "N D"] | None = None, rows: Int[Tensor, " N"] | None = None) -> None:
        """Starts the `num_pseudo_inputs` at the first of these observations, with their recurrent states and row numbers."""

    def replace_exemplars(self, obs: Obs, h: Float[Tensor, "N D"], rows: Int[Tensor, " N"]) -> None:
        """Replaces the oldest exemplars by some of these observations, with their recurrent states and row numbers."""

    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """{name: number} that shows at latents x whether the form works as it should; without gradient."""
        return {}


def likelihood(distribution: ConditionalDistribution, x: Tensor, context: Tensor | None, log_z: Tensor | None = None) -> Tensor:
    """ln p(x | context) [*N] in nats, normalised, so that forms can be compared; of a bound, the bound.

    log_z   estimate from `log_z`, for an unnormalised density
    Raises ConfigError where that is missing, and where there is no density.
    """
    name = type(distribution).__name__
    if distribution.density == "none":
        raise ConfigError(f"{name} has no density, and its likelihood was asked for. Use a form that has one, such as flow.")
    if distribution.density != "unnormalised":
        return distribution.log_prob(x, context)
    if log_z is None:
        raise ConfigError(
            f"{name} gives its density up to a factor Z(context), and its likelihood was asked for. Estimate ln Z with "
            "prior.log_z(context), and see that the effective sample size which comes with it is no small share of its draws."
        )
    return distribution.log_prob(x, context) - log_z


class Explicit(ConditionalDistribution):
    """Forms that give, from the context, an object with `log_prob` and `detach`: a posterior, or a mixture of them."""

    density = "exact"

    @abstractmethod
    def given(self, context: Tensor | None, rows: Tensor | None = None) -> Any:
        """p(x | context) for each row of the context; without context its batch shape is [1]. `rows` as of `rate`."""

    def divergence(self, posterior: Posterior, z: Tensor, prior: Any) -> Float[Tensor, "*N"]:
        """KL(posterior || prior), estimated at z unless it has a closed form."""
        return posterior.log_prob(z) - prior.log_prob(z)

    def update_statistics(self, posterior: Posterior, prior: Any) -> None:
        """Updates running statistics wherever a rate trains the prior."""

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        return self.given(context).log_prob(x)

    def rate(
        self,
        posterior: Posterior,
        z: Tensor,
        context: Tensor | None,
        *,
        frozen: bool = False,
        sampling: Sampling | None = None,
        rows: Tensor | None = None,
    ) -> Float[Tensor, "*N"]:
        prior = self.given(context, rows)
        if not frozen:
            self.update_statistics(posterior, prior)
        return self.divergence(posterior, z, prior.detach() if frozen else prior)

    def rates(
        self, posterior: Posterior, z: Tensor, context: Tensor | None, **options: Any
    ) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        prior = self.given(context, options.get("rows"))
        self.update_statistics(posterior, prior)
        return self.divergence(posterior.detach(), z.detach(), prior), self.divergence(posterior, z, prior.detach())

    def loss(
        self, x: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        return {"nll": Loss(-self.given(context, rows).log_prob(x))}


class ClosedForm(Explicit):
    """Forms whose p(x | context) is a posterior of the latent's own family, so that KLs are exact."""

    closed_form = True

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        distribution = self.given(context)
        mean = distribution.mean
        rows = distribution.map(lambda x: x.expand(count, *x.shape))
        return self.latent.draw(rows, sampling or Sampling(), (count, *mean.shape[:-1]), mean.device)

    def divergence(self, posterior: Posterior, z: Tensor, prior: Any) -> Tensor:
        return posterior.kl(prior)

    def antithetic(self, posterior: Posterior, z: Tensor) -> tuple[Tensor, ...]:
        return (z,)  # no rate depends on it
