"""Environments that fail and are made anew: what SB3 gets, what is counted, and where the limit is."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from small_runs import small_train
from stable_baselines3 import DQN

from worldmodel.agents import DynaCallback
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.held_out import collect
from worldmodel.agents.random import RandomAgent
from worldmodel.envs.make import EnvConfig, make_vec
from worldmodel.envs.vectors.restarts import RESTARTED, LocalVecEnv, ReportFaults, Restarts
from worldmodel.envs.wrappers import CheckedEnv
from worldmodel.errors import EnvError, MissingExtraError


class Frail(gym.Env):
    """Episodes of 4 steps; observes (its first seed, episode, step). `plan` holds what the next calls raise, over all copies."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)
    plan: dict[str, list] = {}
    """{"make" | "reset" | "step": [None or an error, ...]}, one for each call."""

    def __init__(self):
        self._may_fail("make")
        self.first, self.episode = None, 0

    def reset(self, *, seed=None, options=None):
        self._may_fail("reset")
        self.first = seed if self.first is None else self.first
        self.episode, self.steps = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self._may_fail("step")
        self.steps += 1
        return self._observe(), 1.0, self.steps == 4, False, {}

    def _observe(self):
        return np.array([-1 if self.first is None else self.first, self.episode, self.steps], np.float64)

    @classmethod
    def _may_fail(cls, call):
        error = cls.plan[call].pop(0) if cls.plan.get(call) else None
        if error is not None:
            raise error


gym.register("Frail-v0", Frail)
BOOM = ZeroDivisionError("boom")


@pytest.fixture(autouse=True)
def no_errors():
    Frail.plan = {}
    yield
    Frail.plan = {}


def local(restarts: Restarts, seed: int | None = 5, count: int = 2) -> LocalVecEnv:
    venv = LocalVecEnv([lambda i=i: ReportFaults(CheckedEnv(Frail(), i)) for i in range(count)], restarts)
    if seed is not None:
        venv.seed(seed)
    return venv


def go(venv, steps: int = 1):
    for _ in range(steps):
        result = venv.step(np.zeros(venv.num_envs, int))
    return result


def test_a_failed_step_is_a_truncation_at_the_last_good_observation():
    restarts = Restarts(3)
    venv = local(restarts)
    venv.reset()
    go(venv, 2)
    Frail.plan = {"step": [None, BOOM]}
    obs, rewards, dones, infos = go(venv)
    assert "environment 1, episode 1, step 3: step raised ZeroDivisionError: boom" in infos[1].pop(RESTARTED)
    last = infos[1].pop("terminal_observation")
    assert last.tolist() == [6, 1, 2] and infos[1] == {"TimeLimit.truncated": True} and RESTARTED not in infos[0]
    assert obs[0].tolist() == [5, 1, 3] and obs[1, 1:].tolist() == [1, 0] and obs[1, 0] not in (5, 6)
    assert rewards.tolist() == [1, 0] and dones.tolist() == [False, True] and restarts.count == 1


def test_the_seed_of_a_new_environment_follows_from_the_vec_envs():
    def after(seed: int | None, failures: int) -> float:
        venv = local(Restarts(9), seed)
        venv.reset()
        for _ in range(failures):
            Frail.plan = {"step": [None, BOOM]}
            obs, *_ = go(venv)
        return float(obs[1, 0])

    assert after(5, 1) == after(5, 1)
    assert len({after(5, 1), after(5, 2), after(6, 1)}) == 3
    assert after(None, 1) == -1


def test_an_episode_that_ended_counts_although_the_next_reset_failed():
    restarts = Restarts(3)
    venv = local(restarts)
    venv.reset()
    go(venv, 3)
    Frail.plan = {"reset": [BOOM, None]}
    obs, rewards, dones, infos = go(venv)
    assert RESTARTED not in infos[0] and infos[0]["terminal_observation"].tolist() == [5, 1, 4]
    assert rewards.tolist() == [1, 1] and not infos[0]["TimeLimit.truncated"] and dones.all()
    assert obs[0, 1:].tolist() == [1, 0] and obs[0, 0] != 5 and obs[1].tolist() == [6, 2, 0] and restarts.count == 1


