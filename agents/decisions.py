"""Whether the model decides as the environment would: picking the best of some plans, and planning in one or the other.

Both need copies of the real environment, from which several plans can be tried. Environments whose copies do not step alike are
left out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import EzPickle
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.agents.belief import ActsOnBelief, keep_legal
from worldmodel.agents.evaluation import evaluate, isolated_rng
from worldmodel.agents.held_out import HELD_OUT_SEED, RANDOM_ACTION_SHARE
from worldmodel.data import Sampling, State
from worldmodel.diagnostics.evidence import Evidence, Figure, Section, bootstrap, joined
from worldmodel.diagnostics.fidelity import ratio
from worldmodel.diagnostics.rollouts import ROLLOUTS_AT_ONCE
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.errors import ConfigError, EnvError, MissingExtraError
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec

SEED = HELD_OUT_SEED + 10_000
"""Environment seed of the first episode: none that another section plays."""
EPISODES, STEPS, EVERY = 16, 60, 6
"""Episodes of which states are taken, their steps at most, and steps between two states. Half of them are random play, whose
states are those in which plans differ."""
PLANS, HORIZON = 5, 15
SAMPLES = 8
"""Roll-outs of each plan whose mean return is the model's."""
EQUAL = 1e-5
"""Relative difference below which two returns are the same."""
PLAN_EPISODES, PLAN_STEPS, CANDIDATES, PLAN_HORIZON = 8, 50, 12, 12
"""Of random shooting: episodes, their steps at most, plans at each step and their length."""
CHECKED_STEPS = 10
MOST_SECONDS = 120.0
"""What planning in copies may take, as a few of them predict; slower environments, such as rendered ones, are left out."""


# Copies ---------------------------------------------------------------------------------------------------------------


def copied(env: gym.Env) -> gym.Env:
    """A copy of an environment where it stands, its random state included.

    Gymnasium's EzPickle, which MuJoCo's and Box2D's environments are, would make a new one that has not been reset.
    """
    inner, memo = env.unwrapped, {}
    if isinstance(inner, EzPickle):
        memo[id(inner)] = made = object.__new__(type(inner))
        made.__dict__.update(copy.deepcopy(inner.__dict__, memo))
    return copy.deepcopy(env, memo)


