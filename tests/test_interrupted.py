"""Runs that are stopped between two updates, and scripts that are stopped anywhere and learn on."""

from __future__ import annotations

import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from conftest import SMALL_WORLD, sequence, small_dreamer, small_world, stored
from small_runs import Nervous, small_train
from stable_baselines3.common.callbacks import BaseCallback
from test_offline import learn, walks  # noqa: F401 (a fixture)

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.callback import RunCallback
from worldmodel.agents.training.signals import Interrupted
from worldmodel.storage.run import Run


def strike(monkeypatch, at: int) -> list[int]:
    """SIGTERM in the update with this number; the list of all that were made."""
    update, made = WorldModelAlgorithm.update, []

    def struck(self, improve=True):
        made.append(len(made) + 1)
        if len(made) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, improve)

    monkeypatch.setattr(WorldModelAlgorithm, "update", struck)
    return made


LONG = {"train.pretrain": 40, "eval.every": 0, "eval.episodes": 1}


@pytest.mark.parametrize("options", [{}, {"checkpoint.fence": True}], ids=["plain", "fence"])
def test_a_signal_among_the_first_updates_ends_the_run_within_one_and_a_resume_makes_the_rest(tmp_path, monkeypatch, options):
    Nervous.steps = 0
    options = {**LONG, **options}
    whole = small_train(tmp_path / "whole", 40, "Nervous-v0", options=options).updates
    made = strike(monkeypatch, 5)
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    assert len(made) == 5
    assert Run.open(tmp_path / "run").agent().learner.updates == 5
    assert small_train(tmp_path / "run", None, "Nervous-v0", options=options, resume=True).updates == whole


@pytest.mark.parametrize("at", [3, 44])
def test_updates_that_the_last_step_still_owes_are_made_on_resume(tmp_path, monkeypatch, at):
    Nervous.steps = 0
    options = {**LONG, "train.prefill": 21, "train.ratio": 6.0, "checkpoint.every": 0}
    whole = small_train(tmp_path / "whole", 18, "Nervous-v0", options=options).updates
    assert whole == 46
    strike(monkeypatch, at)
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 18, "Nervous-v0", options=options)
    assert Run.open(tmp_path / "run").checkpoints == [0, 18]
    assert small_train(tmp_path / "run", None, "Nervous-v0", options=options, resume=True).updates == whole
    assert Run.open(tmp_path / "run").agent().learner.updates == whole


def test_a_step_is_evaluated_after_its_updates(tmp_path, monkeypatch):
    Nervous.steps = 0
    updates = []
    measure = RunCallback.measure
    monkeypatch.setattr(
        RunCallback, "measure", lambda self, *args: updates.append(self.model.learner.updates) or measure(self, *args)
    )
    options = {**LONG, "train.prefill": 21, "eval.every": 18}
    strike(monkeypatch, 5)
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 30, "Nervous-v0", options=options)
    assert Run.open(tmp_path / "run").checkpoints[-1] == 18
    updates.clear()  # an evaluation that gave up at once
    small_train(tmp_path / "run", None, "Nervous-v0", options=options, resume=True)
    assert updates[0] == LONG["train.pretrain"]


def test_a_signal_among_the_updates_of_recorded_experience_ends_them_at_once(tmp_path, monkeypatch, walks):  # noqa: F811
    made = strike(monkeypatch, 7)
    with pytest.raises(Interrupted):
        learn(tmp_path / "run", walks, 4, options={"train.ratio": 20.0})
    assert len(made) == 7


def test_a_signal_ends_a_training_in_the_dream(tmp_path):
    from worldmodel.agents.sb3.agent import SB3Agent
    from worldmodel.envs.make import make_vec

    config = {"agent.kind": "sb3", "agent.algo": "ppo", "agent.every": 10, "agent.imagined": 100_000, "agent.worlds": 4}
    from small_runs import OPTIONS

    options = {key: value for key, value in OPTIONS.items() if not key.startswith("agent.")}
    agent = SB3Agent("MlpPolicy", make_vec("Nervous-v0", 1, 0), config={**options, **config}, seed=0, device="cpu")
    asked = []
    agent.should_continue = lambda: asked.append(1) is None and agent.controller.algorithm.num_timesteps < 40
    agent.learn(30)
    assert agent.dreams == 0 and agent.has_pending_updates and agent.imagined_steps < 400


# A script --------------------------------------------------------------------------------------------------------------


class Counting(gym.Env):
    """Shows how many steps the episode has; raises at the given calls."""

    observation_space, action_space = gym.spaces.Box(-1, 100, (1,), np.float32), gym.spaces.Discrete(2)
    calls, at, late = 0, -1, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.calls += 1
        if self.calls == self.at and not self.late:
            raise KeyboardInterrupt
        self.t += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return np.full(1, self.t, np.float32), float(self.t), False, self.t == 20, {}


class Raises(BaseCallback):
    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            raise KeyboardInterrupt
        return True


def assert_counts(rows, begins: bool = True) -> None:
    """`begins`: each stretch of rows is an episode from its reset on, not one that is gone on with."""
    for t in range(1, len(rows.reward)):
        if rows.is_first[t]:
            assert rows.is_last[t - 1] and not (begins and float(rows.obs["obs"][t]))
        else:
            assert not rows.is_last[t - 1]
            assert float(rows.obs["obs"][t]) == float(rows.obs["obs"][t - 1]) + 1 == float(rows.reward[t])