def test_each_failure_counts_until_the_limit():
    restarts = Restarts(3)
    venv = local(restarts)
    Frail.plan = {"reset": [BOOM, BOOM]}
    venv.reset()
    assert restarts.count == 2
    Frail.plan = {"step": [BOOM], "make": [EnvError("environment 0: it could not be made.")]}
    with pytest.raises(EnvError, match=r"could not be made\. It was made anew 3 times within 300 s, as env\.restarts allows"):
        go(venv)


def test_restarts_count_within_the_window_alone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("worldmodel.envs.vectors.restarts.time.monotonic", lambda: clock[0])
    restarts = Restarts(2, 10.0)
    for now in (0.0, 5.0, 11.0, 16.0):
        clock[0] = now
        restarts.record_failure(EnvError("x"))
    clock[0] = 20.0
    with pytest.raises(EnvError):
        restarts.record_failure(EnvError("x"))
    assert restarts.count == 4


def test_an_error_that_a_new_environment_would_have_too_is_raised_at_once(monkeypatch):
    monkeypatch.setattr("worldmodel.envs.extras.find_spec", lambda name: None)
    venv = local(Restarts(3))
    venv.reset()
    Frail.plan = {
        "step": [gym.error.DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[classic-control]"`')]
    }
    with pytest.raises(MissingExtraError, match="render"):
        go(venv)
    venv = make_vec("Frail-v0", 1, seed=0)
    venv.reset()
    Frail.plan = {"step": [BOOM]}
    with pytest.raises(EnvError, match="boom") as caught:
        go(venv)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


FRAIL = EnvConfig(id="Frail-v0", restarts=2)


def test_evaluations_play_again_what_failed_and_held_out_episodes_end_before_it():
    agent = RandomAgent("MlpPolicy", "Frail-v0", config={"env.restarts": 2}, seed=0, device="cpu")
    Frail.plan = {"step": [None] * 5 + [BOOM]}
    assert evaluate(agent, FRAIL, 2, seed=0) == ([4.0, 4.0], [4, 4])
    Frail.plan = {"step": [None] * 5 + [BOOM]}
    rows = collect(agent, FRAIL, 2, seed=0).rows
    assert rows.is_first[0].nonzero()[:, 0].tolist() == [0, 5] and rows.obs["obs"][0, :, 2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_sb3_algorithms_learn_on_and_what_learns_along_stores_no_such_step():
    venv = make_vec(EnvConfig(id="Frail-v0", restarts=2, num_envs=2), seed=0)
    callback = DynaCallback(ratio=0, config={"train.prefill": 1000})
    Frail.plan = {"step": [None] * 9 + [BOOM]}
    DQN("MlpPolicy", venv, learning_starts=4, train_freq=1, device="cpu").learn(30, callback=callback)
    rows = callback.agent.replay.stream(1)
    steps, ends = rows.obs["obs"][0, :, 2].tolist(), rows.is_last[0].nonzero()[:, 0].tolist()
    assert steps == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2] and ends[:3] == [4, 5, 10]
    assert rows.is_terminal[0, ends].tolist() == [True, False, *[True] * (len(ends) - 2)]
    assert callback.agent.replay.stream(0).is_terminal.sum() == callback.agent.replay.stream(0).is_last.sum() == 3


def test_restarts_are_logged_and_go_on_being_counted_after_a_resume(tmp_path):
    from worldmodel.view.tensorboard import read

    options = {"env.restarts": 3, "log.tensorboard": True, "log.pictures": 0, "log.every": 1, "eval.every": 0}
    for steps, failing in ((30, 7), (60, 9)):
        Frail.plan = {"step": [None] * failing + [BOOM]}
        small_train(tmp_path / "run", steps, "Frail-v0", options=options, resume=steps == 60)
    counted = [value for _, value in read(tmp_path / "run").scalars["env/restarts"]]
    assert counted[0] == 1 and counted[-1] == 2 and counted == sorted(counted)
