"""Anchored dynamics: the latent is the observation itself, and the transition predicts how it changes.

    z_t = [categories, bits, vectors as observed | a Gaussian latent of the pictures]
    c_{t-1} = (z_{t-1} - z_{t-2}) / s                 s, b: running deviation and mean of the changes
    m_t, n_t = GRU(m_{t-1} or n_{t-1}, z_{t-1}, c_{t-1}, a_{t-1})
    h_t = [n_t, m_t, z_{t-1}, c_{t-1}, a_{t-1}]
    (z_t - z_{t-1} - b) / s ~ p(. | m_t, z_{t-1}, c_{t-1}, a_{t-1})

Vectors, categories and bits are reconstructed exactly, since nothing is inferred: the rate of a row is what its observation costs
to say, -ln p(z_t | h_t). Pictures have a posterior, a decoder and a rate, as in a VAE. What does not change is predicted from the
first update on. What an observation hides of the world, m remembers, and what rewards and ends depend on, n: their gradients,
whose size does not fall with the transition's error, reach no part of the transition.

`model.transition` chooses the distribution of changes: left open, an ensemble of Gaussians; else a mixture, a flow, ...
Source: Deisenroth and Rasmussen 2011 (PILCO) and Chua et al. 2018 (PETS) for predicted changes and the ensemble.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Loss, Obs, Sampling, State, Trace
from worldmodel.decoders import DecoderConfig
from worldmodel.distributions import EncoderInterface, EnsembleGaussianConfig, PointLatentConfig
from worldmodel.distributions.anchored import Anchor, AnchoredLatent, Change, Reads
from worldmodel.dynamics.base import Dynamics, RecurrentState
from worldmodel.encoders import RANGE, EncoderConfig, convolution
from worldmodel.nn.networks import EnsembleLinear, ParallelGRU, SkipMLP
from worldmodel.registry import build, register
from worldmodel.spaces import ObsSpec

# Encode and decode ------------------------------------------------------------------------------------------------------


class AnchoredEncoder(nn.Module):
    """Scaled canonical observations -> [convolutions of the pictures, all else as it is], [N, E]."""

    def __init__(self, config: EncoderConfig, spec: ObsSpec):
        super().__init__()
        self.anchor = Anchor.of(spec)
        self.images = [name for name, key in spec.keys.items() if key.kind == "image"]
        self.convolutions = nn.ModuleList(convolution(spec.keys[name], config.depth) for name in self.images)
        self.out_features = sum(c.out_features for c in self.convolutions) + self.anchor.size

    def forward(self, obs: Obs) -> Float[Tensor, "N E"]:
        parts = [conv(obs[name]) for name, conv in zip(self.images, self.convolutions, strict=True)]
        return torch.cat([*parts, *(obs[name] for name in self.anchor.keys)], -1)


class AnchoredDecoder(nn.Module):
    """What is anchored is read off the latent; pictures have the decoder that the config names, which knows no other keys."""

    def __init__(self, config: DecoderConfig, spec: ObsSpec, feature_dim: int, latent: AnchoredLatent):
        super().__init__()
        self.latent_size, self.anchor = latent.size, latent.anchor
        pictures = ObsSpec({name: key for name, key in spec.keys.items() if key.kind == "image"})
        self.pictures = build("decoder", config, pictures, feature_dim, latent.code.size) if pictures.keys else None
        self.pixelwise_noise = getattr(self.pictures, "pixelwise_noise", [])
        self.in_features = self.latent_size if self.pictures is None else max(self.latent_size, self.pictures.in_features)

    def _seen(self, feature: Tensor) -> Obs:
        return self.anchor.split(feature[..., feature.shape[-1] - self.latent_size :])

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        """Scaled observations {key: [N, ...]}, of features or of latents alone."""
        return self._seen(feature) | ({} if self.pictures is None else self.pictures.mean(feature))

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """The latent's own numbers, which are a draw already, and drawn pictures."""
        return self._seen(feature) | ({} if self.pictures is None else self.pictures.sample(feature, sampling))

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """That of the pictures, [N]; nothing where there are none."""
        return {} if self.pictures is None else self.pictures.loss(feature, obs, sampling)


class AnchoredPosteriorNet(nn.Module):
    """Embedding -> parameters of the posterior: what is anchored, and mean and deviation of the pictures' latent."""

    def __init__(self, embed_dim: int, units: int, layers: int, latent: AnchoredLatent):
        super().__init__()
        self.pictures = embed_dim - latent.anchor.size
        self.net = SkipMLP(self.pictures, units, layers, latent.code.parameters) if self.pictures else None

    def forward(self, embed: Float[Tensor, "*N E"]) -> Float[Tensor, "*N P"]:
        pictures, anchored = embed[..., : self.pictures], embed[..., self.pictures :]
        return torch.cat([anchored, pictures if self.net is None else self.net(pictures)], -1)