def stepped(env: gym.Env, actions: np.ndarray) -> list[tuple[Any, float, bool, bool]]:
    """(observation, reward, terminated, truncated) of each step, to the end of the episode at most."""
    found = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        found.append((obs, float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            break
    return found


def fault_of_copies(env: gym.Env, actions: np.ndarray) -> str | None:
    """Why copies of an environment, which has been reset, cannot stand for it; None where they can.

    It is stepped after two copies of it, under the same actions, and all three have to observe and earn the same.
    """
    try:
        copies = [copied(env) for _ in range(2)]
        found = [stepped(one, actions) for one in (*copies, env)]
    except Exception as error:  # whatever an environment holds that cannot be copied
        return f"a copy of it failed: {type(error).__name__}: {error}"
    same = all(len(x) == len(found[0]) and all(map(_equal, x, found[0])) for x in found[1:])
    return None if same else "two copies of it differ under the same actions"


def _equal(one: tuple, other: tuple) -> bool:
    obs, others = (x[0] if isinstance(x[0], dict) else {"": x[0]} for x in (one, other))
    return one[1:] == other[1:] and all(np.array_equal(obs[name], others[name]) for name in obs)


def real_returns(env: gym.Env, plans: Float[Tensor, "K H A"], codec: ActionSpec, seed: int | None = None) -> list[float]:
    """The return of each plan in a copy of the environment, undiscounted, up to the episode's end.

    seed   of the copies' own chance, the same for all plans; None: what is to come, which no plan should know
    """
    found = []
    for plan in plans:
        one = copied(env)
        if seed is not None:
            one.unwrapped.np_random = np.random.default_rng(seed)
        found.append(sum(step[1] for step in stepped(one, codec.decode(plan))))
    return found


@torch.no_grad()
def model_returns(
    world: WorldModel, state: State, plans: Float[Tensor, "S K H A"], generator: torch.Generator, samples: int = SAMPLES
) -> Float[Tensor, "S K"]:
    """The imagined return of each plan, the mean of some roll-outs: rewards weighed by the probability to reach them."""
    count, found = plans.shape[1] * samples, []
    for rows in torch.arange(len(plans)).split(max(1, ROLLOUTS_AT_ONCE // count)):
        start = state.index(rows.to(world.device)).map(lambda x: x.repeat_interleave(count, 0))
        action = plans[rows].to(world.device).flatten(0, 1).repeat_interleave(samples, 0)
        policy: Callable[[Tensor, int], Tensor] = lambda feature, step, action=action: action[:, step]  # noqa: E731
        dream = world.imagine(start, policy, plans.shape[2], Sampling(generator=generator))
        alive = torch.cat([torch.ones_like(dream.cont[:, :1]), dream.cont[:, :-1]], 1).cumprod(1)
        found.append((alive * dream.reward).sum(1).unflatten(0, (len(rows), plans.shape[1], samples)).mean(2).cpu())
    return torch.cat(found)


# Decisions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decisions:
    """The returns of K plans from each of S states, in reality and as imagined.

    real, imagined  [S, K]
    episode         [S]
    """

    real: Float[Tensor, "S K"]
    imagined: Float[Tensor, "S K"]
    episode: Int[Tensor, " S"]

    def figures(self, seed: int = 0) -> dict[str, Figure]:
        """How often the plan that is imagined to be best is a best one, and what is lost where it is not.

        States in which all plans are equally good decide nothing and are left out. Where several are best, chance is higher than
        one in K: it is measured beside.
        """
        top = self.real.amax(1, keepdim=True)
        best = self.real >= top - EQUAL * (1 + self.real.abs().amax(1, keepdim=True))
        decides = ~best.all(1)
        real, best, episode = self.real[decides], best[decides], self.episode[decides]
        pick = self.imagined[decides].argmax(1, keepdim=True)
        right, chance = best.gather(1, pick)[:, 0].double(), best.double().mean(1)
        regret = (real.amax(1) - real.gather(1, pick)[:, 0]).double()
        return {
            "deciding states": bootstrap(decides.double(), self.episode, seed, "of the states"),
            "best plan picked": bootstrap(right, episode, seed),
            "best plan by chance": bootstrap(chance, episode, seed),
            "best plan over chance": bootstrap(right - chance, episode, seed),
            "decision regret": bootstrap(regret, episode, seed, "reward"),
            "decision regret over chance": ratio(regret, (real.amax(1) - real.mean(1)).double(), episode, seed),
        }


def decide(agent: ActsOnBelief, env: EnvConfig, evidence: Evidence, episodes: int, horizon: int) -> Decisions:
    """Random plans from states of play that is partly random, partly the agent's, tried in both worlds."""
    world, codec, rng = evidence.world, evidence.world.action, np.random.default_rng(evidence.seed)
    real, states, plans, numbers = [], [], [], []

    def visit(number: int, one: gym.Env, state: State) -> None:
        drawn = torch.from_numpy(codec.sample(PLANS * horizon, rng)).unflatten(0, (PLANS, horizon))
        real.append(real_returns(one, drawn, codec))
        states.append(state)
        plans.append(drawn)
        numbers.append(number)

    with isolated_rng(agent, SEED):
        _play(agent, env, world, episodes, visit, rng)
        start = State({name: torch.cat([state[name] for state in states]) for name in world.initial(0)})
        imagined = model_returns(world, start, torch.stack(plans), evidence.generator(51))
    return Decisions(torch.tensor(real, dtype=torch.float64), imagined.double(), torch.tensor(numbers))


def _play(
    agent: ActsOnBelief,
    env: EnvConfig,
    world: WorldModel,
    episodes: int,
    visit: Callable[[int, gym.Env, State], None],
    rng: np.random.Generator,
) -> None:
    """Plays, and visits every EVERY-th state, the first one included, with the environment there and the model's belief [1]."""
    envs = [make_env(env, number, SEED) for number in range(episodes)]
    random = np.where(np.arange(episodes) % 2, 1.0, RANDOM_ACTION_SHARE)
    obs, running = [one.reset()[0] for one in envs], np.ones(episodes, bool)
    belief, first = agent.policy.initial_belief(episodes), np.ones(episodes, bool)
    for step in range(STEPS):
        rows = world.obs.to_raw(stacked(obs))
        action, belief = agent.policy.filter_and_act(belief, rows, first, deterministic=True)
        if step % EVERY == 0:
            own = State({name: belief[name] for name in world.initial(0)})
            for i in np.flatnonzero(running).tolist():
                visit(i, envs[i], own.index(slice(i, i + 1)))
        drawn = world.action.sample(episodes, rng)
        action = keep_legal(world, np.where(rng.random((episodes, 1)) < random[:, None], drawn, action), None, rng, rows)
        belief = State({**belief, "prev_action": torch.as_tensor(action, device=world.device)})
        first = np.zeros(episodes, bool)
        _advance(envs, obs, running, world.action.decode(action))
        if not running.any():
            break
    for one in envs:
        one.close()


def stacked(obs: list[Any]) -> Any:
    """Observations of several environments as a batch."""
    if isinstance(obs[0], dict):
        return {name: np.stack([x[name] for x in obs]) for name in obs[0]}
    return np.stack(obs)


def _advance(envs: list[gym.Env], obs: list[Any], running: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Steps what is running, in place; gives the rewards, 0 where an episode is over."""
    rewards = np.zeros(len(envs))
    for i in np.flatnonzero(running).tolist():
        obs[i], rewards[i], terminated, truncated, _ = envs[i].step(actions[i])
        running[i] = not (terminated or truncated)
    return rewards


# Planning -------------------------------------------------------------------------------------------------------------


def plan_in_both(env: EnvConfig, evidence: Evidence, episodes: int, steps: int) -> tuple[list[float], list[float]]:
    """(returns of random shooting in copies of the real environment, in the model), of the same episodes and random plans."""
    world, seed = evidence.world.eval(), evidence.seed
    return (
        planned_returns(env, world.action, None, seed, episodes, steps),
        planned_returns(env, world.action, world, seed, episodes, steps),
    )


def planned_returns(
    env: EnvConfig, codec: ActionSpec, world: WorldModel | None, seed: int, episodes: int, steps: int
) -> list[float]:
    """Returns of random shooting in a world model, or (None) in copies of the real environment: of episodes and plans that follow
    from the seed alone."""
    rng = np.random.default_rng(seed)
    value_of = _Copies(codec) if world is None else _Model(world, episodes, seed)
    envs = [make_env(env, number, SEED) for number in range(episodes)]
    obs, running = [one.reset()[0] for one in envs], np.ones(episodes, bool)
    best, returns = None, np.zeros(episodes)
    for _ in range(steps):
        plans, seeds = _candidates(codec, episodes, best, rng), rng.integers(2**31, size=episodes)
        value = value_of(plans, obs, envs, running, seeds)
        best = plans[torch.arange(episodes), value.argmax(1)]
        value_of.taken(best[:, 0])
        returns += _advance(envs, obs, running, codec.decode(best[:, 0]))
        if not running.any():
            break
    for one in envs:
        one.close()
    return returns.tolist()


class _Copies:
    """What plans are worth in copies of the real environments."""

    def __init__(self, codec: ActionSpec) -> None:
        self.codec = codec

    def __call__(
        self, plans: Float[Tensor, "N K H A"], obs: list[Any], envs: list[gym.Env], running: np.ndarray, seeds: np.ndarray
    ) -> Float[Tensor, "N K"]:
        value = torch.zeros(plans.shape[:2], dtype=torch.float64)
        for i in np.flatnonzero(running).tolist():
            value[i] = torch.tensor(real_returns(envs[i], plans[i], self.codec, int(seeds[i])))
        return value

    def taken(self, action: Float[Tensor, "N A"]) -> None:
        """Copies are of the environment as it is: nothing is to be remembered."""


class _Model:
    """What plans are worth in a world model, which filters what is observed."""

    def __init__(self, world: WorldModel, count: int, seed: int) -> None:
        self.world, self.state = world, world.initial(count)
        self.before = torch.zeros(count, world.action.dim, device=world.device)
        self.first = torch.ones(count, dtype=torch.bool, device=world.device)
        self.generator = torch.Generator(world.device).manual_seed(seed + 52)

    def __call__(
        self, plans: Float[Tensor, "N K H A"], obs: list[Any], envs: list[gym.Env], running: np.ndarray, seeds: np.ndarray
    ) -> Float[Tensor, "N K"]:
        rows = tensors(self.world.obs.to_raw(stacked(obs)), self.world.device)
        sampling = Sampling(generator=self.generator, mode=True)
        self.state = self.world.observe(self.state, rows, self.before, self.first, sampling)
        return model_returns(self.world, self.state, plans, self.generator)

    def taken(self, action: Float[Tensor, "N A"]) -> None:
        self.before, self.first = action.to(self.world.device), torch.zeros_like(self.first)


def _candidates(
    codec: ActionSpec, size: int, best: Float[Tensor, "N H A"] | None, rng: np.random.Generator
) -> Float[Tensor, "N K H A"]:
    """Uniform plans; the first of each state is the best one of the step before, shifted."""
    drawn = torch.from_numpy(codec.sample(size * CANDIDATES * PLAN_HORIZON, rng)).unflatten(0, (size, CANDIDATES, PLAN_HORIZON))
    if best is not None:
        drawn[:, 0, :-1] = best[:, 1:]
    return drawn


# The section ----------------------------------------------------------------------------------------------------------


def decisions(
    agent: ActsOnBelief,
    env: EnvConfig,
    evidence: Evidence,
    *,
    episodes: int = EPISODES,
    horizon: int = HORIZON,
    plan_episodes: int = PLAN_EPISODES,
    plan_steps: int = PLAN_STEPS,
) -> Section:
    """Whether the model picks the plan that is really best, and whether planning in it does as well as in the environment.

    Where the environment is random, a plan's real return is that of one chance, so that no model picks the best one always.
    Planning in copies does not know the environment's own chance, where that comes from its `np_random`.
    """
    what = "Decisions were not measured, because"
    if evidence.world.is_masked:
        return Section(skipped=f"{what} plans that are drawn beforehand would take actions that are illegal by then.")
    try:
        one = make_env(env, 0, SEED)
        try:
            if ActionSpec.from_space(one.action_space).to_json() != evidence.world.action.to_json():
                return Section(skipped=f"{what} the environment's actions are not the model's.")
            one.reset()
            fault, seconds = _checked(one, evidence.world.action, evidence.seed)
        finally:
            one.close()
        if fault is not None:
            return Section(skipped=f"{what} the environment cannot be copied: {fault}.")
        found = _decided(evidence, decide(agent, env, evidence, episodes, horizon))
        expected = seconds * plan_episodes * plan_steps * CANDIDATES
        if expected > MOST_SECONDS:
            reason = f"because trying {CANDIDATES} plans in copies at each step would take {expected:.0f} s"
            return joined([found, Section(skipped=f"The planning gap was not measured, {reason}.")])
        return joined([found, _gap(agent, env, evidence, plan_episodes, plan_steps)])
    except (ConfigError, EnvError, MissingExtraError) as error:
        return Section(skipped=f"{what} the environment did not play: {error}")


def _checked(env: gym.Env, codec: ActionSpec, seed: int) -> tuple[str | None, float]:
    """(why copies do not step alike, seconds for a copy and a plan's steps)."""
    actions = codec.decode(codec.sample(CHECKED_STEPS, np.random.default_rng(seed)))
    since = time.perf_counter()
    fault = fault_of_copies(env, actions)
    return fault, (time.perf_counter() - since) / 3 * max(1.0, PLAN_HORIZON / CHECKED_STEPS)


def _decided(evidence: Evidence, found: Decisions) -> Section:
    """The figures of picked plans."""
    figures = found.figures(evidence.seed)
    picked, chance, gain = (figures[f"best plan {name}"] for name in ("picked", "by chance", "over chance"))
    if not picked.known:
        return Section(figures, "No plan was picked, because all plans were equally good in all states.")
    share = f"the model picks the best of {PLANS} plans in a share of {picked}, where chance has {chance.value:.2g}"
    if gain.surely_above(0.0):
        regret = figures["decision regret over chance"]
        return Section(figures, None, (f"In decisions {share}; it loses {regret} times what chance loses.",))
    return Section(
        figures, None, (f"The model decides no better than chance: {share}; learn for longer: {evidence.train_longer}.",)
    )


def _gap(agent: ActsOnBelief, env: EnvConfig, evidence: Evidence, episodes: int, steps: int) -> Section:
    """Returns of the same planner in both worlds, and of the agent."""
    real, imagined = (torch.tensor(x, dtype=torch.float64) for x in plan_in_both(env, evidence, episodes, steps))
    own = torch.tensor(evaluate(agent, env, episodes, SEED, max_steps=steps)[0], dtype=torch.float64)
    return gap_of_planning(evidence, real, imagined, own)


def gap_of_planning(
    evidence: Evidence, real: Float[Tensor, " N"], imagined: Float[Tensor, " N"], own: Float[Tensor, " N"]
) -> Section:
    """Which of the two holds planning back: returns of the same N episodes, planned in reality, in the model, and of the agent."""
    each, seed = torch.arange(len(real)), evidence.seed
    figures = {
        "return of planning in reality": bootstrap(real, each, seed, "reward"),
        "return of planning in the model": bootstrap(imagined, each, seed, "reward"),
        "return of the agent beside": bootstrap(own, each, seed, "reward"),
        "planning gap": bootstrap(real - imagined, each, seed, "reward"),
        "agent over planning": bootstrap(own - real, each, seed, "reward"),
    }
    gap, ahead = figures["planning gap"], figures["agent over planning"]
    if gap.surely_above(0.0):
        text = f"The model holds planning back: the same search returns {gap} more in the real environment; learn for longer: "
        text += f"{evidence.train_longer}."
    elif ahead.surely_above(0.0):
        text = (
            f"The planner holds planning back: in the real environment it does no better than in the model ({gap} more), and the "
        )
        text += f"agent returns {ahead} more; search longer: `worldmodel train {evidence.run}/config.yaml agent=planner "
        text += "agent.plan.samples=64 agent.plan.horizon=8`."
    else:
        text = (
            f"Planning in the model does as well as in the real environment, as far as {len(real)} episodes tell: the gap is {gap}."
        )
    return Section(figures, None, (text,))
