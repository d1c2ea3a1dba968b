"""VampPrior: a mixture of the model's own posteriors at pseudo-inputs."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Obs
from worldmodel.distributions.base import PosteriorSource
from worldmodel.distributions.latent import Latent
from worldmodel.distributions.mixture import Components, MixtureForm, network
from worldmodel.errors import ConfigError
from worldmodel.registry import register


class VampConfig(Frozen):
    """How many pseudo-inputs there are, and what they are."""

    kind: Literal["vamp"] = "vamp"
    pseudo_inputs: Literal["observation", "feature", "exemplar"] = Field(
        "observation", description="learned observations, learned embeddings, or observations of the replay (exemplars)"
    )
    components: int = Field(32, ge=2, description="pseudo-inputs, each of them a component of the mixture")
    weights: Literal["equal", "learned"] = Field("equal", description="weights without a context; with one a network gives them")
    renew: int = Field(8, ge=1, description="exemplars replaced at each update")
    units: int = Field(128, ge=1, description="width of the network from context to weights")
    layers: int = Field(1, ge=0, description="hidden layers of that network")


@register("distribution", "vamp", VampConfig)
class VampPrior(MixtureForm):
    """p(z | h) = sum_k w_k(h) q(z | u_k, h): the posterior q at K pseudo-inputs u_k.

    | pseudo_inputs | u_k is | its arrays are |
    |---|---|---|
    | observation | a learned observation, as in the paper | parameters `input0`, ... one for each key of the observation |
    | feature | a learned embedding, so that the encoder is not run | parameter `embed` |
    | exemplar | an observation of the replay | buffers `input0`, ... and `row`, its number in the replay, -1 while it has none |

    A posterior that reads the recurrent state h (filtering) is given the context as h. Without a context each pseudo-input has an
    h of its own: a parameter, or for an exemplar the one that was observed with it. With a context a network gives the weights
    w_k; without one they are learned or equal. Wherever the rate trains this prior, it trains the encoder through it, too.

    Exemplars: z of row r is not explained by the exemplar of row r (leave-one-out), and each update replaces the oldest ones.
    Source: Tomczak and Welling 2018, eq. 9 to 11; exemplars: Norouzi et al. 2020 (Exemplar VAE), eq. 4 and section 3.
    """

    of_posteriors = True

    def __init__(self, config: VampConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        if source is None:
            raise ConfigError(
                "A vamp prior is made of a model's own posteriors and was given none. Use it as model.transition, model.initial or "
                "model.marginal of a model that has posteriors, not within another distribution; else take distribution 'mixture'."
            )
        if context_dim and source.h_dim not in (0, context_dim):
            raise ConfigError(
                f"vamp: its context has {context_dim} numbers, but the posterior reads a recurrent state of {source.h_dim}. "
                "Let the posterior read the observation alone (model.dynamics.posterior=observation), or take 'mixture'."
            )
        k, self.config, self.source = config.components, config, source
        self.num_pseudo_inputs, self.has_exemplars = k, config.pseudo_inputs == "exemplar"
        self.keys = {f"input{i}": key for i, key in enumerate(source.encoder.shapes)}
        """Array of pseudo-inputs -> key of the observation."""
        self.has_own_h = source.h_dim > 0 and not context_dim
        if config.pseudo_inputs == "feature":
            self._add("embed", torch.randn(k, source.encoder.size))
        else:
            for name, key in self.keys.items():
                noise = torch.randn(k, *source.encoder.shapes[key])
                self._add(name, torch.sigmoid(noise) if self.has_exemplars and noise.ndim == 4 else noise)
        if self.has_own_h:
            self._add("h", 0.1 * torch.randn(k, source.h_dim))
        if self.has_exemplars:
            self.register_buffer("row", torch.full((k,), -1, dtype=torch.int64))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        if context_dim:
            self.net = network(latent, context_dim, config.units, config.layers, k)
        elif config.weights == "learned":
            self.logits = nn.Parameter(torch.zeros(1, k))

    def _add(self, name: str, value: Tensor) -> None:
        """An array of pseudo-inputs: a buffer of exemplars, else a parameter."""
        if self.has_exemplars:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))

    # The mixture

    def given(self, context: Tensor | None, rows: Tensor | None = None) -> Components:
        embed = self.embeddings()
        log_weights = self._log_weights(context, embed.device)
        if rows is not None and self.has_exemplars:
            own = rows.unsqueeze(-1) == self.row  # [*N, K]
            log_weights = torch.log_softmax(log_weights.masked_fill(own, -torch.inf), -1)
        if self.has_own_h:
            h = self.h
        elif self.source.h_dim:
            embed, h = embed.expand(*[1] * (context.ndim - 1), -1, -1), context.unsqueeze(-2)  # [*1, K, E], [*N, 1, D]
        else:
            h = embed.new_zeros(len(embed), 0)
        return Components(log_weights, self.source.posterior(embed, h))

    def embeddings(self) -> Float[Tensor, "K E"]:
        """The embeddings of the pseudo-inputs."""
        if self.config.pseudo_inputs == "feature":
            return self.embed
        return self.source.encoder.encode({key: self._as_observation(getattr(self, name)) for name, key in self.keys.items()})

    def _log_weights(self, context: Tensor | None, device: torch.device) -> Float[Tensor, "*N K"]:
        if self.context_dim:
            return torch.log_softmax(self.net(context).float(), -1)
        if self.config.weights == "learned":
            return torch.log_softmax(self.logits.float(), -1)
        k = self.config.components
        return torch.full((1, k), -math.log(k), device=device)

    # Pseudo-inputs from observations. Learned images are stored as logits, so that their pixels stay between 0 and 1.

    def _has_logits(self, x: Tensor) -> bool:
        return x.ndim == 4 and not self.has_exemplars

    def _as_observation(self, stored: Tensor) -> Tensor:
        return torch.sigmoid(stored) if self._has_logits(stored) else stored

    def _as_stored(self, x: Tensor) -> Tensor:
        return torch.logit(x.clamp(0.05, 0.95)) if self._has_logits(x) else x  # finite, and not saturated

    @torch.no_grad()
    def init_pseudo_inputs(self, obs: Obs, h: Float[Tensor, "N D"] | None = None, rows: Int[Tensor, " N"] | None = None) -> None:
        """Without `rows` exemplars are of no row. Raises ValueError where there are fewer than K observations."""
        k = self.config.components
        first = {key: obs[key][:k] for key in self.keys.values()}
        if any(len(x) < k for x in first.values()):
            raise ValueError(f"{k} pseudo-inputs cannot start at {min(map(len, first.values()))} observations. Give more.")
        if self.has_own_h and h is not None:
            self.h.copy_(h[:k])
        if self.has_exemplars:
            self.row.copy_(torch.full_like(self.row, -1) if rows is None else rows[:k])
        if self.config.pseudo_inputs == "feature":
            self.embed.copy_(self.source.encoder.encode(first))
            return
        for name, key in self.keys.items():
            getattr(self, name).copy_(self._as_stored(first[key]))

    @torch.no_grad()
    def replace_exemplars(self, obs: Obs, h: Float[Tensor, "N D"], rows: Int[Tensor, " N"]) -> None:
        """`renew` of the rows, evenly spaced, replace the oldest exemplars.

        Buffers are replaced and not changed in place, since a loss that is yet to be differentiated may hold them.
        """
        if not self.has_exemplars:
            return
        new = {name: obs[key] for name, key in self.keys.items()}
        candidates = self._candidates([*new.values(), h], rows)
        count = min(self.config.renew, self.config.components, len(candidates))
        if not count:
            return
        steps = torch.arange(count, device=rows.device)
        chosen = candidates[steps * len(candidates) // count]
        oldest = (self.oldest + steps) % self.config.components
        new["row"] = rows
        if self.has_own_h:
            new["h"] = h
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, oldest, value[chosen].to(old)))
        self.oldest = (self.oldest + count) % self.config.components

    def _candidates(self, arrays: list[Tensor], rows: Int[Tensor, " N"]) -> Int[Tensor, " M"]:
        """Positions of the rows that are finite in all arrays and not yet exemplars, each row once."""
        ordered, at = rows.sort()
        once = torch.ones_like(ordered, dtype=torch.bool)
        once[1:] = ordered[1:] != ordered[:-1]
        at = at[once & ~torch.isin(ordered, self.row)]
        for x in arrays:
            at = at[x[at].flatten(1).isfinite().all(1)]
        return at
