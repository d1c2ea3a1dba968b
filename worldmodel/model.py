"""WorldModel: all that agents, environments and diagnostics ever call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.config import Frozen, Part
from worldmodel.data import Batch, Dream, Loss, Obs, Sampling, State, Trace
from worldmodel.decoders import DecoderConfig
from worldmodel.diamond import DiamondConfig
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
from worldmodel.storage.weights import cpu_randomness, load_arrays

UNKNOWN = -1e30
"""A quantile of log-densities before any code was seen: nothing lies below it."""
TYPICALITY_EVERY, TYPICALITY_LATENTS, TYPICALITY_RATE = 50, 64, 0.2
"""Updates between two looks at how likely real codes are, the codes looked at, and how far their quantile is followed: a look
costs a likelihood, which a diffusion takes a hundred times as long for as for an update of the rest."""
DEFAULT_DISTRIBUTIONS = {"categorical": CategoricalConfig(), "gaussian": GaussianConfig()}


class ModelConfig(Frozen):
    """The parts of a world model; each has its own options."""

    vector_scaling: Literal["standardise", "symlog", "raw"] = Field("standardise", description="scale of vector observations")
    encoder: Part["encoder"] = EncoderConfig()
    decoder: Part["decoder"] = DecoderConfig()
    dynamics: Part["dynamics"] = RSSMConfig()
    transition: Part["distribution"] | None = Field(None, description="p(z_t | h_t); none: the latent's family")
    initial: Part["distribution"] | None = Field(None, description="p(z_0); none: the latent's own family")
    marginal: Part["distribution"] | None = Field(
        None, description="one law for all codes, whose rate trains the encoder; none: without"
    )
    objective: Part["objective"] = ReconstructionConfig()
    heads: Part["heads"] = HeadsConfig()
    ensemble: Part["ensemble"] = EnsembleConfig()
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
                f"model.objective.kind={self.objective.kind} predicts codes that are points and tell of one observation alone: set "
                f"model.dynamics.latent.kind=point (now {self.dynamics.latent.kind}) and model.dynamics.posterior=observation "
                f"(now {posterior}), as model=jepa and model=hybrid do."
            )
        return self

    @model_validator(mode="after")
    def _diamond_is_a_whole_model(self) -> ModelConfig:
        if isinstance(self.dynamics, DiamondConfig):
            slots = ("encoder", "objective", "transition", "initial", "marginal")
            self.dynamics.check({slot: getattr(self, slot) for slot in slots})
        return self


register("group", "model", ModelConfig)(ModelConfig)


def default_distribution(dynamics: Frozen) -> Frozen:
    """The closed form that fills a slot which the config leaves open: the family of the codes of these dynamics."""
    return DEFAULT_DISTRIBUTIONS[build("latent", dynamics.latent).family.kind].replace(units=dynamics.units)


def build_encoder(encoder: Frozen, dynamics: Frozen, obs: ObsSpec) -> nn.Module:
    """The encoder that a config names, or the one that its dynamics has in its place."""
    own = getattr(part("dynamics", dynamics.kind), "Encoder", None)
    return own(encoder, obs) if own else build("encoder", encoder, obs)


class WorldModel(nn.Module):
    """Encoder, dynamics, objective and heads behind five verbs: trace, loss, observe, imagine, encode/decode."""

    def __init__(self, config: ModelConfig, obs: ObsSpec, action: ActionSpec):
        super().__init__()
        self.config, self.obs, self.action = config, obs, action
        own = default_distribution(config.dynamics)
        self.scaling = VectorScaling(config.vector_scaling, obs)
        self.encoder = build_encoder(config.encoder, config.dynamics, obs)
        interface = EncoderInterface({name: key.shape for name, key in obs.keys.items()}, self.encoder.out_features, self._embed)
        self.dynamics = build("dynamics", config.dynamics, interface, action.dim, config.transition or own, config.initial or own)
        self.feature_dim = self.dynamics.feature_dim
        latent = self.dynamics.latent
        self.marginal = None
        if config.marginal is not None:
            self.marginal = build("distribution", config.marginal, latent.family, 0, self.dynamics.source)
            if self.marginal.density != "none":
                self.register_buffer("marginal_low", torch.tensor(UNKNOWN))
                self.register_buffer("marginal_age", torch.tensor(0))
        decoder = build("decoder", config.decoder, obs, self.feature_dim, latent.size)
        decoder = getattr(self.dynamics, "decoder", decoder)  # after both are built: heads have the same first weights
        self.objective = build("objective", config.objective, decoder, self.encoder, self.dynamics, action.dim)
        self.decoder: nn.Module | None = getattr(self.objective, "decoder", None)
        if self.decoder is None and config.rollouts == "observation":
            raise ConfigError(
                f"model.rollouts=observation decodes every step, and model.objective={config.objective.kind} learns no decoder. "
                "Use model.rollouts=latent, or an objective that reconstructs."
            )
        if config.rollouts == "observation" and getattr(self.decoder, "pixelwise_noise", []):
            raise ConfigError(
                f"model.rollouts=observation looks at what is drawn, and model.decoder.kind={config.decoder.kind} draws each pixel "
                f"of '{self.decoder.pixelwise_noise[0]}' on its own: noise that no picture has. Use model.decoder.kind=diffusion (or "
                "latent_diffusion), which draws pictures, or model.rollouts=latent."
            )
        self.heads = build("heads", config.heads, self.feature_dim)
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
        """What the encoder of the moment makes of scaled observations: the one in use may be another than at first."""
        return self.encoder(obs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def initial(self, batch_size: int) -> State:
        """The state before anything was seen."""
        return self.dynamics.initial(batch_size)

    def preprocess(self, rows: dict[str, Tensor]) -> Obs:
        """Raw rows [*N, ...] of the store -> scaled canonical observations."""
        return self.scaling(self.obs.canonical(rows))

    def sample_initial(self, batch_size: int, sampling: Sampling | None = None) -> State:
        """States from nothing: what the initial distribution p(z_0) draws. Raises ConfigError where the dynamics has none."""
        if not hasattr(self.dynamics, "sample_initial"):
            raise ConfigError(f"model.dynamics={self.config.dynamics.kind} has no initial distribution. Start from the replay.")
        return self.dynamics.sample_initial(batch_size, sampling or Sampling())

    def sample_initial_tilted(
        self, score: Callable[[Tensor], Tensor], batch_size: int, strength: float, sampling: Sampling | None = None
    ) -> tuple[State, float]:
        """(states from nothing that score high, effective sample size): draws of p(z_0) exp(strength * score(feature)).

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
        """One pass over a batch whose `obs` is already on the inner scale (see `preprocess`)."""
        batch_size, length = batch.shape
        embed = self.encoder({name: flatten(x) for name, x in batch.obs.items()}).view(batch_size, length, -1)
        state = state if state is not None else self.initial(batch_size)
        trace = self.dynamics.observe(state, embed, batch.prev_action, batch.is_first, sampling or Sampling())[1]
        if self.training and batch.row is not None:
            for prior, rows in self._priors(batch.is_first).values():
                if prior.has_exemplars:
                    prior.replace_exemplars({name: x[rows] for name, x in batch.obs.items()}, trace.h[rows], batch.row[rows])
        return trace

    def _priors(self, is_first: Bool[Tensor, "B T"]) -> dict[str, tuple[ConditionalDistribution, Bool[Tensor, "B T"]]]:
        """{slot: (its law, the rows whose codes it is a law of)} for the slots that are filled."""
        laws = {
            "initial": (getattr(self.dynamics, "initial_prior", None), is_first),
            "transition": (self.dynamics.transition, ~is_first),
            "marginal": (self.marginal, torch.ones_like(is_first)),
        }
        return {slot: (prior, rows) for slot, (prior, rows) in laws.items() if prior is not None and rows.any()}

    @torch.no_grad()
    def measures(self, trace: Trace, is_first: Bool[Tensor, "B T"]) -> dict[str, float]:
        """{"prior/<slot>/<name>": number}: what each law says of itself at the codes of a trace."""
        out = {}
        for slot, (prior, rows) in self._priors(is_first).items():
            seen = prior.measures(trace.z[rows], trace.h[rows] if slot == "transition" else None)
            out |= {f"prior/{slot}/{name}": value for name, value in seen.items()}
        return out

    def update_targets(self) -> None:
        """What goes after the weights takes its step; for a training to call after each of its own."""
        if hasattr(self.objective, "update_target_encoder"):
            self.objective.update_target_encoder(self.encoder, self.dynamics)

    def loss(self, trace: Trace, batch: Batch, sampling: Sampling | None = None) -> dict[str, Loss]:
        """Every term by name, unscaled. "dyn" trains the prior side, "rep" the posterior, where the rate exceeds the free nats."""
        not_first, sampling = ~batch.is_first, sampling or Sampling()
        terms = self.dynamics.losses(trace, batch, sampling) | self.objective(trace, batch, sampling, self.dynamics)
        terms |= self._marginal(trace, sampling, batch.row)
        rows = {"mask": not_first, "weight": batch.weight}  # dreams get from these what experience gave on average
        terms["reward"] = Loss(self.heads.reward_loss(trace.feature, batch.reward), **rows)
        terms["continue"] = Loss(self.heads.cont_loss(trace.feature, 1 - batch.is_terminal.to(trace.feature)), **rows)
        if self.ensemble is not None:
            after = trace.embed[:, 1:]
            terms["ensemble"] = self.ensemble.loss(trace.feature[:, :-1], batch.prev_action[:, 1:], after, not_first[:, 1:])
        return terms

    def _marginal(self, trace: Trace, sampling: Sampling, rows: Tensor | None) -> dict[str, Loss]:
        """The rate against the one law of all codes, and what that law itself learns from where the rate does not train it."""
        prior, options = self.marginal, {"sampling": sampling.substream("marginal"), "rows": rows}
        if prior is None:
            return {}
        exact = prior.density == "exact"
        terms = {}
        if self.training and prior.density != "none":
            if not int(self.marginal_age) % TYPICALITY_EVERY:
                latents = trace.z.detach().flatten(0, -2)
                self.fit_typicality(latents[:: -(-len(latents) // TYPICALITY_LATENTS)], TYPICALITY_RATE)
            self.marginal_age += 1
        if not self.dynamics.latent.deterministic:
            latents = prior.antithetic(trace.posterior, trace.z)
            both = [prior.rate(trace.posterior, z, None, frozen=not exact, **options) for z in latents]
            terms["marginal"] = Loss(sum(both) / len(both))
        if not exact or self.dynamics.latent.deterministic:
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
        """The state after one real step, from raw observation rows [B, ...]; no gradient."""
        embed = self.encoder(self.preprocess(obs)).unsqueeze(1)
        prev_action = torch.where(is_first.unsqueeze(-1), torch.zeros_like(prev_action), prev_action)
        sampling = sampling or Sampling()
        return self.dynamics.observe(state, embed, prev_action.unsqueeze(1), is_first.unsqueeze(1), sampling)[0]

    def imagine(
        self, state: State, policy: Callable[[Tensor, int], Tensor], horizon: int, sampling: Sampling | None = None
    ) -> Dream:
        """Roll forward without looking; `policy(feature, step)` gives canonical actions [B, A], kept as given in the dream.

        With model.rollouts=observation each step is one of observations: decoded by a draw, and looked at.
        """
        sampling = sampling or Sampling()
        features, actions = [self.dynamics.feature(state)], []
        for step in range(horizon):
            actions.append(policy(features[-1], step))
            state = self.dynamics.imagine(state, self.action.project(actions[-1]), sampling)
            if self.config.rollouts == "observation":
                state = self._reencoded(state, sampling)
            features.append(self.dynamics.feature(state))
        rows = torch.stack(features)  # [H+1, B, F]: time first, so that what follows reads it without a copy
        reward, cont = (head(rows[1:]).transpose(0, 1) for head in (self.heads.reward, self.heads.cont))
        uncertainty = torch.zeros_like(reward)
        if self.ensemble is not None:
            uncertainty = self.ensemble.disagreement(rows[:-1], self.action.project(torch.stack(actions))).transpose(0, 1)
        return Dream(torch.stack(actions, 1), reward, cont, uncertainty, rows.transpose(0, 1), state)

    def log_density(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """ln p of a feature's code under the marginal, in nats; up to a constant where that law is unnormalised.

        Raises ConfigError where there is no marginal, or one without a density.
        """
        needs_marginal(self, "log_density", 1.0)
        return self.marginal.log_prob(self.dynamics.z_of(feature), None)

    def atypicality(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """Nats per number of the code by which a feature is less likely than 95 % of real codes; 0 where it is not."""
        return (self.marginal_low - self.log_density(feature)).clamp_min(0) / self.dynamics.latent.size

    @torch.no_grad()
    def fit_typicality(self, latents: Float[Tensor, "N Z"], share: float = 1.0) -> None:
        """`marginal_low`, the 5 % quantile of real codes' log-density, goes by `share` towards that of these codes."""
        low = self.marginal.log_prob(latents, None).float().quantile(0.05)
        known = self.marginal_low > UNKNOWN
        new = torch.where(known, self.marginal_low.lerp(low, share), low)
        self.marginal_low.copy_(torch.where(low.isfinite(), new, self.marginal_low))  # as running moments: it would not leave again

    def _reencoded(self, state: State, sampling: Sampling) -> State:
        """The state after looking at the observation that it would give: what the decoder knows of the world corrects the code."""
        obs = self.decoder.sample(self.dynamics.feature(state), sampling)
        return self.dynamics.correct(state, self.encoder(obs), replace(sampling, noise=None))

    @torch.no_grad()
    def encode(self, obs) -> Posterior:
        """The belief about z from single observations [N, ...] in the environment's own form, as at an episode's first step."""
        rows = {name: torch.as_tensor(x, device=self.device) for name, x in self.obs.to_raw(obs).items()}
        embed = self.encoder(self.preprocess(rows))
        return self.dynamics.posterior(embed, self.dynamics.first_recurrent(len(embed))["h"])

    @torch.no_grad()
    def decode(self, feature: Float[Tensor, "N F"]) -> Obs:
        """The expected observation in canonical form; a code alone is enough where the decoder reads the latent.

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
        """How many variables of the code carry more than `threshold` nats against their own average over the batch.

        Source: Burda et al. 2016, section 5.2 (for Gaussians the variance of the posterior's mean).
        """
        if not isinstance(self.dynamics.latent, CategoricalLatent):
            return active_units(trace.posterior.mean.detach().flatten(0, -2), threshold)
        probs = trace.posterior.probs.detach().flatten(0, -3)
        average = probs.mean(0, keepdim=True)
        gain = (probs * (probs.clamp_min(1e-12).log() - average.clamp_min(1e-12).log())).sum(-1).mean(0)
        return int((gain > threshold).sum())


def active_units(mean: Float[Tensor, "N Z"], threshold: float = 0.01) -> int:
    """Numbers of the code whose mean differs between observations, with a variance above `least`. Source: Burda et al. 2016."""
    return int((mean.var(0) > threshold).sum())


def needs_ensemble(world: WorldModel, name: str, value: float | None) -> None:
    """ConfigError where an option that speaks of uncertainty is set, and the model has none."""
    if value and world.ensemble is None:
        raise ConfigError(
            f"{name}={value:g} needs uncertainty, and the world model has no ensemble. Train with model.ensemble.members=5, or "
            "leave it out."
        )


def needs_marginal(world: WorldModel, name: str, value: float | None) -> None:
    """ConfigError where an option that speaks of how likely codes are is set, and the model does not know."""
    if value and (world.marginal is None or world.marginal.density == "none"):
        why = "has no marginal" if world.marginal is None else f"has a {world.config.marginal.kind} marginal, without a density"
        raise ConfigError(
            f"{name}={value:g} needs a law of all codes, and the world model {why}. Train with model.marginal, or fit one to a "
            "finished run: worldmodel fit-prior RUN --kind flow --slot marginal."
        )


def reward_penalty(world: WorldModel, dream: Dream, uncertainty_penalty: float, typicality_penalty: float) -> Float[Tensor, "B H"]:
    """What is taken off a dream's rewards: for the ensemble's uncertainty, and for codes unlike real ones.

    In units of the rewards' own size, `heads.scale`: the same options are as strong whatever rewards are counted in.
    """
    penalty = uncertainty_penalty * dream.uncertainty
    return penalty + typicality_penalty * world.atypicality(dream.feature[:, 1:]) if typicality_penalty else penalty


def tensors(rows: dict[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Rows of numpy arrays as tensors on a device."""
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in rows.items()}
