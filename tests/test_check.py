"""The checker of VecEnvs: correct ones pass, and each fault is reported."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import IMAGE, TWO_ACTIONS, VECTOR, Toy, small_world
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor

from worldmodel.envs import Chain, ImaginedVecEnv, check_vec_env, make_vec
from worldmodel.errors import ConfigError, EnvError


class Sound(VecEnv):
    """Three environments of random observations whose episodes of 5 steps end by truncation and by termination in turn."""

    render_mode = None

    def __init__(self, observation=VECTOR, action=TWO_ACTIONS):
        self.rng = np.random.default_rng()
        super().__init__(3, observation, action)

    def draw(self):
        return self.rng.uniform(-1, 1, (3, 4)).astype(np.float32)

    def reset(self):
        if self._seeds[0] is not None:
            self.rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self.steps, self.obs = np.arange(3), self.draw()
        return self.obs.copy()

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        self.steps += 1
        done = self.steps % 5 == 0
        truncated = self.steps % 10 == 0
        last, self.obs = self.draw(), self.draw()
        obs = np.where(done[:, None], self.obs, last)
        infos = [
            {"terminal_observation": last[i].copy(), "TimeLimit.truncated": bool(truncated[i])} if done[i] else {} for i in range(3)
        ]
        return obs, self.rng.normal(size=3).astype(np.float32), done, infos

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        return [
            getattr(self, attr_name) if attr_name == "render_mode" else self._none(attr_name) for _ in self._get_indices(indices)
        ]

    def _none(self, name):
        raise AttributeError(name)

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        return [getattr(object(), method_name)() for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False for _ in self._get_indices(indices)]


def broken(**changes) -> Sound:
    """A sound VecEnv of which one method's result is changed: `step_wait=lambda env, obs, rewards, dones, infos: ...`."""
    env = Sound(*[changes.pop(name) for name in ("observation", "action") if name in changes])
    for name, change in changes.items():
        method = getattr(env, name)

        def changed(*args, _method=method, _change=change, **kwargs):
            result = _method(*args, **kwargs)
            return _change(env, *result) if isinstance(result, tuple) else _change(env, result)

        setattr(env, name, changed)
    return env


def at_ends(change):
    """Changes the infos of environments that ended."""

    def changed(env, obs, rewards, dones, infos):
        for i in np.flatnonzero(dones):
            change(infos[i], obs[i])
        return obs, rewards, dones, infos

    return changed


def reused(env, obs, rewards, dones, infos):
    env.buffer = getattr(env, "buffer", np.empty_like(obs))
    env.buffer[:] = obs
    return env.buffer, rewards, dones, infos


def reads_again(env, obs, rewards, dones, infos):
    """Reads the rewards' memory again, with what the caller wrote into it."""
    env.given = rewards + np.float32(0.5) * env.given
    return obs, env.given, dones, infos


def without_reset(env, obs, rewards, dones, infos):
    for i in np.flatnonzero(dones):
        obs[i] = infos[i]["terminal_observation"]
    return obs, rewards, dones, infos


