"""VampPrior: a mixture of the model's own posteriors at pseudo-inputs, so that the prior is made of what the encoder says."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Obs
from worldmodel.distributions.base import Latent, PosteriorSource
from worldmodel.distributions.mixture import Components, MixtureForm, network
from worldmodel.errors import ConfigError
from worldmodel.registry import register


class VampConfig(Frozen):
    """How many pseudo-inputs there are, and where they live."""

    kind: Literal["vamp"] = "vamp"
    pseudo_inputs: Literal["observation", "feature", "exemplar"] = Field(
        "observation",
        description="pseudo-inputs are learned observations, learned embeddings, or observations that came (exemplars)",
    )
    components: int = Field(32, ge=2, description="pseudo-inputs, each of them a component of the mixture")
    weights: Literal["equal", "learned"] = Field("equal", description="weights without a context; with one a network gives them")
    renew: int = Field(8, ge=1, description="exemplars replaced at each update")
    units: int = Field(128, ge=1, description="width of the network from context to weights")
    layers: int = Field(1, ge=0, description="hidden layers of that network")


@register("distribution", "vamp", VampConfig)
class VampPrior(MixtureForm):
    """p(z | h) = sum_k w_k(h) q(z | u_k, h): the posterior q at K pseudo-inputs u_k. Without context weights are free or equal.

    observation  u_k are learned observations, seen through the encoder: the paper's
    feature      u_k are learned embeddings; only the posterior's head is run again, as imagining needs
    exemplar     u_k are observations of the replay; each is left out of the law of its own row

    A posterior that reads the carry gets the context in its place, or without a context a carry of each pseudo-input's own,
    learned (exemplar: the one it came with). The components train the encoder wherever the rate trains this law.
    Source: Tomczak and Welling 2018, eq. 9 to 11; exemplars: Norouzi et al. 2020 (Exemplar VAE), eq. 4 and section 3.
    """

    of_posteriors = True

    def __init__(self, config: VampConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        if source is None:
            raise ConfigError(
                "A vamp law is made of a model's own posteriors and was given none. Use it as model.transition, model.initial or "
                "model.marginal of a model whose codes are beliefs, not within another law; else take distribution 'mixture'."
            )
        if context_dim and source.h_dim not in (0, context_dim):
            raise ConfigError(
                f"vamp: its context has {context_dim} numbers, but the posterior reads a carry of {source.h_dim}. "
                "Let the posterior look at the observation alone (model.dynamics.posterior=observation), or take 'mixture'."
            )
        k, self.source, self.config = config.components, source, config
        self.pseudo_h = 0 if context_dim else source.h_dim  # numbers of carry that pseudo-inputs bring along
        exemplar = config.pseudo_inputs == "exemplar"
        if config.pseudo_inputs == "feature":
            pseudo = {"embed": torch.randn(k, source.encoder.size)}
        else:
            shapes = source.encoder.shapes
            pseudo = {
                f"input{i}": self._initial_values(torch.randn(k, *shape), exemplar) for i, shape in enumerate(shapes.values())
            }
        if self.pseudo_h:
            pseudo["h"] = 0.1 * torch.randn(k, self.pseudo_h)
        for name, value in pseudo.items():
            if exemplar:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        if exemplar:
            self.register_buffer("row", torch.full((k,), -1, dtype=torch.int64))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        if context_dim:
            self.net = network(latent, context_dim, config.units, config.layers, k)
        elif config.weights == "learned":
            self.logits = nn.Parameter(torch.zeros(1, k))

    @staticmethod
    def _initial_values(noise: Tensor, exemplar: bool) -> Tensor:
        """Vectors as standardised ones are; images around grey: before the sigmoid where they are learned, else behind it."""
        return torch.sigmoid(noise) if exemplar and noise.ndim == 4 else noise

    @torch.no_grad()
    def init_pseudo_inputs(self, obs: Obs, h: Float[Tensor, "N D"] | None = None, rows: Int[Tensor, " N"] | None = None) -> None:
        """Pseudo-inputs start at the first K of these observations, and not at noise, with their carries where they bring some.

        rows   the observations' row numbers, so that exemplars are left out of the law of their own rows; without: of none
        Raises ValueError where there are fewer than K.
        """
        k = self.config.components
        given = {name: obs[name][:k] for name in self.source.encoder.shapes}
        if any(len(x) < k for x in given.values()):
            raise ValueError(f"{k} pseudo-inputs cannot start at {min(map(len, given.values()))} observations. Give more.")
        if self.pseudo_h and h is not None:
            self.h.copy_(h[:k])
        if self.has_exemplars:
            self.row.copy_(torch.full_like(self.row, -1) if rows is None else rows[:k])
        if self.config.pseudo_inputs == "feature":
            self.embed.copy_(self.source.encoder.encode(given))
            return
        for i, x in enumerate(given.values()):
            learned = x.ndim == 4 and self.config.pseudo_inputs == "observation"
            getattr(self, f"input{i}").copy_(torch.logit(x.clamp(0.05, 0.95)) if learned else x)  # finite, and not saturated

    def embeddings(self) -> Float[Tensor, "K E"]:
        """The pseudo-inputs as the posterior is given them."""
        if self.config.pseudo_inputs == "feature":
            return self.embed
        own = {name: getattr(self, f"input{i}") for i, name in enumerate(self.source.encoder.shapes)}
        if self.config.pseudo_inputs == "observation":
            own = {name: torch.sigmoid(u) if u.ndim == 4 else u for name, u in own.items()}
        return self.source.encoder.encode(own)

    def components(self, context: Tensor | None, rows: Tensor | None = None) -> Components:
        """`rows` [*N]: an exemplar of the same row does not count, so that no code is explained by itself."""
        embed = self.embeddings()
        if self.context_dim and self.source.h_dim:
            embed, h = embed.expand(*[1] * (context.ndim - 1), -1, -1), context.unsqueeze(-2)
        else:
            h = self.h if self.pseudo_h else embed.new_zeros(len(embed), 0)
        log_weights = self._log_weights(context, embed)
        if rows is not None and self.config.pseudo_inputs == "exemplar":
            own = rows.unsqueeze(-1) == self.row
            log_weights = torch.log_softmax(log_weights.masked_fill(own, -torch.inf), -1)
        return Components(log_weights, self.source.posterior(embed, h))

    def _log_weights(self, context: Tensor | None, embed: Tensor) -> Float[Tensor, "*N K"]:
        if self.context_dim:
            return torch.log_softmax(self.net(context).float(), -1)
        if self.config.weights == "learned":
            return torch.log_softmax(self.logits.float(), -1)
        k = self.config.components
        return torch.full((1, k), -math.log(k), device=embed.device)

    @property
    def has_exemplars(self) -> bool:
        """Whether `remember` does anything."""
        return self.config.pseudo_inputs == "exemplar"

    @torch.no_grad()
    def replace_exemplars(self, obs: Obs, h: Float[Tensor, "N D"], rows: Int[Tensor, " N"]) -> None:
        """Some of these observations, with their carries and row numbers, take the places of the oldest exemplars.

        They are taken at even distances; rows that are exemplars already, or not finite, are passed over. The buffers are replaced
        and not changed, since a loss that is yet to be differentiated may hold them.
        """
        ordered, at = rows.sort()
        once = torch.ones_like(ordered, dtype=torch.bool)
        once[1:] = ordered[1:] != ordered[:-1]
        at = at[once & ~torch.isin(ordered, self.row)]
        for x in (*(obs[name] for name in self.source.encoder.shapes), h):
            at = at[x[at].flatten(1).isfinite().all(1)]
        count = min(self.config.renew, self.config.components, len(at))
        if not count:
            return
        at = at[torch.arange(count, device=at.device) * len(at) // count]
        places = (self.oldest + torch.arange(count, device=at.device)) % self.config.components
        new = {f"input{i}": obs[name] for i, name in enumerate(self.source.encoder.shapes)} | {"row": rows}
        if self.pseudo_h:
            new["h"] = h
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, places, value[at].to(old)))
        self.oldest = (self.oldest + count) % self.config.components
