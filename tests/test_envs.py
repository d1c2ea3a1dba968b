"""Environments: broken ones are named, nested ones are flattened, and the small worlds do what their pages say."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import worldmodel.envs
from worldmodel.envs import extras
from worldmodel.envs.make import EnvConfig, as_vec_env, make_env, make_vec
from worldmodel.envs.tiny import Catch, Chain
from worldmodel.envs.wrappers import ActionRepeat, CheckedEnv, FlattenSpaces, RenderObservation
from worldmodel.errors import ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError
from worldmodel.spaces import ActionSpec, ObsSpec

CATCH, CHAIN = "worldmodel.envs:Catch-v0", "worldmodel.envs:Chain-v0"


class Puppet(gym.Env):
    """Behaves as its arguments say: `obs`, `result` or `deed` replace its observation, its step's result, its step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, space=None, obs=None, result=None, deed=None, at=3, action_space=None, frame=None, render_mode="rgb_array"):
        self.observation_space = spaces.Box(-9, 9, (2,), np.float32) if space is None else space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.obs, self.result, self.deed, self.at, self.frame, self.render_mode = obs, result, deed, at, frame, render_mode
        self.count, self.seeds, self.actions = 0, [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.seeds.append(seed)
        self.count = 0
        return self._next()[0], {}

    def step(self, action):
        self.actions.append(action)
        self.count += 1
        if self.count == self.at:
            if self.deed is not None:
                self.deed()
            if self.result is not None:
                return self.result(self.observation_space.sample())
            if self.obs is not None:
                return self.obs(self.observation_space.sample()), 1.0, False, False, {}
        return self._next()

    def _next(self):
        return self.observation_space.sample(), 1.0, False, False, {}

    def render(self):
        return self.frame


def raiser(error):
    def deed():
        raise error

    return deed


def with_reward(reward):
    return {"result": lambda obs: (obs, reward, False, False, {})}


NESTED = spaces.Dict(
    arm=spaces.Dict(angle=spaces.Box(-1, 1, (2,), np.float32)), pair=spaces.Tuple([spaces.Discrete(3), spaces.Discrete(2)])
)

# name: (options of the puppet, what the message must say)
BROKEN = {
    "raises": ({"deed": raiser(ZeroDivisionError("oh"))}, "step raised ZeroDivisionError: oh"),
    "exits": ({"deed": lambda: sys.exit(7)}, r"sys.exit\(7\)"),
    "old 4-tuple": ({"result": lambda obs: (obs, 1.0, False, {})}, "step returned a tuple of 4"),
    "nothing": ({"result": lambda obs: None}, "step returned None"),
    "shape": ({"obs": lambda obs: np.zeros(3, np.float32)}, r"'obs' is an array of shape \(3,\).*shape \(2,\)"),
    "too great for the dtype": ({"obs": lambda obs: obs + np.float64(1e39)}, "dtype float64 and holds numbers that float32"),
    "ragged list": ({"obs": lambda obs: [0.0, [0.0]]}, "a list of 2"),
    "none": ({"obs": lambda obs: None or 0}, "'obs' is 0"),
    "object": ({"obs": lambda obs: obs.astype(object)}, "dtype object"),
    "NaN": ({"obs": lambda obs: obs * np.nan}, "'obs' holds NaN"),
    "infinity": ({"obs": lambda obs: obs + np.float32(np.inf)}, "'obs' holds NaN or infinity"),
    "beyond 32 bits": (
        {"space": spaces.Box(-np.inf, np.inf, (2,), np.float64), "obs": lambda obs: obs * 0 + 1e39},
        "'obs' holds 1e\\+39",
    ),
    "no category": ({"space": spaces.Discrete(3), "obs": lambda obs: 3}, "'obs' is 3; expected a category"),
    "category as float": ({"space": spaces.Discrete(3), "obs": lambda obs: 1.5}, "'obs' is 1.5"),
    "no element": ({"space": spaces.MultiDiscrete([2, 2]), "obs": lambda obs: np.array([0, 2])}, r"'obs' is \[0, 2\]"),
    "no bit": ({"space": spaces.MultiBinary(2), "obs": lambda obs: np.array([0, -1])}, r"'obs' is \[0, -1\]"),
    "bits as floats": ({"space": spaces.MultiBinary(2), "obs": lambda obs: np.full(2, 0.5)}, "expected integers"),
    "missing and extra key": (
        {"space": NESTED, "obs": lambda obs: {"arm": obs["arm"], "leg": 1}},
        r"missing keys \['pair'\] and extra keys \['leg'\]",
    ),
    "missing nested key": ({"space": NESTED, "obs": lambda obs: {**obs, "arm": {}}}, r"'arm' has missing keys \['angle'\]"),
    "NaN in a nested key": (
        {"space": NESTED, "obs": lambda obs: {**obs, "arm": {"angle": np.full(2, np.nan, np.float32)}}},
        "'arm.angle' holds NaN",
    ),
    "short tuple": ({"space": NESTED, "obs": lambda obs: {**obs, "pair": (1,)}}, "'pair' is a tuple of 1"),
    "wrong tuple item": ({"space": NESTED, "obs": lambda obs: {**obs, "pair": (1, 2)}}, "'pair.1' is 2"),
    "no dict": ({"space": NESTED, "obs": lambda obs: 5}, "'obs' is 5; expected a dict"),
    "reward array": (with_reward(np.ones(2)), "the reward is an array of shape"),
    "reward text": (with_reward("1"), "the reward is '1'"),
    "reward none": (with_reward(None), "the reward is None"),
    "reward NaN": (with_reward(float("nan")), "the reward is nan"),
    "reward infinite": (with_reward(-np.inf), "the reward is -inf"),
    "reward beyond 32 bits": (with_reward(1e39), "the reward is 1e\\+39"),
    "flag none": ({"result": lambda obs: (obs, 1.0, None, False, {})}, "'terminated' is None"),
    "flag number": ({"result": lambda obs: (obs, 1.0, False, 0.5, {})}, "'truncated' is 0.5"),
    "info none": ({"result": lambda obs: (obs, 1.0, False, False, None)}, "info is None"),
}


@pytest.mark.parametrize("options, message", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_step_is_named_with_its_environment_episode_and_step(options, message):
    env = CheckedEnv(Puppet(**options), index=3)
    env.reset(seed=0)
    env.step(0)
    env.reset()
    env.step(0)
    env.step(1)
    with pytest.raises(EnvError, match="^environment 3, episode 2, step 3: .*" + message):
        env.step(1)


@pytest.mark.parametrize(
    "reset, message",
    [
        (lambda **_: np.zeros(2, np.float32), "reset returned an array"),
        (lambda **_: (np.zeros(2, np.float32), None), "info is None"),
        (lambda **_: (np.zeros(3, np.float32), {}), "shape"),
        (lambda: None, "reset raised TypeError"),
        (lambda **_: 1 / 0, "reset raised ZeroDivisionError"),
    ],
    ids=["no info", "info none", "shape", "takes no seed", "raises"],
)
def test_a_broken_reset_is_named_too(reset, message):
    puppet = Puppet()
    puppet.reset = reset
    with pytest.raises(EnvError, match="^environment 0, episode 1, step 0: .*" + message):
        CheckedEnv(puppet).reset()


def test_a_broken_environment_inside_a_vec_env_is_named_by_its_number():
    venv = DummyVecEnv([lambda i=i: CheckedEnv(Puppet(obs=(lambda o: o * np.nan) if i == 1 else None), i) for i in range(2)])
    venv.reset()
    venv.step(np.zeros(2, int))
    venv.step(np.zeros(2, int))
    with pytest.raises(EnvError, match="environment 1, episode 1, step 3"):
        venv.step(np.zeros(2, int))


def test_observations_and_infos_are_copies():
    buffer, note = np.zeros(2, np.float32), {}
    puppet = Puppet()
    puppet.reset = lambda **_: (buffer, note)
    obs, info = CheckedEnv(puppet).reset()
    buffer[:] = 7
    info["mine"] = 1
    assert (obs == 0).all() and note == {}


def test_keyboard_interrupts_pass():
    env = CheckedEnv(Puppet(deed=raiser(KeyboardInterrupt()), at=1))
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        env.step(0)


def test_the_space_is_the_one_that_was_promised():
    puppet = Puppet()
    env = CheckedEnv(puppet)
    env.reset()
    puppet.observation_space = spaces.Box(-1, 1, (5,), np.float32)
    with pytest.raises(EnvError, match="shape"):
        env.step(0)


def test_the_seed_counts_for_the_first_reset_only():
    puppet = Puppet()
    env = CheckedEnv(puppet, seed=5)
    env.reset()
    env.reset()
    assert puppet.seeds == [5, None]


def test_nested_spaces_become_one_flat_dict():
    env = FlattenSpaces(Puppet(NESTED))
    assert list(env.observation_space.spaces) == ["arm.angle", "pair.0", "pair.1"]
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    ObsSpec.from_space(env.observation_space)


def test_a_tuple_at_the_top_gets_numbered_keys():
    env = FlattenSpaces(Puppet(spaces.Tuple([spaces.Discrete(3, start=4), spaces.Box(0, 1, (2,), np.float32)])))
    assert list(env.observation_space.spaces) == ["0", "1"] and env.observation_space["0"] == spaces.Discrete(3)
    assert env.observation_space.contains(env.reset(seed=0)[0])


@pytest.mark.parametrize(
    "space, action, flat",
    [
        (spaces.Discrete(3, start=-1), 2, 1),
        (spaces.MultiDiscrete([3, 4], start=[2, -1]), [1, 3], [3, 2]),
        (spaces.MultiDiscrete([[3, 4]]), [1, 3], [[1, 3]]),
        (spaces.MultiBinary((2, 2)), [1, 0, 0, 1], [[1, 0], [0, 1]]),
    ],
    ids=["discrete", "multidiscrete", "2-d", "bits"],
)
def test_actions_are_shifted_and_folded_back(space, action, flat):
    puppet = Puppet(action_space=space)
    env = FlattenSpaces(puppet)
    env.reset()
    env.step(np.array(action) if isinstance(action, list) else action)
    assert space.contains(puppet.actions[0]) and np.array_equal(puppet.actions[0], flat)


def test_categories_are_observed_from_zero():
    for space in (spaces.Discrete(3, start=-1), spaces.MultiDiscrete([[3, 4]], start=[[2, -1]])):
        puppet = Puppet(space)
        env = FlattenSpaces(puppet)
        seen = [env.reset(seed=i)[0] for i in range(20)]
        assert all(env.observation_space.contains(obs) for obs in seen)
        assert np.min(seen) == 0


def test_what_is_flat_already_is_left_alone():
    puppet = Puppet()
    assert FlattenSpaces.wrap(puppet) is puppet
    assert isinstance(FlattenSpaces.wrap(Puppet(NESTED)), FlattenSpaces)


def test_keys_that_would_collide_are_refused():
    one = spaces.Discrete(2)
    with pytest.raises(UnsupportedSpaceError, match=r"a\.b"):
        FlattenSpaces(Puppet(spaces.Dict({"a": spaces.Dict(b=one), "a.b": one})))
    with pytest.raises(UnsupportedSpaceError, match="no array"):
        FlattenSpaces(Puppet(spaces.Dict(a=spaces.Dict())))


AWKWARD = {
    "nested": (NESTED, spaces.Discrete(2)),
    "starts": (spaces.Discrete(4, start=2), spaces.Discrete(3, start=-1)),
    "grids": (spaces.MultiDiscrete([[2, 3], [3, 2]]), spaces.MultiDiscrete([[2, 3]], start=[[1, 1]])),
    "bits": (spaces.MultiBinary((2, 2)), spaces.MultiBinary((2, 2))),
    "image": (spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (2,), np.float32)),
    "0-d": (spaces.Dict(a=spaces.Box(-1, 1, (), np.float32)), spaces.Box(-1, 1, (), np.float32)),
    "0-d integer": (spaces.Box(-5, 5, (), np.int64), spaces.Discrete(2)),
    "bool": (spaces.Dict(a=spaces.Box(0, 1, (3,), bool)), spaces.Discrete(2)),
}


@pytest.mark.parametrize("space, action_space", AWKWARD.values(), ids=list(AWKWARD))
def test_any_supported_space_reaches_a_vec_env_and_the_canonical_form(space, action_space):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(Casting input|unconventional shape).*")
        sb3_check(FlattenSpaces.wrap(CheckedEnv(Puppet(space, action_space=action_space))))
    puppet = Puppet(space, action_space=action_space)
    venv = as_vec_env(puppet, seed=3)
    observations, actions = ObsSpec.from_space(venv.observation_space), ActionSpec.from_space(venv.action_space)
    obs = venv.reset()
    for _ in range(3):
        observations.check(observations.to_raw(obs))
        obs, *_ = venv.step(actions.decode(actions.sample(1, np.random.default_rng(0))))
    assert all(action_space.contains(action) for action in puppet.actions)


def test_bounded_actions_reach_the_environment_as_they_are_stored():
    space = spaces.Box(np.array([-0.4, 0, -7], np.float32), np.array([0.4, 800, -6], np.float32))
    puppet = Puppet(action_space=space)
    venv, spec = as_vec_env(puppet), ActionSpec.from_space(space)
    venv.reset()
    for stored in (spec.sample(1, np.random.default_rng(0)), np.array([[3.0, -9.0, 0.1]])):
        venv.step(spec.decode(stored))
        assert space.contains(puppet.actions[-1])
        np.testing.assert_allclose(spec.encode(puppet.actions[-1][None]), np.clip(stored, -1, 1), atol=2e-6)


def test_pixels_replace_the_observation():
    frame = np.zeros((80, 40, 3), np.uint8)
    frame[:40] = 200
    env = RenderObservation(Puppet(frame=frame), 16)
    obs, _ = env.reset()
    assert env.observation_space.contains(obs) and (obs[:8] == 200).all() and (obs[8:] == 0).all()
    same = RenderObservation(Puppet(frame=frame[:16, :16]), 16).reset()[0]
    frame[:] = 1
    assert (same == 200).all()


def test_a_render_without_a_picture_is_named():
    env = RenderObservation(CheckedEnv(Puppet(frame=None), index=2), 16)
    with pytest.raises(EnvError, match="environment 2, episode 1, step 0: render gave None"):
        env.reset()
    with pytest.raises(ConfigError, match="rgb_array"):
        RenderObservation(Puppet(render_mode=None))


def test_repeated_actions_add_their_rewards_and_stop_at_the_end():
    env = ActionRepeat(Chain(), 3)
    env.reset()
    assert env.step(1)[1] == pytest.approx(-0.6)
    _, reward, terminated, *_ = env.step(1)
    assert reward == 1 and terminated and env.unwrapped.position == 4
    with pytest.raises(ConfigError):
        ActionRepeat(Chain(), 0)


def test_make_env_counts_the_limit_in_environment_steps():
    env = make_env(EnvConfig(id=CHAIN, max_episode_steps=7, action_repeat=2))
    env.reset()
    ends = [env.step(0)[3] for _ in range(4)]
    assert ends == [False, False, False, True]
    assert make_env("CartPole-v1").spec.max_episode_steps == 500


def test_a_longer_limit_than_the_registered_one_counts(monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("Short-v0", lambda **_: Chain(limit=99), max_episode_steps=2)
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)
    for limit, steps in ((None, 2), (5, 5)):
        env = make_env(EnvConfig(id="Short-v0", max_episode_steps=limit))
        env.reset()
        assert [env.step(0)[3] for _ in range(steps)] == [False] * (steps - 1) + [True]


def test_a_vec_env_is_monitored_and_seeded_by_index():
    first, second, shifted = make_vec(CATCH, 3, seed=4), make_vec(CATCH, 3, seed=4), make_vec(CATCH, 3, seed=5)
    a, b, c = first.reset(), second.reset(), shifted.reset()
    assert np.array_equal(a, b) and np.array_equal(a[1:], c[:-1])
    assert all(first.env_is_wrapped(Monitor))
    infos = [first.step(np.ones(3, int))[3] for _ in range(7)][-1]
    assert all(info["episode"]["l"] == 7 and "terminal_observation" in info for info in infos)
    assert np.array_equal(make_env(CATCH, index=2, seed=4).reset()[0], a[2])


def test_as_vec_env_takes_whatever_users_hold():
    env = Monitor(Catch())
    venv = as_vec_env(env)
    assert sum(isinstance(layer, Monitor) for layer in _layers(venv.envs[0])) == 1
    assert as_vec_env(venv) is venv
    assert as_vec_env(CATCH, 2).num_envs == 2 and as_vec_env(EnvConfig(id=CATCH, num_envs=3)).num_envs == 3
    several = as_vec_env(gym.make_vec("CartPole-v1", num_envs=2), seed=3)
    assert several.num_envs == 2 and np.array_equal(several.reset(), gym.make_vec("CartPole-v1", num_envs=2).reset(seed=3)[0])
    with pytest.raises(ConfigError):
        as_vec_env(7)
    for one in (env, venv, several):
        with pytest.raises(ConfigError):
            as_vec_env(one, 4)


def _layers(env):
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


@pytest.mark.parametrize(
    "env_id, near",
    [
        ("CartPole-v9", "'CartPole-v1'"),
        ("cartpole-v1", "'CartPole-v1'"),
        ("CartPole", "'CartPole-v1'"),
        ("worldmodel.envs:Cacht-v0", "'Catch-v0'"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("not an id", "module:Name-v0"),
    ],
)
def test_an_unknown_id_names_its_nearest_neighbour(env_id, near):
    with pytest.raises(ConfigError, match=near):
        make_env(env_id)


def test_wrong_kwargs_and_failing_constructors_are_told_apart():
    with pytest.raises(ConfigError, match="'lenght'"):
        make_env(EnvConfig(id=CHAIN, kwargs={"lenght": 4}))
    with pytest.raises(EnvError, match=r"environment 2: .*length >= 2"):
        make_env(EnvConfig(id=CHAIN, kwargs={"length": 1}), index=2)
    for bad in ({"num_envs": 0}, {"max_episode_steps": 0}, {"max_episode_steps": -1}, {"layout": "wch"}, {"vectorize": "threads"}):
        with pytest.raises(ConfigError):
            EnvConfig(id=CHAIN, **bad)


@pytest.mark.parametrize(
    "env_id, module, extra", [("ALE/Pong-v5", "ale_py", "atari"), ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid")]
)
def test_an_absent_package_is_named_with_our_extra(env_id, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(gym, "registry", {k: v for k, v in gym.registry.items() if k != env_id})
    with pytest.raises(MissingExtraError, match=rf"worldmodel\[{extra}\]"):
        make_env(env_id)


@pytest.mark.parametrize(
    "error, extra",
    [
        (gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`'), "box2d"),
        (ModuleNotFoundError("No module named 'mujoco'", name="mujoco"), "mujoco"),
        (gym.error.DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[classic-control]"`'), "render"),
    ],
)
def test_gymnasiums_missing_dependencies_are_translated(error, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, {"box2d": "Box2D", "render": "pygame"}.get(extra, extra), None)
    assert f"worldmodel[{extra}]" in str(extras.missing_extra(error))
    env = CheckedEnv(Puppet(deed=raiser(error), at=1))
    env.reset()
    with pytest.raises(MissingExtraError):
        env.step(0)
    assert extras.missing_extra(ValueError("pygame")) is None


def test_errors_in_worker_processes_come_home():
    """In a process of its own: workers are started from an importable script, not from a test."""
    code = """
import json, gymnasium as gym, numpy as np, os
from worldmodel.envs import EnvConfig, make_vec
from worldmodel.errors import EnvError
class Moody(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32); action_space = gym.spaces.Discrete(3)
    def reset(self, *, seed=None, options=None): return np.zeros(2, np.float32), {}
    def step(self, action):
        if action == 2: os._exit(9)
        return np.full(2, np.nan if action else 0, np.float32), 1.0, False, False, {}
if __name__ == "__main__":
    gym.register("Moody-v0", Moody)
    from worldmodel.envs import make
    from worldmodel.envs.vectors.restarts import ReportFaults
    from worldmodel.envs.vectors.workers import WorkerVecEnv
    from worldmodel.envs.wrappers import CheckedEnv
    from functools import partial
    build = lambda i: ReportFaults(CheckedEnv(Moody(), i))
    venv = WorkerVecEnv([partial(build, i) for i in range(2)], start_method="fork")
    venv.reset(); said = []
    for actions in ([0, 0], [0, 1], [2, 0]):
        try: venv.step(np.array(actions)); said.append("fine")
        except EnvError as error: said.append(str(error))
    venv.close()
    config = EnvConfig(id="worldmodel.envs:Catch-v0", vectorize="subproc")
    workers, here = make_vec(config, 1, seed=3), make_vec("worldmodel.envs:Catch-v0", 1, seed=3)
    said.append(bool((workers.reset() == here.reset()).all())); workers.close()
    print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fine, nan, gone, same = json.loads(done.stdout.splitlines()[-1])
    assert fine == "fine" and same
    assert nan.startswith("environment 1, episode 1, step 2: observation 'obs' holds NaN")
    assert gone.startswith("environment 0, episode 1, step 3: its process is gone (exit code 9)")


def test_importing_the_environments_loads_neither_torch_nor_sb3():
    code = "import sys, worldmodel.envs; assert not {'torch', 'stable_baselines3'} & set(sys.modules), 'heavy'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no_such_name"):
        worldmodel.envs.no_such_name  # noqa: B018
