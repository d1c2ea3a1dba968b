"""Two rooms and one door: no gift, and solved by who knows the way."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from worldmodel.envs.make import EnvConfig, make_vec
from worldmodel.envs.tiny import BALL, TwoRooms
from worldmodel.envs.vectors.check import check_vec_env

ROOMS = "worldmodel.envs:TwoRooms-v0"


def towards(env, place):
    away = place - env.position
    return away / max(np.abs(away).max(), env.speed)


def play(env, policy, episodes=60):
    """Share of the episodes, seeds 0.., that reach the goal."""
    reached = []
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            _, reward, terminated, truncated, info = env.step(policy(env))
            done = terminated or truncated
        assert reward == float(info["is_success"]) == float(terminated)
        reached.append(info["is_success"])
    return np.mean(reached)


@pytest.mark.parametrize("random_wall", [False, True])
def test_two_rooms_keep_the_checkers_contracts(random_wall):
    env = gym.make(ROOMS, random_wall=random_wall)
    gymnasium_check(env.unwrapped, skip_render_check=True)
    sb3_check(env)
    check_vec_env(make_vec(EnvConfig(id=ROOMS, kwargs={"random_wall": random_wall}), 2, seed=0))
    assert env.observation_space.contains(env.reset(seed=0)[0])


@pytest.mark.parametrize("random_wall", [False, True])
def test_only_the_way_through_the_door_leads_to_the_goal(random_wall):
    env, rng = TwoRooms(random_wall), np.random.default_rng(0)
    held = {}

    def lasting(env):
        if env.steps % 16 == 0:
            held["action"] = rng.uniform(-1, 1, 2)
        return held["action"]

    assert play(env, lambda env: towards(env, env.shortest_path()[0])) == 1
    assert play(env, lambda env: towards(env, env.goal)) <= 0.5
    assert play(env, lasting) <= 0.25


def test_start_and_goal_lie_in_different_rooms_and_come_from_the_seed():
    env = TwoRooms(random_wall=True)
    layouts, sides = set(), set()
    for seed in range(40):
        obs, info = env.reset(seed=seed)
        west, east = env.wall_faces()
        first, last = sorted((info["position"][0], info["goal"][0]))
        assert env.min_position <= first <= west and east <= last <= env.max_position
        layouts.add((env.wall, env.gap))
        sides.add(info["position"][0] < west)
        again, other = env.reset(seed=seed)
        assert np.array_equal(obs, again) and np.array_equal(info["goal_obs"], other["goal_obs"])
    assert len(layouts) == 40 and len(sides) == 2


def test_the_goal_is_a_picture_of_its_own_and_not_in_the_observation():
    env = TwoRooms(render_mode="rgb_array")
    obs, info = env.reset(seed=0)
    x, y = info["goal"].astype(int)
    assert (info["goal_obs"][y, x] == BALL).all() and not (obs[y, x] == BALL).any()
    env.goal = np.array([50.0, 50.0])
    assert np.array_equal(obs, env.render()) and not np.array_equal(info["goal_obs"], env.goal_image())
    env.position = env.goal
    assert np.array_equal(env.step(np.zeros(2))[0], env.goal_image())


def test_walls_stop_the_axis_that_runs_into_them():
    env = TwoRooms()
    env.reset(seed=0)
    west, east = env.wall_faces()
    env.position = np.array([west - 1, 50.0])
    env.step(np.array([1.0, 1.0]))
    assert env.position.tolist() == [west, 52]
    env.position = np.array([west - 1, env.gap])
    env.step(np.array([1.0, 0.0]))
    assert env.position[0] == west + 1
    env.step(np.array([0.0, 1.0]))
    env.step(np.array([0.0, 1.0]))
    env.step(np.array([0.0, 1.0]))
    assert env.position[1] == env.gap + env.door
    env.position = np.array([60.0, 60.0])
    env.step(np.array([1.0, 1.0]))
    assert env.position.tolist() == [env.max_position, env.max_position] and east < env.max_position


@pytest.mark.parametrize("options", [{"speed": 10.0}, {"speed": 0.0}, {"limit": 0}])
def test_a_speed_that_leaps_through_the_door_is_refused(options):
    with pytest.raises(ValueError, match="TwoRooms needs"):
        TwoRooms(**options)
