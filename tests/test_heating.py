"""The heated house: heat is conserved, the wall is hidden, the tariff jumps, and a thermostat is better than chance."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from worldmodel.envs.heating import DAY, STEP, Heating


def play(env, policy, seed=0):
    """(observations, rewards) of one episode."""
    observations, rewards, over = [env.reset(seed=seed)[0]], [], False
    while not over:
        obs, reward, terminated, over, _ = env.step(policy(observations[-1]))
        assert not terminated
        observations.append(obs)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def thermostat(obs):
    return np.float32([obs[1] < 21])


def test_the_house_passes_gymnasiums_checker_and_makes_the_same_episode_of_the_same_seed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("worldmodel.envs:Heating-v0").unwrapped, skip_render_check=True)
    one, again, other = (play(Heating(), thermostat, seed)[0] for seed in (3, 3, 4))
    assert one.shape == (289, len(Heating.names)) and np.array_equal(one, again) and not np.array_equal(one, other)


def test_the_clock_adds_900_seconds_a_step_and_begins_anew_at_midnight():
    time = play(Heating(), thermostat)[0][:, 0]
    assert set(np.diff(time)) == {STEP, STEP - DAY} and time.max() == DAY - STEP and time.min() == 0


def test_heat_is_neither_lost_nor_made():
    env = Heating(noise=0)
    env.reset(seed=0)
    for action in np.linspace(0, 1, 50):
        stored = env.room_capacity * env.room + env.wall_capacity * env.wall
        gained = env.heater * action + (env.window + env.facade) * env.sun
        lost = env.room_to_outdoors * (env.room - env.outdoors) + env.wall_to_outdoors * (env.wall - env.outdoors)
        obs, *_ = env.step(np.float32([action]))
        after = env.room_capacity * env.room + env.wall_capacity * env.wall
        assert after - stored == pytest.approx(STEP * (gained - lost), rel=1e-5, abs=50)
        assert obs[4] == pytest.approx(env.heater * action + env.household, rel=1e-6)


def test_the_wall_is_not_seen_and_decides_what_the_room_does():
    rooms = []
    for wall in (5.0, 18.0):
        env = Heating(noise=0, jumps=0)
        first, _ = env.reset(seed=1)
        env.wall = wall
        rooms.append([first, *(env.step(np.float32([0.2]))[0] for _ in range(4))])
    one, two = np.array(rooms)
    assert np.array_equal(one[0], two[0])  # nothing tells the two houses apart
    assert two[1, 1] - one[1, 1] == pytest.approx(STEP * Heating.room_to_wall * 13 / Heating.room_capacity, rel=1e-4)
    assert (np.diff(two[:, 1] - one[:, 1]) > 0).all()


def test_the_tariff_jumps_as_often_as_it_says_and_otherwise_stays():
    tariff = play(Heating(limit=5000, jumps=0.1), thermostat)[0][:, 5]
    assert set(tariff) == set(np.float32(Heating.tariffs))
    assert np.mean(np.diff(tariff) != 0) == pytest.approx(0.1, abs=0.02)
    assert len(set(play(Heating(jumps=0), thermostat)[0][:, 5])) == 1


def test_noise_is_what_it_says_and_none_without_it():
    def rest(noise):
        """What the thermometers show more than there is."""
        env = Heating(noise=noise, limit=2000)
        env.reset(seed=0)
        seen = []
        for _ in range(env.limit):
            obs, *_ = env.step(np.float32([0.5]))
            seen.append([obs[1] - env.room, obs[2] - env.outdoors, obs[4] - 2700])
        return np.std(seen, 0)

    assert rest(1.0) == pytest.approx([0.05, 0.1, 40], rel=0.1) and rest(2.0) == pytest.approx([0.1, 0.2, 80], rel=0.1)
    assert (rest(0.0) < [1e-5, 1e-5, 1e-9]).all()


def test_a_thermostat_is_better_than_chance_and_than_none():
    rng = np.random.default_rng(0)
    for seed in range(3):
        observations, rewards = play(Heating(), thermostat, seed)
        others = [play(Heating(), policy, seed)[1].sum() for policy in (lambda obs: rng.random(1), lambda obs: np.zeros(1))]
        assert rewards.sum() > max(others) + 10 and abs(np.median(observations[96:, 1]) - 21) < 1
        cost = (observations[:-1, 5] * observations[1:, 4] * STEP / 3.6e6).sum()
        assert rewards.sum() == pytest.approx(-cost, abs=15) and rewards.sum() <= -cost + 1e-3


@pytest.mark.parametrize("options", [{"limit": 0}, {"noise": -1.0}, {"noise": float("nan")}, {"jumps": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Heating needs limit"):
        Heating(**options)