FAULTS = {
    "an observation space of another kind": (broken(observation=spaces.Tuple([VECTOR])), "Box, Discrete"),
    "unbounded actions": (broken(observation=VECTOR, action=spaces.Box(-np.inf, np.inf, (2,))), "finite bounds"),
    "actions from 1": (broken(observation=VECTOR, action=spaces.Discrete(2, start=1)), "start at 0"),
    "nested actions": (broken(observation=VECTOR, action=spaces.Dict({"a": VECTOR})), "the action space is Dict"),
    "no environments": (broken(), "num_envs is 0"),
    "attributes for some": (
        broken(get_attr=lambda env, x: x[:2] if len(x) == 3 else x),
        "get_attr with indices=None gave a list of 2",
    ),
    "attributes for all": (broken(get_attr=lambda env, x: x * 3), "get_attr"),
    "methods for some": (broken(env_method=lambda env, x: x[:1]), "env_method with indices=None"),
    "wrappers for one": (broken(env_is_wrapped=lambda env, x: x[0]), "env_is_wrapped with indices=None gave False"),
    "every attribute is there": (broken(has_attr=lambda env, x: True), "has_attr says yes"),
    "reset gives infos": (broken(reset=lambda env, obs: (obs, {})), "reset gave a tuple of 2"),
    "another dtype": (broken(reset=lambda env, obs: obs.astype(np.float64)), "dtype float64"),
    "another shape": (broken(step_wait=lambda env, obs, *rest: (obs[:, :2], *rest)), r"shape \(3, 2\)"),
    "out of the space": (broken(step_wait=lambda env, obs, *rest: (obs + 5, *rest)), "environment 0 is outside the space"),
    "five values": (broken(step_wait=lambda env, *four: (*four, {})), "step gave a tuple of 5"),
    "rewards as a list": (broken(step_wait=lambda env, obs, r, *rest: (obs, r.tolist(), *rest)), "rewards is a list of 3"),
    "rewards in a column": (
        broken(step_wait=lambda env, obs, r, *rest: (obs, r[:, None], *rest)),
        r"rewards is an array of shape \(3, 1\)",
    ),
    "a reward that is NaN": (broken(step_wait=lambda env, obs, r, *rest: (obs, r * np.nan, *rest)), "finite"),
    "dones as floats": (broken(step_wait=lambda env, obs, r, d, i: (obs, r, d.astype(float), i)), "dones is"),
    "one info": (broken(step_wait=lambda env, obs, r, d, i: (obs, r, d, i[0])), "infos is a dict"),
    "one info for all": (broken(step_wait=lambda env, obs, r, d, i: (obs, r, d, [{}] * 3)), "one dict twice"),
    "no terminal observation": (
        broken(step_wait=at_ends(lambda info, obs: info.pop("terminal_observation"))),
        "without terminal_observation",
    ),
    "a batched terminal observation": (
        broken(step_wait=at_ends(lambda info, obs: info.update(terminal_observation=info["terminal_observation"][None]))),
        "without a batch axis",
    ),
    "a terminal observation of another dtype": (
        broken(step_wait=at_ends(lambda info, obs: info.update(terminal_observation=np.zeros(4, np.float16)))),
        "terminal_observation is an array .* float16",
    ),
    "truncation as a number": (
        broken(step_wait=at_ends(lambda info, obs: info.update({"TimeLimit.truncated": 0.5}))),
        "0.5; expected a bool",
    ),
    "truncation without end": (
        broken(step_wait=lambda env, o, r, d, i: (o, r, d, [{**x, "TimeLimit.truncated": True} for x in i])),
        "is true, but it is not done",
    ),
    "no reset in the same step": (broken(step_wait=without_reset), "observation after an end is the terminal one"),
    "a terminal observation that aliases": (
        broken(
            step_wait=at_ends(
                lambda info, obs: (
                    obs.__setitem__(slice(None), info["terminal_observation"]),
                    info.update(terminal_observation=obs),
                )
            )
        ),
        "share memory|written to",
    ),
    "a buffer that is reused": (broken(step_wait=reused), "written to in the next"),
    "arrays that are read again": (
        broken(step_wait=reads_again, reset=lambda env, obs: (setattr(env, "given", 0), obs)[1]),
        "what the caller writes",
    ),
    "read-only rewards": (broken(step_wait=lambda env, o, r, d, i: (r.setflags(write=False), (o, r, d, i))[1]), "read-only"),
    "a seed that is ignored": (
        broken(_reset_seeds=lambda env, _: setattr(env, "rng", np.random.default_rng())),
        "same seed and actions differ",
    ),
}
FAULTS["no environments"][0].num_envs = 0
FAULTS["SB3's frame stack, which lends its buffer"] = VecFrameStack(Sound(), 2), "what the caller writes"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported(fault):
    env, message = FAULTS[fault]
    with pytest.raises(EnvError, match=message):
        check_vec_env(env, steps=25)


@pytest.mark.parametrize(
    "env",
    [
        Sound,
        lambda: make_vec_env("CartPole-v1", 3),
        lambda: VecMonitor(DummyVecEnv([Chain, Chain])),
        lambda: make_vec("worldmodel.envs:Catch-v0", 2),
        lambda: DummyVecEnv([lambda: Toy(spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)}), spaces.Box(-1, 1, (2,)))]),
        lambda: DummyVecEnv([lambda: Toy(spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3]))]),
        lambda: ImaginedVecEnv(small_world(), 3, 4, start="prior"),
        lambda: ImaginedVecEnv(small_world(IMAGE, spaces.Box(-1, 1, (2,))), 2, 4, start="prior", observation="decoded"),
        lambda: ImaginedVecEnv(small_world(spaces.Discrete(4), spaces.MultiBinary(2)), 1, 4, start="prior", observation="decoded"),
        lambda: ImaginedVecEnv(small_world(spaces.Dict({"a": VECTOR, "b": IMAGE})), 3, 4, start="prior", observation="decoded"),
    ],
)
def test_sound_ones_pass(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert check_vec_env(env(), steps=60) is None  # no error, no warning


def test_a_play_without_ends_gives_a_warning():
    with pytest.warns(UserWarning, match="no episode ended in 2 steps"):
        check_vec_env(Sound(), steps=2)


def test_only_vec_envs_are_checked():
    with pytest.raises(ConfigError, match="got Toy"):
        check_vec_env(Toy())