@pytest.mark.parametrize(
    "place", ["before the step", "in the step", "before the replay", "in the replay", "update", "callback", "reset"]
)
def test_a_script_that_is_interrupted_anywhere_and_learns_on_keeps_no_row_that_does_not_follow(place, monkeypatch):
    env = Counting()
    agent = small_dreamer(env)
    agent.learn(33)  # so that an episode is open
    if place in ("before the step", "in the step"):
        env.at, env.late = env.calls + 5, place == "in the step"
    owner, name = {
        "reset": (agent.env, "reset"),
        "before the replay": (agent, "record"),
        "in the replay": (agent.world.scaling, "update"),
        "update": (agent, "update"),
    }.get(place, (None, ""))
    if owner is not None:
        inner, calls = getattr(owner, name), []

        def once(*args, **kwargs):
            calls.append(1)
            found = inner(*args, **kwargs) if place == "reset" else None
            if len(calls) == (1 if place == "reset" else 3):
                raise KeyboardInterrupt
            return found if place == "reset" else inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, once)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(30, Raises(5 if place == "callback" else -1), reset_num_timesteps=place == "reset")
    agent.learn(45, reset_num_timesteps=False)
    rows = stored(agent)
    assert_counts(rows)
    assert int(rows.is_last.sum()) == agent.replay.ends


def beside(kind: str, env):
    """(an SB3 algorithm, the callback that records what it meets)."""
    from stable_baselines3 import DQN, PPO

    from worldmodel.agents import DynaCallback, JointWorldModel, latent_policy_kwargs

    options = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    off = {"learning_starts": 1000, "buffer_size": 200}
    if kind == "dyna":
        return DQN("MlpPolicy", env, **options, **off), DynaCallback(every=1000, config={**SMALL_WORLD, "train.prefill": 1000})
    world = small_world(gym.spaces.Box(-1, 100, (1,), np.float32), dynamics={"posterior": "observation"})
    options["policy_kwargs"] |= latent_policy_kwargs(world, "joint")
    algorithm = DQN("MlpPolicy", env, **options, **off) if kind == "joint DQN" else PPO("MlpPolicy", env, n_steps=8, **options)
    return algorithm, JointWorldModel(world, ratio=0.0)


class Stops(Raises):
    def _on_step(self) -> bool:
        return self.n_calls != self.at


@pytest.mark.parametrize("place", ["before the step", "in the step", "before", "behind", "stop"])
@pytest.mark.parametrize("kind", ["dyna", "joint DQN", "joint PPO"])
def test_an_sb3_algorithm_that_is_interrupted_and_learns_on_leaves_no_row_that_does_not_follow(kind, place):
    env = Counting()
    model, callback = beside(kind, env)
    model.learn(16, callback=callback, reset_num_timesteps=False)
    if place in ("before the step", "in the step"):
        env.at, env.late = env.calls + 5, place == "in the step"
    other = (Stops if place == "stop" else Raises)(5 if place in ("before", "behind", "stop") else -1)
    both = [other, callback] if place == "before" else [callback, other]
    if place == "stop":
        model.learn(16, callback=both, reset_num_timesteps=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            model.learn(16, callback=both, reset_num_timesteps=False)
    model.learn(40, callback=callback, reset_num_timesteps=False)
    rows = stored(callback.agent)
    assert len(rows.reward) > 50
    assert_counts(rows, begins=False)


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_what_processes_answer_to_an_interrupted_step_does_not_pass_for_a_reset(answers, monkeypatch):
    from stable_baselines3.common.vec_env import SubprocVecEnv

    venv = SubprocVecEnv([Counting, Counting], start_method="fork")
    try:
        agent = small_dreamer(venv, **{"train.prefill": 1000})
        agent.learn(10)

        def interrupted():
            for remote in venv.remotes[:answers]:
                remote.recv()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(venv, "step_wait", interrupted)
            agent.learn(10, reset_num_timesteps=False)
        agent.learn(20, reset_num_timesteps=False)
        for i in range(2):
            rows = agent.replay.stream(i)
            assert_counts(sequence(rows))
    finally:
        venv.close()


def test_logs_come_where_no_episode_ends_and_at_the_end(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from worldmodel.agents import loop

    agent = small_dreamer("CliffWalking-v1", tensorboard_log=str(tmp_path), **{"train.ratio": 0.02})
    agent.learn(loop.LOG_STEPS + 20)
    events = EventAccumulator(str(tmp_path / "Dreamer_1")).Reload()
    steps = [event.step for event in events.Scalars("world/loss/reward")]
    assert loop.LOG_STEPS in steps and max(steps) == loop.LOG_STEPS + 20


def test_a_checkpoint_comes_at_each_evaluation_and_an_untrained_one_is_named(tmp_path, capsys):
    from worldmodel.commands.dream import dream

    small_train(tmp_path / "run", 60, options={"checkpoint.every": 0, "checkpoint.keep": 9})
    assert Run.open(tmp_path / "run").checkpoints == [0, 25, 50, 60]
    small_train(tmp_path / "new", 12, options={"eval.every": 0})
    logged = []
    assert dream(tmp_path / "new", 1, 2, log=logged.append)["step"] == 12
    assert any("step 12: untrained" in line for line in logged)