# Observe and imagine ----------------------------------------------------------------------------------------------------


class AnchoredConfig(Frozen):
    """Sizes of the memories and of the pictures' latent."""

    latent: ClassVar[PointLatentConfig] = PointLatentConfig()
    """Latents are points, but for that of pictures; the observation says their size."""

    own_transition: ClassVar[EnsembleGaussianConfig] = EnsembleGaussianConfig()
    """Of changes, where `model.transition` is left open."""

    kind: Literal["anchored"] = "anchored"
    deter: int = Field(
        32,
        ge=1,
        description="size of the memory m, which the transition reads, and of n, which rewards, ends and agents read beside it",
    )
    units: int = Field(64, ge=1, description="width of the layers in front of each")
    code: int = Field(16, ge=1, description="numbers that stand for all pictures of an observation, if it has any")
    posterior: Literal["observation"] = Field("observation", description="the latent is the observation itself")
    posterior_layers: int = Field(1, ge=1, description="hidden layers of the posterior of the pictures' latent")

    def check(self, parts: dict[str, Frozen | None]) -> None:
        """ValueError where {option of model: its config} chooses a part that has no place beside such a latent."""
        for name, kind in (("encoder", "standard"), ("objective", "reconstruction")):
            if (part := parts[name]) is not None and part.kind != kind:
                raise ValueError(
                    f"model.{name}.kind={part.kind} has no place beside model.dynamics.kind=anchored, whose latent is the "
                    "observation itself and not learned: leave it out, or use other dynamics, such as model=gaussian or model=jepa."
                )


