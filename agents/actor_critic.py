"""Actor and critic, and how they learn from imagined rollouts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Dream, Sampling, State, Trace
from worldmodel.distributions import GaussianPosterior
from worldmodel.errors import ConfigError
from worldmodel.learner import SkippedUpdates, clip_gradients, nonfinite_parameters
from worldmodel.model import WorldModel, needs_ensemble, needs_marginal, reward_penalty
from worldmodel.nn.networks import MLP, TwoHot
from worldmodel.spaces import ActionSpec
from worldmodel.storage.weights import cpu_randomness


class ActorCriticConfig(Frozen):
    """Options of behaviour learning in imagination."""

    SIZES: ClassVar[tuple[str, ...]] = ("units", "layers", "bins", "limit")
    """Options by which the weights of actor and critic have their shapes and meaning."""

    units: int = Field(128, ge=1, description="width of actor and critic")
    layers: int = Field(2, ge=1, description="layers of actor and critic")
    horizon: int = Field(15, ge=1, description="imagined steps that actor and critic learn from")
    starts: int | None = Field(256, ge=1, description="replayed states that imagination starts from; none: all of the batch")
    gamma: float = Field(0.99, ge=0, le=1, description="discount per step")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the returns")
    temperature: float = Field(1.0, gt=0, description="of the draws in imagination; 1: as learned")
    entropy: float = Field(3e-3, ge=0, description="weight of the policy's entropy, in units of the scaled return")
    lr: float = Field(3e-4, gt=0, description="Adam's learning rate for actor and critic")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip: float = Field(100.0, gt=0, description="largest norm of each parameter's gradient")
    slow: float = Field(0.02, gt=0, le=1, description="rate of the slow critic's EMA")
    slow_weight: float = Field(1.0, ge=0, description="weight of the slow critic's prediction as a second target")
    uncertainty_penalty: float = Field(
        0.0,
        description="subtracted from each imagined reward, in units of the rewards' own size, per unit of the ensemble's "
        "uncertainty; below 0: a bonus for exploration",
    )
    typicality_penalty: float = Field(
        0.0,
        ge=0,
        description="subtracted from each imagined reward, in units of the rewards' own size, per nat and latent dimension by "
        "which the latent is less likely than real ones",
    )
    max_uncertainty: float | None = Field(
        None,
        gt=0,
        description="dreams are truncated where the ensemble's uncertainty exceeds it: the critic's value stands for what follows; "
        "none: never",
    )
    confidence: float = Field(
        0.0, ge=0, description="an imagined step weighs 1 / (1 + confidence * uncertainty) in the losses; 0: all the same"
    )
    replay_value: float = Field(0.0, ge=0, description="weight of the critic's loss on replayed, real rewards")
    bins: int = Field(127, ge=3, description="bins of the critic's distribution (odd)")
    limit: float = Field(10.0, gt=0, description="largest symlog value of the bins, in units of the rewards' own size")
    min_std: float = Field(0.1, gt=0, description="smallest deviation of a continuous policy, actions being in [-1, 1]")
    max_std: float = Field(1.0, gt=0, description="largest deviation of a continuous policy")
    unimix: float = Field(0.01, ge=0, lt=1, description="share of the uniform distribution in a discrete policy")
    gradient: Literal["reinforce", "dynamics"] = Field(
        "reinforce", description="policy gradient; dynamics: through the model (continuous actions)"
    )


class MixedLogProbs(torch.autograd.Function):
    """ln p of categories, p = (1 - mix) * softmax(logits) + mix * even, with a gradient by which each can come back.

    The gradient is that of logits whose softmax p is, 1[a] - p(a). That of the mixture itself is in proportion to the softmax's
    share of p: an action of which the policy is sure that it is bad would still be tried, and never gain by what it is found to be
    worth. A logit whose softmax is below the even share falls no further, so that it is near when it is to rise.

    even  what is added: 1 / K, or [*N, K], sums to 1, and 0 where an action is illegal, whose ln p is that of the smallest number
    Source: Hausknecht and Stone 2016 (inverted gradients at a bound), for the second.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, even: Tensor | float, mix: float) -> Tensor:
        softmax, added = logits.softmax(-1), mix * even
        p = (1 - mix) * softmax + added
        ctx.save_for_backward(p, softmax < added)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        p, is_low = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient - p * gradient.sum(-1, keepdim=True)
        return torch.where(is_low, gradient.clamp_max(0), gradient), None, None


