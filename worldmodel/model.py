"""WorldModel: encoder, dynamics, objective and heads, and the methods that agents, environments and diagnostics call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.config import Frozen, Part
from worldmodel.data import Batch, Dream, Loss, Obs, Sampling, State, Trace
from worldmodel.decoders import DecoderConfig
from worldmodel.distributions import (
    CategoricalConfig,
    CategoricalLatent,
    ConditionalDistribution,
    EncoderInterface,
    GaussianConfig,
    Posterior,
    tilted,
)
from worldmodel.dynamics import RSSMConfig
from worldmodel.encoders import EncoderConfig, VectorScaling
from worldmodel.ensemble import EnsembleConfig
from worldmodel.errors import ConfigError
from worldmodel.heads import HeadsConfig
from worldmodel.nn.networks import flatten
from worldmodel.objectives import ReconstructionConfig
from worldmodel.registry import build, part, register
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.specs import ACTION_MASK
from worldmodel.storage.weights import cpu_randomness, load_arrays

UNKNOWN = -1e30
"""`marginal_low` before the first latent: no log-density lies below it."""
TYPICALITY_EVERY, TYPICALITY_LATENTS, TYPICALITY_RATE = 50, 64, 0.2
"""Updates between two evaluations of ln p(z), latents in each, and the rate at which their quantile is followed: a likelihood of
a diffusion costs a hundred times as much as the rest of an update."""
DEFAULT_DISTRIBUTIONS = {"categorical": CategoricalConfig(), "gaussian": GaussianConfig()}


class ModelConfig(Frozen):
    """The parts of a world model, each with its own options."""

    vector_scaling: Literal["standardise", "symlog", "raw"] = Field("standardise", description="scale of vector observations")
    encoder: Annotated[Any, Part("encoder")] = EncoderConfig()
    decoder: Annotated[Any, Part("decoder")] = DecoderConfig()
    dynamics: Annotated[Any, Part("dynamics")] = RSSMConfig()
    transition: Annotated[Any, Part("distribution")] | None = Field(
        None, description="p(z_t | h_t); none: the dynamics' own, else the latent's family"
    )
    initial: Annotated[Any, Part("distribution")] | None = Field(None, description="p(z_0); none: the latent's family")
    marginal: Annotated[Any, Part("distribution")] | None = Field(
        None, description="p(z) of all latents, a VAE's prior; null: no marginal"
    )
    objective: Annotated[Any, Part("objective")] = ReconstructionConfig()
    heads: Annotated[Any, Part("heads")] = HeadsConfig()
    ensemble: Annotated[Any, Part("ensemble")] = EnsembleConfig()
    rollouts: Literal["latent", "observation"] = Field(
        "latent", description="observation: each imagined step is decoded, by a draw, and encoded again"
    )

    @model_validator(mode="after")
    def _distributions_fit_their_slots(self) -> ModelConfig:
        latent = build("latent", self.dynamics.latent)
        for slot in ("transition", "initial", "marginal"):
            distribution = getattr(self, slot)
            if distribution is not None:
                part("distribution", distribution.kind).check(distribution, latent, slot, f"model.{slot}")
        return self

    @model_validator(mode="after")
    def _observation_rollouts_need_a_decoder(self) -> ModelConfig:
        if self.rollouts == "observation" and not getattr(self.objective, "probe", True):
            raise ValueError(
                "model.rollouts=observation decodes every step, and model.objective.probe=false leaves no decoder. "
                "Use model.rollouts=latent or model.objective.probe=true."
            )
        return self

    @model_validator(mode="after")
    def _predicted_latents_are_points(self) -> ModelConfig:
        posterior = getattr(self.dynamics, "posterior", "observation")
        if getattr(self.objective, "points", False) and (self.dynamics.latent.kind, posterior) != ("point", "observation"):
            raise ValueError(
                f"model.objective.kind={self.objective.kind} predicts point latents of single observations: set "
                f"model.dynamics.latent.kind=point (now {self.dynamics.latent.kind}) and model.dynamics.posterior=observation "
                f"(now {posterior}), as model=jepa and model=hybrid do."
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_the_dynamics(self) -> ModelConfig:
        if hasattr(self.dynamics, "check"):
            slots = ("encoder", "objective", "transition", "initial", "marginal")
            self.dynamics.check({slot: getattr(self, slot) for slot in slots})
        return self


register("group", "model", ModelConfig)(ModelConfig)


def default_distribution(dynamics: Frozen, slot: str) -> Frozen:
    """What fills a slot that the config leaves open: what these dynamics name for it, else the family of their latents."""
    if slot == "transition" and hasattr(dynamics, "own_transition"):
        return dynamics.own_transition
    return DEFAULT_DISTRIBUTIONS[build("latent", dynamics.latent).family.kind].replace(units=dynamics.units)


def build_encoder(encoder: Frozen, dynamics_kind: str, obs: ObsSpec) -> nn.Module:
    """The encoder of a config, or the one that its dynamics has in its place."""
    own = getattr(part("dynamics", dynamics_kind), "Encoder", None)
    return own(encoder, obs) if own else build("encoder", encoder, obs)


class WorldModel(nn.Module):
    """A world model.

    trace, loss      training: posteriors and states over a batch, then the losses (`learner.Learner`)
    observe          one step of filtering from a raw observation
    imagine          a rollout of the prior under a policy
    encode, decode   observation -> posterior, feature -> observation
    legal            which actions may be taken, as an observation says it or as features predict it
    """

    is_masked: bool = False
    """Whether observations say which actions are legal."""

    def __init__(self, config: ModelConfig, obs: ObsSpec, action: ActionSpec):
        super().__init__()
        self.config, self.obs, self.action = config, obs, action
        priors = [getattr(config, slot) or default_distribution(config.dynamics, slot) for slot in ("transition", "initial")]
        self.scaling = VectorScaling(config.vector_scaling, obs)
        self.encoder = build_encoder(config.encoder, config.dynamics.kind, obs)
        shapes = {name: key.shape for name, key in obs.keys.items()}
        interface = EncoderInterface(shapes, self.encoder.out_features, self._embed, getattr(self.encoder, "anchor", None))
        self.dynamics = build("dynamics", config.dynamics, interface, action.dim, *priors)
        self.feature_dim = self.dynamics.feature_dim
        latent = self.dynamics.latent
        self.marginal = None
        if config.marginal is not None:
            self.marginal = build("distribution", config.marginal, latent.family, 0, self.dynamics.source)
            if self.marginal.density != "none":
                self.register_buffer("marginal_low", torch.tensor(UNKNOWN))
                self.register_buffer("marginal_age", torch.tensor(0))
        if own := getattr(self.dynamics, "Decoder", None):
            decoder = own(config.decoder, obs, self.feature_dim, latent)
        else:
            decoder = build("decoder", config.decoder, obs, self.feature_dim, latent.size)
            decoder = getattr(self.dynamics, "decoder", decoder)  # after both are built: heads have the same first weights
        self.objective = build("objective", config.objective, decoder, self.encoder, self.dynamics, action.dim)
        self.decoder: nn.Module | None = getattr(self.objective, "decoder", None)
        if config.rollouts == "observation" and self.decoder is None:
            raise ConfigError(
                f"model.rollouts=observation decodes every step, and model.objective.kind={config.objective.kind} has no decoder. "
                "Use model.rollouts=latent."
            )
        if config.rollouts == "observation" and getattr(self.decoder, "pixelwise_noise", []):
            raise ConfigError(
                f"model.rollouts=observation encodes samples, and model.decoder.kind={config.decoder.kind} draws each pixel of "
                f"'{self.decoder.pixelwise_noise[0]}' on its own: noise that no picture has. Use model.decoder.kind=diffusion "
                "(or latent_diffusion), which draws pictures, or model.rollouts=latent."
            )
        self.is_masked = action.is_masked_by(obs)
        self.heads = build("heads", config.heads, self.feature_dim, action.dim if self.is_masked else 0)
        sizes = self.feature_dim, action.dim, self.encoder.out_features
        self.ensemble = build("ensemble", config.ensemble, *sizes) if config.ensemble.members else None

    @classmethod
    def from_spaces(
        cls,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: ModelConfig | dict | None = None,
        seed: int = 0,
        layout: str | None = None,
    ) -> WorldModel:
        """A new model for a pair of Gymnasium spaces. Raises UnsupportedSpaceError, ConfigError."""
        if not isinstance(config, ModelConfig):
            config = ModelConfig.parse(config or {})
        with cpu_randomness(seed):
            return cls(config, ObsSpec.from_space(observation_space, layout), ActionSpec.from_space(action_space))

    @classmethod
    def from_arrays(cls, config: ModelConfig, obs: ObsSpec, action: ActionSpec, arrays: Mapping[str, np.ndarray]) -> WorldModel:
        """The model of saved weights {name: array}; no random state moves. Raises ConfigError where they do not fit."""
        with cpu_randomness():
            world = cls(config, obs, action)
        load_arrays(world, arrays)
        return world

    def _embed(self, obs: Obs) -> Float[Tensor, "N E"]:
        """The current encoder's embeddings of scaled observations; it may have been exchanged since construction."""
        return self.encoder(obs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> WorldModel:
        """As in PyTorch, which sets every flag anew: acting and learning ask at each step, and mostly nothing is to be changed."""
        return super().train(mode) if any(module.training != mode for module in self.modules()) else self

    def initial(self, batch_size: int) -> State:
        """The state before the first observation."""
        return self.dynamics.initial(batch_size)

    def preprocess(self, rows: dict[str, Tensor]) -> Obs:
        """Raw rows [*N, ...] -> scaled canonical observations."""
        return self.scaling(self.obs.canonical(rows))

    def sample_initial(self, batch_size: int, sampling: Sampling | None = None) -> State:
        """First states of episodes, drawn from p(z_0). Raises ConfigError where the dynamics has no initial distribution."""
        if not hasattr(self.dynamics, "sample_initial"):
            raise ConfigError(f"model.dynamics={self.config.dynamics.kind} has no initial distribution. Start from the replay.")
        return self.dynamics.sample_initial(batch_size, sampling or Sampling())

    def sample_initial_tilted(
        self, score: Callable[[Tensor], Tensor], batch_size: int, strength: float, sampling: Sampling | None = None
    ) -> tuple[State, float]:
        """(first states that score high, effective sample size): draws of p(z_0) exp(strength * score(feature)).

        score   features [N, F] -> [N], such as `heads.reward`
        """
        sampling = sampling or Sampling()
        start = self.sample_initial(1, sampling)

        def states(z: Tensor) -> State:
            return State({**start.map(lambda x: x.expand(len(z), *x.shape[1:])), "z": z})

        prior = self.dynamics.initial_prior
        z, size = tilted(prior, lambda z: score(self.dynamics.feature(states(z))), batch_size, strength, sampling)
        return states(z), size

    def trace(self, batch: Batch, state: State | None = None, sampling: Sampling | None = None) -> Trace:
        """Posteriors and states over a batch whose `obs` is preprocessed, from `state` or from zeros."""
        batch_size, length = batch.shape
        embed = self.encoder({name: flatten(x) for name, x in batch.obs.items()}).view(batch_size, length, -1)
        state = state if state is not None else self.dynamics.initial(batch_size)
        trace = self.dynamics.observe(state, embed, batch.prev_action, batch.is_first, sampling or Sampling())[1]
        if self.training and batch.row is not None:
            for prior, rows in self._priors(batch.is_first).values():
                if prior.has_exemplars:
                    prior.replace_exemplars({name: x[rows] for name, x in batch.obs.items()}, trace.h[rows], batch.row[rows])
        return trace

    def _priors(self, is_first: Bool[Tensor, "B T"]) -> dict[str, tuple[ConditionalDistribution, Bool[Tensor, "B T"]]]:
        """{slot: (its distribution, the rows that it is the prior of)} for the slots that are filled."""
        slots = {
            "initial": (getattr(self.dynamics, "initial_prior", None), is_first),
            "transition": (self.dynamics.transition, ~is_first),
            "marginal": (self.marginal, torch.ones_like(is_first)),
        }
        return {slot: (prior, rows) for slot, (prior, rows) in slots.items() if prior is not None and rows.any()}

    @torch.no_grad()
    def measures(self, trace: Trace, is_first: Bool[Tensor, "B T"]) -> dict[str, float]:
        """{"prior/<slot>/<name>": number}: diagnostics of each prior at the latents of a trace."""
        out = {}
        for slot, (prior, rows) in self._priors(is_first).items():
            seen = prior.measures(trace.z[rows], trace.h[rows] if slot == "transition" else None)
            out |= {f"prior/{slot}/{name}": value for name, value in seen.items()}
        return out

    @torch.no_grad()
    def calibrate(self, used: WorldModel, batch: Batch) -> None:
        """Fits predicted deviations, where the dynamics can, to the errors of the model in use on a prepared batch."""
        if hasattr(self.dynamics, "calibrate"):
            self.dynamics.calibrate(used.dynamics, used.eval().trace(batch, None, Sampling(mode=True)), batch.is_first)

    def update_targets(self, decay: float | None = None) -> None:
        """EMA update of the objective's target encoder, if it has one; to be called after each optimiser step. Decay 0: a copy."""
        if hasattr(self.objective, "update_target_encoder"):
            self.objective.update_target_encoder(self.encoder, self.dynamics, decay)

    def loss(self, trace: Trace, batch: Batch, sampling: Sampling | None = None) -> dict[str, Loss]:
        """Every loss term by name, unscaled; `train.scales` weighs them.

        dyn, rep             KL of posterior and prior, for the prior and for the posterior: `dynamics.losses`
        observation          -ln p(x | feature): `objective`, by the decoder's `loss`; jepa and hybrid add terms of their own
        reward, continue     `heads`; legal, where the environment says which actions are
        marginal             KL of the posterior and the marginal p(z), where there is one: `_marginal_losses`
        ensemble             its prediction error, where there is one: `ensemble`
        prior/<slot>/<term>  own losses of priors that no KL trains: `loss` of the distribution
        """
        not_first, sampling = ~batch.is_first, sampling or Sampling()
        terms = self.dynamics.losses(trace, batch, sampling) | self.objective(trace, batch, sampling, self.dynamics)
        if self.marginal is not None:
            terms |= self._marginal_losses(self.marginal, trace, batch, sampling)
        rows = {"mask": not_first, "weight": batch.weight}  # unbiased: dreams read these heads
        terms["reward"] = Loss(self.heads.reward_loss(trace.feature, batch.reward), **rows)
        terms["continue"] = Loss(self.heads.cont_loss(trace.feature, 1 - batch.is_terminal.to(trace.feature)), **rows)
        if self.is_masked:  # at a terminal row nothing may be done, and nothing is learned of it
            rows["mask"] = ~batch.is_terminal
            terms["legal"] = Loss(self.heads.legal_loss(trace.feature, batch.obs[ACTION_MASK]), **rows)
        if self.ensemble is not None:
            after = trace.embed[:, 1:]
            terms["ensemble"] = self.ensemble.loss(trace.feature[:, :-1], batch.prev_action[:, 1:], after, not_first[:, 1:])
        return terms

    def _marginal_losses(self, prior: ConditionalDistribution, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """KL(q(z | .) || p(z)), which trains the posterior and an exact p; the own losses of p where it does not."""
        if self.training and prior.density != "none":
            self._update_typicality(trace.z.detach().flatten(0, -2))
        options = {"sampling": sampling.substream("marginal"), "rows": batch.row}
        terms, exact, deterministic = {}, prior.density == "exact", self.dynamics.latent.deterministic
        if not deterministic:
            draws = prior.antithetic(trace.posterior, trace.z)
            kl = [prior.rate(trace.posterior, z, None, frozen=not exact, **options) for z in draws]
            terms["marginal"] = Loss(sum(kl) / len(kl))
        if deterministic or not exact:
            terms |= {f"prior/marginal/{name}": term for name, term in prior.loss(trace.z.detach(), None, **options).items()}
        return terms

    @torch.no_grad()
    def observe(
        self,
        state: State,
        obs: dict[str, Tensor],
        prev_action: Float[Tensor, "B A"],
        is_first: Bool[Tensor, " B"],
        sampling: Sampling | None = None,
    ) -> State:
        """The state after one real step, from raw observations [B, ...]; no gradient."""
        embed = self.encoder(self.preprocess(obs)).unsqueeze(1)
        prev_action = torch.where(is_first.unsqueeze(-1), torch.zeros_like(prev_action), prev_action)
        sampling = sampling or Sampling()
        return self.dynamics.observe(state, embed, prev_action.unsqueeze(1), is_first.unsqueeze(1), sampling)[0]

    @torch.no_grad()
    def legal(
        self, feature: Float[Tensor, "*N F"] | None, rows: Mapping[str, np.ndarray] | None = None
    ) -> Bool[Tensor, "*N A"] | None:
        """Which actions may be taken: as raw observations say, or else as predicted from features; None where neither knows."""
        seen = None if rows is None else rows.get(ACTION_MASK)
        if seen is not None and seen.dtype.kind == "b":
            return self.action.likely_legal(torch.as_tensor(seen, device=self.device).float())
        return self.action.likely_legal(self.heads.legal(feature)) if self.is_masked else None

    def imagine(
        self, state: State, policy: Callable[[Tensor, int], Tensor], horizon: int, sampling: Sampling | None = None
    ) -> Dream:
        """A rollout of `horizon` steps; `policy(feature, step)` gives canonical actions [B, A], which the dream holds as given.

        With model.rollouts=observation each step is decoded, by a draw, and encoded again.
        """
        sampling = sampling or Sampling()
        features, actions, uncertainties = [self.dynamics.feature(state)], [], []
        for step in range(horizon):
            actions.append(policy(features[-1], step))
            state = self.dynamics.imagine(state, self.action.project(actions[-1]), sampling)
            if self.ensemble is None and self.has_uncertainty:
                uncertainties.append(state["uncertainty"].squeeze(-1))
            if self.config.rollouts == "observation":
                state = self._reencoded(state, sampling)
            features.append(self.dynamics.feature(state))
        rows = torch.stack(features)  # [H+1, B, F]: time first, so that the heads read it without a copy
        reward, cont = (head(rows[1:]).transpose(0, 1) for head in (self.heads.reward, self.heads.cont))
        uncertainty = self._uncertainty(rows, actions, uncertainties).transpose(0, 1)
        return Dream(torch.stack(actions, 1), reward, cont, uncertainty, rows.transpose(0, 1), state)

    @property
    def has_uncertainty(self) -> bool:
        """Whether dreams have uncertainty: from an ensemble, or from one within the transition."""
        return self.ensemble is not None or getattr(self.dynamics, "has_members", False)

    def _uncertainty(self, feature: Tensor, actions: list[Tensor], uncertainties: list[Tensor]) -> Float[Tensor, "H B"]:
        """On arriving at each step: the ensemble's, else what the dynamics' own members said."""
        if self.ensemble is not None:
            return self.ensemble.disagreement(feature[:-1], self.action.project(torch.stack(actions)))
        return torch.stack(uncertainties) if uncertainties else feature.new_zeros(feature[1:].shape[:-1])

    def log_density(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """ln p(z) of a feature's latent under the marginal, in nats; up to a constant where it is unnormalised.

        Raises ConfigError where there is no marginal, or one without a density.
        """
        needs_marginal(self, "log_density", 1.0)
        return self.marginal.log_prob(self.dynamics.z_of(feature), None)

    def atypicality(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """Nats per latent dimension by which ln p(z) lies below the 5 % quantile of real latents; 0 where it does not."""
        return (self.marginal_low - self.log_density(feature)).clamp_min(0) / self.dynamics.latent.size

    @torch.no_grad()
    def fit_typicality(self, latents: Float[Tensor, "N Z"], share: float = 1.0) -> None:
        """Moves `marginal_low`, the 5 % quantile of ln p(z) over real latents, by `share` towards that of these latents."""
        low = self.marginal.log_prob(latents, None).float().quantile(0.05)
        known = self.marginal_low > UNKNOWN
        new = torch.where(known, self.marginal_low.lerp(low, share), low)
        self.marginal_low.copy_(torch.where(low.isfinite(), new, self.marginal_low))  # a NaN would never leave it

    def _update_typicality(self, z: Float[Tensor, "N Z"]) -> None:
        """At every TYPICALITY_EVERY-th update, `fit_typicality` at some of its latents."""
        if not int(self.marginal_age) % TYPICALITY_EVERY:
            self.fit_typicality(z[:: -(-len(z) // TYPICALITY_LATENTS)], TYPICALITY_RATE)
        self.marginal_age += 1

    def _reencoded(self, state: State, sampling: Sampling) -> State:
        """The state after a sampled observation of it is encoded again."""
        obs = self.decoder.sample(self.dynamics.feature(state), sampling)
        return self.dynamics.correct(state, self.encoder(obs), replace(sampling, noise=None))

    @torch.no_grad()
    def encode(self, obs: Any) -> Posterior:
        """q(z | x) of single observations [N, ...] in the environment's own form, as at an episode's first step."""
        rows = {name: torch.as_tensor(x, device=self.device) for name, x in self.obs.to_raw(obs).items()}
        embed = self.encoder(self.preprocess(rows))
        return self.dynamics.posterior(embed, self.dynamics.first_recurrent(len(embed))["h"])

    @torch.no_grad()
    def decode(self, feature: Float[Tensor, "N F"]) -> Obs:
        """The expected observation in canonical form; z alone is enough where the decoder reads the latent.

        Raises ConfigError where the objective has no decoder, ValueError for a feature of another size.
        """
        if self.decoder is None:
            raise ConfigError(
                f"model.objective={self.config.objective.kind} learns no decoder, so features cannot be shown as observations. "
                "Use an objective that reconstructs, such as model.objective=reconstruction."
            )
        if feature.shape[-1] not in (self.feature_dim, self.decoder.in_features):
            raise ValueError(
                f"decode: a feature has {self.feature_dim} numbers, not {feature.shape[-1]}; take one from a trace or a dream."
            )
        return self.scaling.inverse(self.decoder.mean(feature))

    def active_units(self, trace: Trace, threshold: float = 0.01) -> int:
        """How many latent variables have more than `threshold` nats of mutual information with the observation, in this batch.

        Source: Burda et al. 2016, section 5.2 (for Gaussians the variance of the posterior's mean).
        """
        if not isinstance(self.dynamics.latent, CategoricalLatent):
            return active_units(trace.posterior.mean.detach().flatten(0, -2), threshold)
        probs = trace.posterior.probs.detach().flatten(0, -3)
        average = probs.mean(0, keepdim=True)
        gain = (probs * (probs.clamp_min(1e-12).log() - average.clamp_min(1e-12).log())).sum(-1).mean(0)
        return int((gain > threshold).sum())


def active_units(mean: Float[Tensor, "N Z"], threshold: float = 0.01) -> int:
    """Latent dimensions whose posterior mean has a variance above `threshold`. Source: Burda et al. 2016, section 5.2."""
    return int((mean.var(0) > threshold).sum())


def needs_ensemble(world: WorldModel, name: str, value: float | None) -> None:
    """ConfigError where option `name` is set, which needs uncertainty, and the model has no ensemble."""
    if value and not world.has_uncertainty:
        raise ConfigError(
            f"{name}={value:g} needs uncertainty, and the world model has no ensemble. Train with model.ensemble.members=5, or "
            "leave it out."
        )


def needs_marginal(world: WorldModel, name: str, value: float | None) -> None:
    """ConfigError where option `name` is set, which needs ln p(z), and the model has no marginal with a density."""
    if value and (world.marginal is None or world.marginal.density == "none"):
        why = "has no marginal" if world.marginal is None else f"has a {world.config.marginal.kind} marginal, without a density"
        raise ConfigError(
            f"{name}={value:g} needs a marginal p(z), and the world model {why}. Train with model.marginal, or fit one to a "
            "finished run: worldmodel fit-prior RUN --kind flow --slot marginal."
        )


def reward_penalty(world: WorldModel, dream: Dream, uncertainty_penalty: float, typicality_penalty: float) -> Float[Tensor, "B H"]:
    """What is subtracted from a dream's rewards, for uncertainty and for atypical latents, in units of `heads.scale`."""
    penalty = uncertainty_penalty * dream.uncertainty
    return penalty + typicality_penalty * world.atypicality(dream.feature[:, 1:]) if typicality_penalty else penalty


def tensors(rows: dict[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Rows of numpy arrays as tensors on a device."""
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in rows.items()}
