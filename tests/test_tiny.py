"""The small worlds: what their tables say, and what a good and a random policy get."""

from __future__ import annotations

import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check
from test_envs import CATCH, CHAIN

from worldmodel.envs.tiny import BALL, CELL, PADDLE, Catch, Chain


@pytest.mark.parametrize("env_id", [CATCH, CHAIN])
def test_the_small_worlds_pass_both_env_checkers(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(env_id, render_mode="rgb_array").unwrapped
        gymnasium_check(env)
        sb3_check(env)
    assert env.render().dtype == np.uint8


def aim(env):
    """The action that follows the ball to where it will land."""
    row, column, drift = env.row, env.column, env.drift
    while row < env.grid - 1:
        drift = drift if 0 <= column + drift < env.grid else -drift
        row, column = row + 1, column + drift
    return 1 + int(np.sign(column - env.paddle))


def play(env, policy, episodes):
    returns, lengths = [], []
    for seed in range(episodes):
        env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(policy(env))
            total, steps, over = total + reward, steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    return np.array(returns), np.array(lengths)


def test_every_ball_can_be_caught_and_chance_rarely_does():
    returns, lengths = play(Catch(), aim, 200)
    assert (returns == 1).all() and (lengths == 7).all()
    rng = np.random.default_rng(0)
    random, _ = play(Catch(), lambda env: rng.integers(3), 300)
    assert set(random) == {-1.0, 1.0} and random.mean() < -0.5
    still, _ = play(Catch(), lambda env: 1, 300)
    assert still.mean() < -0.5


def test_a_catch_frame_shows_ball_and_paddle_where_they_are():
    env = Catch()
    starts = set()
    for seed in range(50):
        env.reset(seed=seed)
        starts.add((env.column, env.drift))
        for action in (0, 2, 2, 1):
            obs, *_ = env.step(action)
            ball = np.argwhere((obs == BALL).all(-1))
            paddle = np.argwhere((obs == PADDLE).all(-1))
            assert tuple(ball.min(0) // CELL) == (env.row, env.column) and len(ball) == CELL**2
            assert tuple(paddle.min(0) // CELL) == (7, env.paddle) and len(paddle) == CELL**2
    assert len({column for column, _ in starts}) == 8 and {drift for _, drift in starts} == {-1, 0, 1}


# cell left -> (cell arrived in, reward, terminated) by action, as the table in Chain's docstring says
CHAIN_TABLE = {
    (0, 0): (0, -0.4, False), (0, 1): (1, -0.3, False),
    (1, 0): (0, -0.4, False), (1, 1): (2, -0.2, False),
    (2, 0): (1, -0.3, False), (2, 1): (3, -0.1, False),
    (3, 0): (2, -0.2, False), (3, 1): (4, 1.0, True),
}  # fmt: skip


def test_chain_does_what_its_table_says():
    seen = set()
    for plan in itertools.product((0, 1), repeat=6):
        env = Chain()
        obs, _ = env.reset()
        for action in plan:
            cell = int(obs.argmax())
            arrived, reward, terminated = CHAIN_TABLE[cell, action]
            obs, *rest = env.step(action)
            assert obs.tolist() == np.eye(5)[arrived].tolist()
            assert rest == [pytest.approx(reward), terminated, False, {}]
            seen.add((cell, action))
            if terminated:
                break
    assert seen == CHAIN_TABLE.keys()


def test_chain_truncates_at_its_limit_unless_it_terminates_there():
    returns, lengths = play(Chain(), lambda env: 1, 1)
    assert returns[0] == pytest.approx(0.4) and lengths[0] == 4
    returns, lengths = play(Chain(), lambda env: 0, 1)
    assert returns[0] == pytest.approx(-8) and lengths[0] == 20
    env = Chain(length=3, limit=2)
    env.reset()
    env.step(1)
    assert env.step(1)[2:4] == (True, False)
    env.reset()
    env.step(1)
    assert env.step(0)[2:4] == (False, True)