@dataclass(frozen=True)
class Policy:
    """A distribution over canonical actions [*N, A]: one-hot groups, independent bits, or numbers in [-1, 1].

    Continuous actions are normal around tanh(mean); what leaves [-1, 1] is clamped by `ActionSpec`, not here.
    `legal` [*N, A]: one-hot groups have the probability 0 where it is false; None: everything is legal.
    """

    spec: ActionSpec
    parameters: Tensor
    config: ActorCriticConfig
    legal: Tensor | None = None

    @property
    def _normal(self) -> GaussianPosterior:
        mean, raw = self.parameters.chunk(2, -1)
        low, high = self.config.min_std, self.config.max_std
        return GaussianPosterior(torch.tanh(mean), (high - low) * torch.sigmoid(raw + 2) + low)

    @property
    def _groups(self) -> list[Tensor]:
        """ln of the probabilities of each categorical group."""
        mix, sizes = self.config.unimix, self.spec.sizes
        if self.legal is None:
            return [MixedLogProbs.apply(part, 1 / part.shape[-1], mix) for part in self.parameters.split(sizes, -1)]
        logits, even = self.parameters.masked_fill(~self.legal, -torch.inf), torch.ones_like(self.parameters)
        pairs = zip(logits.split(sizes, -1), self.spec.restrict(even, self.legal).split(sizes, -1), strict=True)
        return [MixedLogProbs.apply(part, share, mix) for part, share in pairs]

    @property
    def _bits(self) -> tuple[Tensor, Tensor]:
        """ln of the probabilities of 1 and of 0, of each bit."""
        pair = torch.stack([self.parameters, torch.zeros_like(self.parameters)], -1)
        return MixedLogProbs.apply(pair, 0.5, self.config.unimix).unbind(-1)

    def sample(self, generator: torch.Generator | None) -> Tensor:
        kind, shape, device = self.spec.kind, self.parameters.shape[:-1], self.parameters.device
        if kind == "continuous":
            normal = self._normal
            return normal.mean + normal.std * torch.randn(normal.std.shape, generator=generator, device=device)
        if kind == "binary":
            return (torch.rand(self.parameters.shape, generator=generator, device=device) < self._bits[0].exp()).float()
        parts = []
        for log_probs in self._groups:
            draw = torch.rand(*shape, 1, generator=generator, device=device)
            index = (log_probs.exp().cumsum(-1)[..., :-1] <= draw).sum(-1)
            parts.append(nn.functional.one_hot(index, log_probs.shape[-1]).float())
        action = torch.cat(parts, -1)
        return action if self.legal is None else self.spec.redraw_illegal(action, self.legal, generator)  # by rounding alone

    def mode(self) -> Tensor:
        if self.spec.kind == "continuous":
            return self._normal.mode
        if self.spec.kind == "binary":
            return (self.parameters > 0).float()
        return torch.cat([nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float() for p in self._groups], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """ln p(action) [*N]."""
        if self.spec.kind == "continuous":
            return self._normal.log_prob(action)
        if self.spec.kind == "binary":
            return torch.where(action > 0.5, *self._bits).sum(-1)
        return (action * torch.cat(self._groups, -1)).sum(-1)

    def entropy(self) -> Tensor:
        """In nats [*N], summed over the action's parts."""
        if self.spec.kind == "continuous":
            return self._normal.entropy()
        if self.spec.kind == "binary":
            return -sum((each.exp() * each).sum(-1) for each in self._bits)
        log_probs = torch.cat(self._groups, -1)
        return -(log_probs.exp() * log_probs).sum(-1)


class ActorCritic(nn.Module):
    """Actor and critic networks; `ActorCriticLearner` trains them.

    unit    the critic's unit, in rewards: the world model's reward scale at the last update
    """

    def __init__(self, config: ActorCriticConfig, feature_dim: int, action: ActionSpec):
        super().__init__()
        if config.gradient == "dynamics" and action.kind != "continuous":
            raise ConfigError(
                f"agent.gradient=dynamics needs continuous actions, and these are {action.kind}: their draws have no gradient. "
                "Use agent.gradient=reinforce."
            )
        self.config, self.action = config, action
        outputs = action.dim * (2 if action.kind == "continuous" else 1)
        self.actor = MLP(feature_dim, config.units, config.layers, outputs, scale=0.01)
        self.critic = MLP(feature_dim, config.units, config.layers, config.bins, scale=0)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.two_hot = TwoHot(config.bins, config.limit)
        self.register_buffer("unit", torch.ones(()))

    def policy(self, feature: Float[Tensor, "*N F"], legal: Bool[Tensor, "*N A"] | None = None) -> Policy:
        return Policy(self.action, self.actor(feature), self.config, legal)

    def value(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """Expected discounted return from a feature, in reward units."""
        return self.two_hot.mean(self.critic(feature)) * self.unit


def lambda_return(
    reward: Float[Tensor, "B H"],
    discount: Float[Tensor, "B H"],
    value: Float[Tensor, "B H+1"],
    lam: float | Float[Tensor, "B H"] = 0.95,
) -> Float[Tensor, "B H"]:
    """TD(lambda) return of every step, in the unit of the rewards.

    R[t] = reward[t] + discount[t] * ((1 - lam[t]) * value[t+1] + lam[t] * R[t+1]),   R[H] = value[H]
    reward[t], discount[t]: on arriving at step t+1; discount = gamma * P(no termination). lam: one for all, or of each step.
    Source: Hafner et al. 2023 (DreamerV3), eq. 7; Sutton and Barto 2018, section 12.1.
    """
    returns = [value[:, -1]]
    interim, further = reward + discount * (1 - lam) * value[:, 1:], discount * lam
    for t in reversed(range(reward.shape[1])):
        returns.append(interim[:, t] + further[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


def weights(start: Float[Tensor, " B"], discount: Float[Tensor, "B H"]) -> Float[Tensor, "B H+1"]:
    """The discounted probability of reaching each step: start * cumulative product of the discounts before it.

    start is 0 for a terminal state: imagination from there does not count.
    """
    return torch.cumprod(torch.cat([start.unsqueeze(1), discount], 1), 1)


class ReturnScale:
    """Running 5th to 95th percentile range of the returns, at least 1 unit: advantages are divided by it.

    `low` and `high` are in rewards, since the unit of the returns may change. Source: Hafner et al. 2023 (DreamerV3), eq. 12.
    """

    def __init__(self, rate: float = 0.01):
        self.rate = rate
        self.low: float | None = None
        self.high: float | None = None

    def update(self, returns: Float[Tensor, "..."], unit: float = 1.0) -> float:
        """Includes returns in units of `unit` rewards; the scale in the same units. Returns that are not all finite are skipped."""
        if not returns.isfinite().all():
            return self.value(unit)
        ends = torch.tensor([0.05, 0.95], device=returns.device)
        low, high = (unit * x for x in torch.quantile(returns.detach().flatten().float(), ends).tolist())
        self.low = low if self.low is None else self.low + self.rate * (low - self.low)
        self.high = high if self.high is None else self.high + self.rate * (high - self.high)
        return self.value(unit)

    def value(self, unit: float = 1.0) -> float:
        """The scale in units of `unit` rewards."""
        return 1.0 if self.low is None else max(1.0, (self.high - self.low) / unit)


class ActorCriticLearner:
    """Trains actor and critic on rollouts that the world model imagines from the states of its batch.

    actor   policy gradient on lambda-returns: score function with the critic as baseline, or pathwise through the model
    critic  two-hot regression to the same returns

    Returns and values are in units of the world model's reward scale; metrics are in rewards.
    Source: Hafner et al. 2023 (DreamerV3), eqs. 7 to 12.
    """

    def __init__(self, world: WorldModel, behaviour: ActorCritic):
        self.world, self.behaviour, self.config = world, behaviour, behaviour.config
        for name in ("uncertainty_penalty", "max_uncertainty", "confidence"):
            needs_ensemble(world, f"agent.{name}", getattr(self.config, name))
        needs_marginal(world, "agent.typicality_penalty", self.config.typicality_penalty)
        self.pathwise = self.config.gradient == "dynamics"
        self.updates, self.is_intrinsic = 0, False
        self._begin()
        self.skips = SkippedUpdates(" of actor and critic", "Look at the sizes of rewards, or lower agent.lr.")

    def _begin(self) -> None:
        options = {"lr": self.config.lr, "eps": self.config.eps}
        self.actor_optimizer = torch.optim.Adam(self.behaviour.actor.parameters(), **options)
        self.critic_optimizer = torch.optim.Adam(self.behaviour.critic.parameters(), **options)
        self.scale = ReturnScale()

    def _restart(self, generator: torch.Generator | None) -> None:
        """New weights: values of other rewards, and an actor that is sure of them, hold up what is learned next for long."""
        with cpu_randomness(int(torch.randint(2**31, (1,), generator=generator, device=self.world.device))):
            new = ActorCritic(self.config, self.world.feature_dim, self.behaviour.action)
        self.behaviour.load_state_dict(new.state_dict())
        self._begin()

    def update(
        self,
        trace: Trace,
        batch: Batch,
        generator: torch.Generator | None = None,
        intrinsic: Callable[[Dream], Float[Tensor, "N H"]] | None = None,
    ) -> dict[str, float]:
        """Imagine from the batch's states, then one step of the actor and one of the critic; metrics.

        intrinsic  the rewards of a dream, in units, instead of those that the model predicts
        """
        config, unit = self.config, self.world.heads.scale.value
        if self.is_intrinsic and intrinsic is None:
            self._restart(generator)
        self.is_intrinsic = intrinsic is not None
        self.behaviour.unit.copy_(unit)
        state, alive = self.starts(trace, batch, generator)
        dream = self.imagine(state, generator, uncertainty=intrinsic is not None)
        with torch.set_grad_enabled(self.pathwise):
            discount = config.gamma * dream.cont
        lam, trust = self._trust(dream)
        weight = weights(alive, discount.detach())[:, :-1] * trust
        feature = dream.feature.detach().transpose(0, 1)  # [H+1, N, F]: contiguous, as is each slice of it along time
        logits = self.behaviour.critic(feature[:-1])  # read three times: for the returns, as the baseline, in the critic's loss
        with torch.no_grad():
            value = torch.cat([self.behaviour.two_hot.mean(logits), self._value(feature[-1:])]).transpose(0, 1)  # [N, H+1]
        if intrinsic is None:
            penalty = reward_penalty(self.world, dream, config.uncertainty_penalty, config.typicality_penalty)
            reward = dream.reward / unit - penalty
        else:
            reward = intrinsic(dream)
        returns = lambda_return(reward, discount, self._value(dream.feature) if self.pathwise else value, lam)
        scale = self.scale.update(returns, float(unit))
        legal = None if dream.legal is None else dream.legal.transpose(0, 1)
        policy = self.behaviour.policy(feature[:-1], legal)  # of all steps at once: the roll-out has no graph of the actor's draws
        log_prob, entropy = policy.log_prob(dream.action.detach().transpose(0, 1)).transpose(0, 1), policy.entropy().transpose(0, 1)
        actor_loss = self._actor_loss(returns, value[:, :-1], scale, log_prob, entropy, weight)
        critic_loss = self._critic_loss(feature[:-1], logits, returns, weight)
        if config.replay_value:
            critic_loss = critic_loss + config.replay_value * self._replay_value_loss(trace, batch)
        metrics = self._descend(actor_loss, critic_loss)
        metrics |= {"train/entropy": float(entropy.detach().mean()), "train/return_scale": scale * float(unit)}
        return metrics | {"dream/return": float(returns.detach()[:, 0].mean() * unit)}

    def starts(self, trace: Trace, batch: Batch, generator: torch.Generator | None) -> tuple[State, Tensor]:
        """(some or all states of the batch, 0 for those that are terminal and else 1)."""
        length, alive = batch.shape[1], (~batch.is_terminal).float().flatten()
        rows = torch.arange(len(alive), device=alive.device)
        if self.config.starts is not None and self.config.starts < len(alive):
            rows = torch.randperm(len(alive), generator=generator, device=alive.device)[: self.config.starts]
        state, alive = trace.states.detach().index((rows // length, rows % length)), alive[rows]
        return state, alive

    def imagine(self, state: State, generator: torch.Generator | None, uncertainty: bool = False) -> Dream:
        """Rollouts under the actor, which reads detached features; with a graph where the gradient is pathwise."""
        config = self.config
        wanted = bool(uncertainty or config.uncertainty_penalty or config.confidence or config.max_uncertainty)
        sampling = Sampling(generator=generator, temperature=config.temperature, uncertainty=wanted)
        masks: list[Tensor] = []

        def act(feature: Tensor, step: int) -> Tensor:
            policy = self.behaviour.policy(feature.detach(), self.world.legal(feature))
            masks.extend([] if policy.legal is None else [policy.legal])
            return policy.sample(generator)

        with torch.set_grad_enabled(self.pathwise):
            dream = self.world.imagine(state, act, config.horizon, sampling)
        return replace(dream, legal=torch.stack(masks, 1)) if masks else dream

    def _trust(self, dream: Dream) -> tuple[float | Float[Tensor, "N H"], float | Float[Tensor, "N H"]]:
        """(lambda of each return, weight of each step in the losses), by the uncertainty of arriving at the next step.

        Where it exceeds the limit, that step and those after it weigh 0, and the return of the step before is the critic's value.
        The weights are in the manner of Aghabozorgi et al. 2026 (WIMLE), where the more uncertain of two updates weighs less.
        """
        config, uncertainty = self.config, dream.uncertainty.detach()
        lam, weight = config.lam, 1 / (1 + config.confidence * uncertainty)
        if config.max_uncertainty is not None:
            inside = (uncertainty <= config.max_uncertainty).to(uncertainty).cumprod(1)
            lam = lam * torch.cat([inside[:, 1:], torch.ones_like(inside[:, :1])], 1)
            weight = weight * inside
        return lam, weight

    def _actor_loss(
        self,
        returns: Float[Tensor, "N H"],
        value: Float[Tensor, "N H"],
        scale: float,
        log_prob: Float[Tensor, "N H"],
        entropy: Float[Tensor, "N H"],
        weight: Float[Tensor, "N H"],
    ) -> Tensor:
        """-(return / scale + entropy): pathwise through the model, or REINFORCE, ln p(action) * (return - value) / scale."""
        objective = returns / scale if self.pathwise else log_prob * (returns - value) / scale
        return -(weight * (objective + self.config.entropy * entropy)).mean()

    def _critic_loss(
        self,
        feature: Float[Tensor, "H N F"],
        logits: Float[Tensor, "H N K"],
        returns: Float[Tensor, "N H"],
        weight: Float[Tensor, "N H"],
    ) -> Tensor:
        """Regression of the critic to the lambda-returns."""
        return (weight.transpose(0, 1) * self._value_loss(feature, logits, returns.transpose(0, 1))).mean()

    def _replay_value_loss(self, trace: Trace, batch: Batch) -> Tensor:
        """Regression of the critic to lambda-returns of replayed rewards; nothing crosses an episode's end."""
        feature = trace.feature.detach()
        with torch.no_grad():
            value = self._value(feature)
            ended = batch.is_terminal[:, 1:].float()
            discount = self.config.gamma * (1 - ended)
            # At a truncated end the return is the critic's own value there: lambda is 0.
            lam = self.config.lam * (1 - batch.is_last[:, 1:].float())
            target = lambda_return(batch.reward[:, 1:] / self.behaviour.unit, discount, value, lam)
        inside = (~batch.is_last[:, :-1]).float()
        if batch.weight is not None:
            inside = inside * batch.weight[:, :-1]
        return (inside * self._value_loss(feature[:, :-1], self.behaviour.critic(feature[:, :-1]), target)).mean()

    def _value(self, feature: Tensor) -> Tensor:
        """The critic's value, in units of the reward scale."""
        return self.behaviour.two_hot.mean(self.behaviour.critic(feature))

    def _value_loss(self, feature: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy with the target, and with the slow critic's value."""
        two_hot, targets = self.behaviour.two_hot, [target]
        if self.config.slow_weight:
            with torch.no_grad():
                targets.append(two_hot.mean(self.behaviour.slow(feature)))
        logp = torch.log_softmax(logits, -1)
        return sum(w * two_hot.cross_entropy(logp, y) for w, y in zip((1.0, self.config.slow_weight), targets))

    def _descend(self, actor_loss: Tensor, critic_loss: Tensor) -> dict[str, float]:
        """One clipped step of both, and of the slow critic; of none where a loss or a gradient is not finite."""
        steps = {
            "actor": (self.behaviour.actor, self.actor_optimizer, actor_loss),
            "critic": (self.behaviour.critic, self.critic_optimizer, critic_loss),
        }
        metrics, bad = {}, []
        for name, (part, optimizer, loss) in steps.items():
            optimizer.zero_grad(set_to_none=True)  # of the critic too: a pathwise actor loss left gradients there
            loss.backward()
            norm, nonfinite = clip_gradients(part, self.config.clip)
            metrics |= {f"train/{name}_loss": float(loss.detach()), f"train/{name}_gradient_norm": norm}
            nonfinite = nonfinite if loss.isfinite() else [*nonfinite_parameters(part), "loss"]
            bad += [f"{name}.{where}" for where in nonfinite]
        self.updates += 1
        if self.skips.allow(self.updates, bad):
            self.actor_optimizer.step()
            self.critic_optimizer.step()
            slow, critic = (list(part.parameters()) for part in (self.behaviour.slow, self.behaviour.critic))
            with torch.no_grad():
                torch._foreach_lerp_(slow, critic, self.config.slow)
        return metrics
