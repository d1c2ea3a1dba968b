"""Held-out episodes: fresh ones, for looking at the model alone. They never reach the replay, a gradient or a decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.agents.belief import ActsOnBelief
from worldmodel.agents.evaluation import DEFAULT_MAX_STEPS, EvaluationAborted, isolated_rng, require_spaces
from worldmodel.agents.experience import rows_before_reset
from worldmodel.data import Batch, Episodes, State
from worldmodel.envs.make import EnvConfig, make_vec
from worldmodel.envs.vectors.plain import as_trained
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

    steps    looks at no more than so many steps of each; None: to its end, after LIMIT steps at the latest
    give_up  asked at every step; raises Abandoned as soon as it says yes

    Nothing of the agent changes, its random states included. Raises EnvError, MissingExtraError.
    """
    config = EnvConfig(id=env) if isinstance(env, str) else env
    with isolated_rng(agent, seed):
        venv = as_trained(agent, make_vec(config.model_copy(update={"vectorize": "dummy"}), episodes, seed))
        try:
            require_spaces(agent, venv, config.id)
            return _first_episodes(
                agent, venv, DEFAULT_MAX_STEPS if steps is None else steps, random, np.random.default_rng(seed), should_abort
            )
        finally:
            venv.close()


def _first_episodes(
    agent: ActsOnBelief, venv: VecEnv, steps: float, random: float, rng: np.random.Generator, should_abort: Callable[[], bool]
) -> Episodes:
    count, spec, codec = venv.num_envs, agent.obs_spec, agent.action_spec

    def to_raw(obs: Any) -> dict[str, np.ndarray]:
        rows = spec.to_raw(obs)
        spec.check(rows)
        return rows

    rows, belief = to_raw(venv.reset()), agent.policy.initial_belief(count)
    no = np.zeros(count, bool)
    taken = [(rows, np.zeros((count, codec.dim), np.float32), np.zeros(count, np.float32), no, no)]
    lengths, starts = np.zeros(count, np.int64), np.ones(count, bool)
    while not lengths.all() and len(taken) <= steps:
        if should_abort():
            raise EvaluationAborted
        action, belief = agent.policy.filter_and_act(belief, rows, starts, deterministic=True)
        action = np.where(rng.random((count, 1)) < random, codec.sample(count, rng), action)
        env_action = codec.decode(action)
        action = codec.encode(env_action)
        belief = State({**belief, "prev_action": torch.as_tensor(action, device=agent.device)})
        obs, reward, starts, infos = venv.step(env_action)
        past, rows = rows, to_raw(obs)
        arrived, terminal = rows_before_reset(
            rows, starts, infos, to_raw, lambda i, past=past: {name: x[i] for name, x in past.items()}
        )
        taken.append((arrived, action, reward, starts, terminal))
        ended = (lengths == 0) & starts
        lengths[ended] = len(taken) - restarted(infos)[ended]  # of a step in which an environment failed nothing is real
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
