"""Held-out episodes: fresh ones, to measure the model alone. They never reach the replay, a gradient or a decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.agents.belief import ActsOnBelief, keep_legal
from worldmodel.agents.evaluation import DEFAULT_MAX_STEPS, fresh_envs, play
from worldmodel.agents.experience import rows_before_reset
from worldmodel.data import Batch, Episodes, State
from worldmodel.envs.make import EnvConfig
from worldmodel.envs.vectors.restarts import restarted

HELD_OUT_SEED = 40_000
"""Environment seed of the first held-out episode."""
RANDOM_ACTION_SHARE = 0.2
"""Share of random actions, so that the data also shows what the policy would not do."""


def collect(
    agent: ActsOnBelief,
    env: EnvConfig | str,
    episodes: int = 20,
    seed: int = HELD_OUT_SEED,
    *,
    steps: int | None = None,
    random: float = RANDOM_ACTION_SHARE,
    should_abort: Callable[[], bool] = lambda: False,
) -> Episodes:
    """Fresh episodes of the agent's greedy policy with a random action in `random` of the steps, one for each seed from `seed` on.

    steps         plays at most so many steps of each; None: to its end, DEFAULT_MAX_STEPS at most
    should_abort  asked at every step; raises EvaluationAborted as soon as it says yes

    Nothing of the agent changes, its random states included. Raises EnvError, MissingExtraError.
    """
    config = EnvConfig(id=env) if isinstance(env, str) else env
    with fresh_envs(agent, config, episodes, seed) as venv:
        steps = DEFAULT_MAX_STEPS if steps is None else steps
        return _first_episodes(agent, venv, steps, random, np.random.default_rng(seed), should_abort)


def _first_episodes(
    agent: ActsOnBelief, venv: VecEnv, steps: int, random: float, rng: np.random.Generator, should_abort: Callable[[], bool]
) -> Episodes:
    count, spec, codec = venv.num_envs, agent.obs_spec, agent.action_spec

    def to_raw(obs: Any) -> dict[str, np.ndarray]:
        rows = spec.to_raw(obs)
        spec.check(rows)
        return rows

    def act(obs: Any, starts: np.ndarray) -> np.ndarray:
        nonlocal belief
        action, belief = agent.policy.filter_and_act(belief, rows, starts, deterministic=True)
        action = np.where(rng.random((count, 1)) < random, codec.sample(count, rng), action)
        return codec.decode(keep_legal(agent.policy.world, action, None, rng, rows))

    first_obs, no = venv.reset(), np.zeros(count, bool)
    rows, belief = to_raw(first_obs), agent.policy.initial_belief(count)
    taken = [(rows, np.zeros((count, codec.dim), np.float32), np.zeros(count, np.float32), no, no)]
    lengths = np.zeros(count, np.int64)  # rows of each first episode, 0 while it goes on
    for env_action, obs, reward, dones, infos in play(venv, first_obs, act, should_abort):
        action = codec.encode(env_action)
        belief = State({**belief, "prev_action": torch.as_tensor(action, device=agent.device)})
        before, rows = rows, to_raw(obs)
        arrived, terminal = rows_before_reset(
            rows, dones, infos, to_raw, lambda i, before=before: {name: x[i] for name, x in before.items()}
        )
        taken.append((arrived, action, reward, dones, terminal))
        ended = (lengths == 0) & dones
        lengths[ended] = len(taken) - restarted(infos)[ended]  # of a step in which an environment failed nothing is real
        if lengths.all() or len(taken) > steps:
            break
    return _episodes(taken, np.where(lengths, lengths, len(taken)))


def _episodes(taken: list[tuple], lengths: np.ndarray) -> Episodes:
    """Rows of all environments by time -> episodes one after the other."""
    time = np.concatenate([np.arange(n) for n in lengths])
    env = np.repeat(np.arange(len(lengths)), lengths)
    obs, *columns = zip(*taken)
    rows = {name: np.stack([x[name] for x in obs])[time, env] for name in obs[0]}
    prev_action, reward, last, terminal = (torch.from_numpy(np.stack(c)[time, env][None]) for c in columns)
    action = torch.cat([prev_action[:, 1:], torch.zeros_like(prev_action[:, :1])], 1)  # 0 where the next row opens an episode
    first = torch.from_numpy(time[None] == 0)
    observed = {name: torch.from_numpy(x[None]) for name, x in rows.items()}
    return Episodes(Batch(observed, action, prev_action, reward, first, last, terminal))