class Memories(nn.Module):
    """Recurrent states n and m, which share no weight: inputs [B, T, I] -> [n, m] [B, T, 2 D]; `is_first` resets them."""

    COUNT = 2

    def __init__(self, inputs: int, units: int, size: int):
        super().__init__()
        self.inputs = EnsembleLinear(self.COUNT, inputs, units, offset=True)
        self.gru = ParallelGRU(self.COUNT, units, size)

    def forward(
        self, inputs: Float[Tensor, "B T I"], state: Float[Tensor, "B S"], is_first: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T S"]:
        rows, length = is_first.shape
        by_time = inputs.transpose(0, 1).flatten(0, 1).expand(self.COUNT, -1, -1)
        projected = self.gru.inputs(F.silu(self.inputs(by_time))).unflatten(1, (length, rows))
        h, keep = state.view(rows, self.COUNT, -1).transpose(0, 1), (~is_first).to(inputs).unsqueeze(-1)
        resets, steps = is_first.any(0).tolist(), []
        for t in range(length):
            h = self.gru(projected[:, t], h * keep[:, t] if resets[t] else h)
            steps.append(h)
        return torch.stack(steps).permute(2, 0, 1, 3).flatten(2)


@register("dynamics", "anchored", AnchoredConfig)
class AnchoredDynamics(Dynamics):
    """State, [N, ...]: z; h = [n_t, m_t, z_{t-1}, c_{t-1}, a_{t-1}, known]; `known`, whether z was seen or imagined;
    `member`, the number of the ensemble's member that imagines it, from 1 (0: none yet); `uncertainty`, the deviation between
    the members' predictions of z, 0 where it was observed.

    One member imagines a whole roll-out (trajectory sampling TS-infinity of PETS), so that draws differ by what the members do.
    """

    Encoder = AnchoredEncoder
    """Replaces the encoder that the config of a model names."""
    Decoder = AnchoredDecoder
    """Replaces the decoder, which then is that of pictures alone."""

    def _make_latent(self, encoder: EncoderInterface) -> AnchoredLatent:
        self.anchor = encoder.anchor
        return AnchoredLatent(self.anchor, self.config.code if encoder.size > self.anchor.size else 0)

    @property
    def h_dim(self) -> int:
        return Memories.COUNT * self.config.deter + self.latent.size + self.latent.numbers + self.action_dim + 1

    @property
    def combined_dim(self) -> int:
        return self.latent.size + self.action_dim

    def _make_inputs(self, action_dim: int) -> None:
        """Nothing: latent and action stay as they are."""

    def combine(self, z: Float[Tensor, "*N Z"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N X"]:
        return torch.cat([z, action], -1)

    def _make_recurrence(self) -> None:
        self.memories = Memories(self.combined_dim + self.latent.numbers, self.config.units, self.config.deter)

    def _make_posterior(self, embed_dim: int) -> int:
        self.posterior_net = AnchoredPosteriorNet(embed_dim, self.config.units, self.config.posterior_layers, self.latent)
        return 0

    def _make_prior(self, config: Frozen, context_dim: int) -> Change:
        return Change(config, self.latent, context_dim, self.source, self._reads if context_dim else None, RANGE)

    @property
    def _reads(self) -> Reads:
        """What the transition reads of h."""
        first, before = self.config.deter, Memories.COUNT * self.config.deter
        return Reads(first, before, before + self.latent.size)

    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        sizes = {"h": self.h_dim, "known": 1, "member": 1, "uncertainty": 1}
        return {name: self.memories.inputs.weight.new_zeros(batch_size, size) for name, size in sizes.items()}

    def compile_step(self) -> None:
        self.memories.gru.compile()

    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        first = torch.zeros(len(combined), 1, dtype=torch.bool, device=combined.device)
        after = self.unroll(recurrent, combined.unsqueeze(1), first, None)
        return {name: x[:, 0] for name, x in after.items()}

    def unroll(
        self,
        recurrent: RecurrentState,
        combined: Float[Tensor, "B T X"],
        is_first: Bool[Tensor, "B T"],
        generator: torch.Generator | None,
    ) -> RecurrentState:
        keep, h, reads = (~is_first).to(combined).unsqueeze(-1), recurrent["h"], self._reads
        known = torch.cat([recurrent["known"].unsqueeze(1), torch.ones_like(keep[:, 1:])], 1) * keep
        z, action = combined.split([self.latent.size, self.action_dim], -1)
        before = torch.cat([h[:, None, reads.before : reads.after], z[:, :-1]], 1)
        both = known * torch.cat([h[:, None, -1:], known[:, :-1]], 1)
        change = both * (z - before)[..., self.anchor.discrete :] / self.transition.deviation
        memories = self.memories(torch.cat([combined, change], -1), h[:, : reads.before], is_first)
        zeros = torch.zeros_like(known)
        h = torch.cat([memories, z, change, action, known], -1)
        return {"h": h, "known": torch.ones_like(known), "member": zeros, "uncertainty": zeros}

    def observe(self, *arguments) -> tuple[State, Trace]:
        """As of all dynamics; what reads the features of a trace trains no part of the transition."""
        last, trace = super().observe(*arguments)
        own, rest = trace.states["h"].tensor_split([self._reads.first], -1)
        states = State({**trace.states, "h": torch.cat([own, rest.detach()], -1)})
        return last, replace(trace, feature=self.feature(states))

    @property
    def has_members(self) -> bool:
        """Whether the transition is an ensemble, whose disagreement is an uncertainty."""
        return self.transition.members > 0

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without an observation, by the member that the state names. At the first step members are drawn so that rows
        beside one another have different ones, and each is as frequent as the others: a stratified draw."""
        recurrent = self.advance(self._recurrent(state), self.combine(state["z"], action))
        members, member = self.transition.members, state["member"]
        if members and not sampling.mode:
            first = torch.randint(members, (1,), generator=sampling.generator, device=member.device)
            rows = torch.arange(len(member), device=member.device).unsqueeze(-1)
            member = torch.where(member > 0, member, ((first + rows) % members + 1).to(member))
        chosen = member.squeeze(-1).long() - 1 if members else None
        z, uncertainty = self.transition.draw(recurrent["h"], 1, sampling, chosen)
        return State({**recurrent, "member": member, "uncertainty": uncertainty.unsqueeze(-1), "z": z[0]})

    def calibrate(self, used: AnchoredDynamics, trace: Trace, is_first: Bool[Tensor, "B T"]) -> None:
        """Fits predicted deviations to the errors of the model in use, at its own trace."""
        self.transition.calibrate(used.transition, trace.z[~is_first], trace.h[~is_first])

    def losses(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """The rate of each row, and the part of it that trains the posterior of the pictures' latent.

            dyn   losses of the transition and, at an episode's first row, of the initial distribution: -ln p(z_t | h_t)
            rep   KL(q(code) || p) in which p is fixed; only where there are pictures

        Both in nats where the distribution of changes has an exact density.
        """
        dyn, rep = (torch.zeros_like(trace.z[..., 0]) for _ in range(2))
        unit = "nats"
        for slot, prior, where, context in (
            ("transition", self.transition, ~batch.is_first, trace.h),
            ("initial", self.initial_prior, batch.is_first, None),
        ):
            if not where.any():
                continue
            context, rows = (None if x is None else x[where] for x in (context, batch.row))
            posterior, z = trace.posterior.index(where), trace.z[where]
            for term in prior.loss(z.detach(), context, sampling=sampling.substream(slot), rows=rows).values():
                unit = unit if term.unit == "nats" else term.unit
                dyn = dyn + (dyn.new_zeros(dyn.shape).masked_scatter(where, term.value) if term.value.ndim else term.value)
            if self.latent.code.size:
                draws = prior.antithetic(posterior, z)
                rate = sum(prior.rate(posterior, draw, context, frozen=True, sampling=sampling) for draw in draws) / len(draws)
                rep = rep.masked_scatter(where, rate)
        return {"dyn": Loss(dyn, unit), **({"rep": Loss(rep)} if self.latent.code.size else {})}
