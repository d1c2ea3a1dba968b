"""E3 and E4: how an episode ended, and which action was taken, reach the replay exactly, whoever steps the environment."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from catalogue import times
from conftest import VECTOR, Toy, small_dreamer
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from worldmodel.envs.vectors.restarts import LocalVecEnv, ReportFaults, Restarts
from worldmodel.envs.vectors.workers import WorkerVecEnv
from worldmodel.errors import UnsupportedSpaceError

NO_UPDATES = {"train.prefill": 10**6}


class Ending(gym.Env):
    """Episode k has 1 + k % 3 steps and ends as `ENDS[k % 3]` says. Observes (number, episode, step); the reward is 10 k + step."""

    observation_space = spaces.Box(0, 999, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, number: int):
        self.number, self.episode = number, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 1 + self.episode % 3
        terminated, truncated = (over and end for end in ENDS[self.episode % 3])
        return self._observe(), 10.0 * self.episode + self.steps, terminated, truncated, {}

    def _observe(self):
        return np.array([self.number, self.episode, self.steps], np.float32)


ENDS = ((True, False), (False, True), (True, True))
"""(terminated, truncated) of the episodes in turn; where both are said the world has ended."""
MAKERS = [partial(Ending, number) for number in range(2)]
VEC_ENVS = {
    "SB3": lambda: DummyVecEnv(MAKERS),
    "SB3, made anew": lambda: LocalVecEnv([partial(lambda make: ReportFaults(make()), make) for make in MAKERS], Restarts(1)),
    "SB3, processes": lambda: WorkerVecEnv([partial(lambda make: ReportFaults(make()), make) for make in MAKERS], "fork"),
    "Gymnasium, processes": lambda: AsyncVectorEnv(MAKERS, context="fork", autoreset_mode=AutoresetMode.SAME_STEP),
    **{f"Gymnasium, {mode.name}": partial(lambda mode: SyncVectorEnv(MAKERS, autoreset_mode=mode), mode) for mode in AutoresetMode},
}


def expected(number: int, steps: int) -> list[tuple]:
    """(observation, reward, is_first, is_last, is_terminal) of each row, by hand."""
    rows, episode = [], 0
    while steps > 0:
        length = 1 + episode % 3
        rows.append(((number, episode, 0), 0.0, True, False, False))
        for step in range(1, min(length, steps) + 1):
            over, terminal = step == length, ENDS[episode % 3][0]
            rows.append(((number, episode, step), 10.0 * episode + step, False, over, over and terminal))
        over = steps >= length
        steps, episode = steps - length, episode + 1
    return [*rows, ((number, episode, 0), 0.0, True, False, False)] if over else rows


def test_every_end_is_stored_as_what_it_was_in_every_autoreset_mode(figure):
    """That the continue head's target is 0 at terminal rows alone is test_model's. Teeth: `terminal = dones` in `arrivals`, or the
    reset's observation in place of the last one, differs in each of the VecEnvs that end an episode."""
    steps, differing = 20, []
    for name, make in VEC_ENVS.items():
        agent = small_dreamer(make(), **NO_UPDATES)
        agent.learn(2 * steps)
        for number in range(2):
            rows = agent.replay.stream(number)
            flags = (rows.is_first, rows.is_last, rows.is_terminal)
            seen = [tuple(x) for x in rows.obs["obs"][0].int().tolist()]
            story = list(zip(seen, rows.reward[0].tolist(), *(flag[0].tolist() for flag in flags)))
            differing += [name] if story != expected(number, steps) else []
        agent.env.close()
    ends = sum(row[3] for row in expected(0, steps))
    figure("E3", f"{len(VEC_ENVS)} kinds of VecEnv x 2 environments x {ends} ends: {len(differing)} stories differ")
    assert differing == []


BOUNDS = {
    "+-0.4": spaces.Box(-0.4, 0.4, (2,), np.float32),
    "0 to 800": spaces.Box(0, 800, (1,), np.float32),
    "asymmetric": spaces.Box(-0.1, 3, (2,), np.float32),
    "by dimension": spaces.Box(np.float32([-0.1, 3, -7]), np.float32([2, 800, -6])),
    "one dimension fixed": spaces.Box(np.float32([-1, 2]), np.float32([1, 2])),
    "2-d": spaces.Box(-2, 1, (2, 3), np.float32),
    "float64": spaces.Box(-3, 5, (2,), np.float64),
    "float16": spaces.Box(-0.3, 0.7, (2,), np.float16),
    "integers": spaces.Box(-3, 4, (2,), np.int32),
    "uint8": spaces.Box(0, 255, (2,), np.uint8),
}
INFINITE = {
    "infinite": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "infinite above": spaces.Box(np.float32([0, -1]), np.float32([1, np.inf])),
}


def test_the_stored_action_is_the_one_that_the_environment_got(figure):
    """Random ones and the policy's. Teeth: actions that are stored as they were drawn, before `decode` rounds or clips them, differ
    by more than 8 units in the last place where the space holds integers or float16."""
    outside = differing = taken = 0
    for space in BOUNDS.values():
        env = Toy(VECTOR, space)
        agent = small_dreamer(env, **{"train.pretrain": 0, "train.ratio": 0.1})
        agent.learn(20 + times(20, 200))
        got = np.stack(env.actions)
        rows = agent.replay.stream(0)
        stored = rows.prev_action[0][~rows.is_first[0]].numpy()
        outside += sum(not space.contains(action) for action in env.actions)
        differing += int((agent.action_spec.encode(got) != stored).sum())
        back = agent.action_spec.decode(stored).astype(np.float64)
        unit = 8 * np.maximum(np.abs(space.low), np.abs(space.high)).astype(np.float64) * np.finfo(np.float32).eps
        differing += int((np.abs(back - got) > unit).sum())
        assert agent.learner.updates and len(stored) == len(got)
        taken += len(got)
    for space in INFINITE.values():
        with pytest.raises(UnsupportedSpaceError, match="infinite bounds"):
            small_dreamer(Toy(VECTOR, space))
    counts = f"{outside} outside, {differing} stored otherwise; {len(INFINITE)} infinite ones refused"
    figure("E4", f"{taken} actions in {len(BOUNDS)} bounded spaces: {counts}")
    assert (outside, differing) == (0, 0)


def test_what_a_policy_wants_beyond_the_bounds_is_stored_as_what_it_got():
    """Teeth: without the bounds in `decode` the environment gets 2.4; without `encode` of what it got, 6 is stored."""
    space = spaces.Box(-0.4, 0.4, (2,), np.float32)
    env = Toy(VECTOR, space)
    agent = small_dreamer(env, **NO_UPDATES)
    agent._random_action = lambda: np.float32([[6, -6]])
    agent.learn(4)
    assert all(space.contains(action) for action in env.actions)
    rows = agent.replay.stream(0)
    assert rows.prev_action[0][~rows.is_first[0]].unique(dim=0).tolist() == [[1, -1]]
