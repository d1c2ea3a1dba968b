"""What SB3 scripts do out of habit, done with Dreamer."""

import io
import json
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecTransposeImage
from stable_baselines3.ppo import MlpPolicy

from worldmodel.agents import Dreamer, Planner, RandomAgent
from worldmodel.agents.arguments import SAME
from worldmodel.agents.belief import BeliefPolicy
from worldmodel.agents.evaluation import evaluate, isolated_rng
from worldmodel.agents.sb3.algorithms import seeded_globals
from worldmodel.config import describe
from worldmodel.errors import ConfigError, CorruptError, EnvError
from worldmodel.model import WorldModel
from worldmodel.storage.weights import cpu_randomness

NANO = {"size": "nano", "train.prefill": 40, "train.pretrain": 1, "train.ratio": 0.02, "train.batch_length": 8}


class Groups(gym.Env):
    """Observes two categories of 3 and 4 values."""

    observation_space, action_space = spaces.MultiDiscrete([3, 4]), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([2, 3]), {}

    def step(self, action):
        return np.array([0, 1]), 0.0, False, False, {}


class Short(gym.Env):
    """Three steps; succeeds where the first action was 1."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.actions.append(int(action))
        ended = len(self.actions) == 3
        return np.full(2, len(self.actions) / 3, np.float32), 1.0, ended, False, {"is_success": bool(self.actions[0])}


def dreamer(env="CartPole-v1", policy="MlpPolicy", **options):
    return Dreamer(policy, env, **{"device": "cpu", "seed": 0, "config": NANO, **options})


class Each(BaseCallback):
    """Keeps what `look` finds at every step."""

    def __init__(self, look):
        super().__init__()
        self.look, self.found = look, []

    def _on_step(self):
        self.found.append(self.look(self))
        return True


def test_a_model_saved_into_a_stream_is_loaded_from_it():
    model, stream = dreamer(), io.BytesIO()
    model.save(stream)
    again, obs = Dreamer.load(stream), np.array([0.1, -0.2, 0.03, 0.4], np.float32)
    assert again.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]
    for name, x in model.world.state_dict().items():
        assert torch.equal(x, again.world.state_dict()[name])


def test_a_model_saved_into_an_open_file_is_loaded_by_path_and_by_file(tmp_path):
    model = dreamer()
    with (tmp_path / "a.zip").open("wb") as file:
        model.save(file)
    with (tmp_path / "a.zip").open("rb") as file:
        by_file = Dreamer.load(file)
    assert by_file.seed == Dreamer.load(tmp_path / "a").seed == 0


def test_a_stream_that_holds_something_else_is_refused_as_damaged():
    with pytest.raises(CorruptError, match="the stream is no intact zip"):
        Dreamer.load(io.BytesIO(b"not a zip"))


def test_set_parameters_reads_a_stream():
    model, other, stream = dreamer(), Dreamer("MlpPolicy", "CartPole-v1", device="cpu", seed=1, config=NANO), io.BytesIO()
    model.save(stream)
    other.set_parameters(stream)
    assert all(torch.equal(x, y) for x, y in zip(model.world.parameters(), other.world.parameters(), strict=True))


@pytest.mark.parametrize("ill", [np.nan, np.inf])
def test_predict_refuses_an_observation_that_is_not_finite_and_leaves_the_belief_alone(ill):
    model = dreamer()
    _, belief = model.predict(np.zeros(4, np.float32))
    before = [x.copy() for x in belief]
    with pytest.raises(EnvError, match="finite"):
        model.predict(np.array([0, ill, 0, 0], np.float32), belief)
    assert all(np.array_equal(x, y) for x, y in zip(belief, before, strict=True))


def test_predict_refuses_a_category_that_the_space_does_not_have():
    with pytest.raises(EnvError, match="predict"):
        dreamer(Groups()).predict(np.array([3, 0]))


def test_predict_of_what_reset_returns_says_which_part_of_it_is_wanted():
    with pytest.raises(EnvError, match=r"reset\(\)\[0\]"):
        dreamer().predict(gym.make("CartPole-v1").reset())


SOME = [0.5, -0.25, 0.125, 0.0]


@pytest.mark.parametrize("given", [SOME, tuple(SOME), np.array(SOME), [1, 0, -1, 0]], ids=["list", "tuple", "float64", "whole"])
def test_predict_takes_numbers_in_whatever_form_they_come(given):
    model = dreamer()
    assert model.predict(given, deterministic=True)[0] == model.predict(np.array(given, np.float32), deterministic=True)[0]


def test_predict_refuses_numbers_that_the_space_cannot_represent():
    with pytest.raises(EnvError, match="int64"):
        dreamer(Groups()).predict(np.array([0.5, 1.0]))


@pytest.mark.parametrize("made", [lambda: "CartPole-v1", lambda: gym.make("CartPole-v1"), lambda: make_vec_env("CartPole-v1", 2)])
def test_an_environment_finds_its_recipe_however_it_was_made(made, capsys):
    model = dreamer(made(), verbose=1)
    assert model.config.recipe == "cartpole"
    assert "Recipe: cartpole" in capsys.readouterr().out


def test_a_recipe_inside_config_is_refused_with_the_argument_that_takes_it():
    with pytest.raises(ConfigError, match="recipe='cartpole'"):
        Dreamer("MlpPolicy", "CartPole-v1", config={"recipe": "cartpole"})


@pytest.mark.parametrize("inside", ["cpu_randomness", "globals_from", "own_randomness", "from_spaces", "Dreamer"])
def test_seeding_leaves_the_process_s_cuda_generators_alone(inside, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    if inside == "cpu_randomness":
        with cpu_randomness(3):
            first = torch.rand(2)
        assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    elif inside == "globals_from":
        with seeded_globals(torch.Generator().manual_seed(0)):
            torch.rand(2)
    elif inside == "own_randomness":
        with isolated_rng(None, 3):
            torch.rand(2)
    elif inside == "from_spaces":
        WorldModel.from_spaces(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), seed=3)
    else:
        dreamer()._setup_model()
    if inside != "Dreamer":
        assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


@pytest.mark.parametrize("algorithm", [Dreamer, Planner, RandomAgent])
def test_a_policy_class_of_sb3_is_refused_by_name_before_anything_is_learned(algorithm):
    with pytest.raises(ConfigError, match=rf"{algorithm.__name__} has no use for the policy ActorCriticPolicy.*'MlpPolicy'"):
        algorithm(MlpPolicy, "CartPole-v1", device="cpu", config={"size": "nano"})


def test_the_belief_policy_as_a_class_is_the_name_that_fits_the_observations(tmp_path):
    model = dreamer(policy=BeliefPolicy)
    model.save(tmp_path / "a")
    assert Dreamer.load(tmp_path / "a").policy_name == model.policy_name == "MlpPolicy"
    assert dreamer("worldmodel.envs:Catch-v0", BeliefPolicy).policy_name == "CnnPolicy"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate is config=\{'train.lr': ...\} or config=\{'agent.lr': ...\}"),
        ({"policy_kwargs": {"net_arch": [64]}}, r"policy_kwargs is config=\{'size': ...\}"),
        ({"buffer_size": 1000}, r"buffer_size is config=\{'train.capacity': ...\}"),
        ({"horizon": 5}, r"horizon is config=\{'agent.horizon': ...\}"),
        ({"tensorboard_logs": "logs"}, r"tensorboard_logs means nothing here \(Did you mean 'tensorboard_log'"),
        ({"action_noise": None}, r"action_noise means nothing here"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_dotted_key_that_means_it(given, named):
    with pytest.raises(ConfigError, match=rf"Dreamer has no argument {next(iter(given))}\..*{named}"):
        dreamer(**given)


def test_every_key_that_stands_for_an_argument_of_sb3_is_one_of_the_config():
    config = dreamer().config
    for keys in SAME.values():
        for key in keys:
            assert key == "size" or key in {row.key for row in describe(config)}


def test_callbacks_find_the_names_of_sb3_in_locals():
    seen = Each(lambda callback: {k: callback.locals[k] for k in ("actions", "rewards", "dones", "infos", "new_obs", "env")})
    model = dreamer(Short()).learn(4, seen)
    taken = model.action_spec.decode(model.replay.stream(0).prev_action[0, 1:4].numpy())
    assert [int(step["actions"][0]) for step in seen.found[:3]] == taken.tolist()
    assert [bool(step["dones"][0]) for step in seen.found] == [False, False, True, False]
    assert all(step["rewards"].tolist() == [1.0] and step["new_obs"].shape == (1, 2) for step in seen.found)
    assert "terminal_observation" in seen.found[2]["infos"][0] and seen.found[0]["env"] is model.get_env()


def test_success_is_logged_over_as_many_episodes_as_the_window_holds():
    model = dreamer(Short(), stats_window_size=2)
    ended = Each(lambda callback: [i["is_success"] for i, done in zip(callback.locals["infos"], callback.locals["dones"]) if done])
    model.learn(21, ended, log_interval=None)
    successes = [success for step in ended.found for success in step]
    model.logger.dump = lambda step: None  # it would forget them
    model.dump_logs()
    assert len(successes) == 7 and 0 < sum(successes) < 7 and len(model.ep_info_buffer) == 2
    assert model.logger.name_to_value["rollout/success_rate"] == np.mean(successes[-2:])


def test_the_discount_goes_by_sb3_s_name():
    assert dreamer(config={**NANO, "agent.gamma": 0.9}).gamma == 0.9
    assert Planner("MlpPolicy", "CartPole-v1", device="cpu", config={"size": "nano"}).gamma == 0.99


def test_set_random_seed_seeds_what_the_model_draws():
    model, obs, found = dreamer(), np.zeros(4, np.float32), []
    for seed in (5, 5, 6):
        model.set_random_seed(seed)
        found.append([int(model.predict(obs)[0]) for _ in range(40)] + model.rng.integers(100, size=4).tolist())
    assert found[0] == found[1] != found[2]


def test_a_model_without_a_seed_follows_the_global_one():
    weights = []
    for seed in (3, 3, 4):
        set_random_seed(seed)
        weights.append(torch.cat([x.flatten() for x in dreamer(seed=None).world.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_policy_without_its_agent_is_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.save"):
        dreamer().policy.save(tmp_path / "policy.pt")
    with pytest.raises(ConfigError, match=r"Dreamer\.load\(path\)\.policy"):
        BeliefPolicy.load(tmp_path / "policy.pt")
    assert not list(tmp_path.iterdir())


def test_load_keeps_what_the_script_said_of_logs(tmp_path, capsys):
    dreamer(tensorboard_log=str(tmp_path / "tb"), verbose=1, stats_window_size=7).save(tmp_path / "a")
    capsys.readouterr()
    again = Dreamer.load(tmp_path / "a", env="CartPole-v1")
    assert (again.tensorboard_log, again.verbose, again._stats_window_size) == (str(tmp_path / "tb"), 1, 7)
    assert not capsys.readouterr().out
    other = Dreamer.load(tmp_path / "a", tensorboard_log=None, verbose=0, stats_window_size=9)
    assert (other.tensorboard_log, other.verbose, other._stats_window_size) == (None, 0, 9)


def test_load_changes_options_of_the_saved_config_and_refuses_sb3_s_names_for_them(tmp_path):
    dreamer().save(tmp_path / "a")
    again = Dreamer.load(tmp_path / "a", config={"train.ratio": 3.0, "agent.lr": 1e-5})
    assert (again.config.train.ratio, again.config.train.prefill) == (3.0, NANO["train.prefill"])
    assert again.behaviour.actor_optimizer.param_groups[0]["lr"] == 1e-5
    with pytest.raises(ConfigError, match=r"buffer_size is config=\{'train.capacity': ...\}"):
        Dreamer.load(tmp_path / "a", buffer_size=1)
    with pytest.raises(ConfigError, match="recipe='cartpole' stands beside a whole Config"):
        Dreamer.load(tmp_path / "a", recipe="cartpole")


def test_what_load_and_save_cannot_heed_is_refused_by_name(tmp_path):
    model = dreamer()
    for given in ({"exclude": ["verbose"]}, {"include": ("replay_buffer",)}):
        with pytest.raises(ConfigError, match=rf"save\({next(iter(given))}="):
            model.save(tmp_path / "a", **given)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "a", exclude=[], include=())
    with pytest.raises(ConfigError, match=r"custom_objects \(policy_kwargs\)"):
        Dreamer.load(tmp_path / "a", custom_objects={"policy_kwargs": {}})
    with pytest.raises(ConfigError, match="force_reset=False"):
        Dreamer.load(tmp_path / "a", force_reset=False)
    with pytest.raises(ConfigError, match="exact_match=False"):
        model.set_parameters(tmp_path / "a", exact_match=False)


def test_placeholders_that_scripts_give_for_every_file_are_told_of(tmp_path):
    dreamer().save(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"custom_objects \(clip_range, learning_rate\).*not used"):
        Dreamer.load(tmp_path / "a", custom_objects={"learning_rate": 0.0, "clip_range": lambda _: 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dreamer.load(tmp_path / "a", custom_objects={})


def test_load_prints_the_versions_when_asked_to(tmp_path, capsys):
    dreamer().save(tmp_path / "a")
    Dreamer.load(tmp_path / "a", print_system_info=True)
    now, saved = capsys.readouterr().out.split("== SAVED MODEL SYSTEM INFO ==")
    assert "PyTorch" in now and f"- torch: {torch.__version__}" in saved


def test_a_saved_zip_says_what_it_is_where_package_to_hub_looks(tmp_path):
    model = dreamer()
    model.save(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        data = json.loads(archive.read("data"))
    assert data["config"]["train"]["prefill"] == NANO["train.prefill"] and data["policy_class"] == "MlpPolicy"
    assert data["observation_space"] == str(model.observation_space) and data["class"] == "worldmodel.agents.Dreamer"


CATCH = "worldmodel.envs:Catch-v0"


def catches(turned, envs=1):
    venv = make_vec_env(CATCH, envs)
    return VecTransposeImage(venv) if turned else venv


class Pictures(gym.Env):
    """A picture of every step, and its number."""

    observation_space = spaces.Dict(picture=spaces.Box(0, 255, (16, 20, 3), np.uint8), step=spaces.Box(0, 9, (1,)))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.seen(), {}

    def step(self, action):
        self.count += 1
        return self.seen(), 0.0, self.count == 5, False, {}

    def seen(self):
        picture = np.arange(16 * 20 * 3).reshape(16, 20, 3) % 7 * 20 + self.count
        return {"picture": picture.astype(np.uint8), "step": np.full(1, self.count, np.float32)}


@pytest.fixture(scope="module", params=[False, True], ids=["hwc", "chw"])
def catcher(request):
    return request.param, dreamer(catches(request.param), "CnnPolicy")


def test_a_picture_is_the_same_with_its_channels_at_either_end(catcher):
    _, model = catcher
    picture = gym.make(CATCH).reset(seed=0)[0]
    beliefs = [model.predict(x, deterministic=True)[1] for x in (picture, np.moveaxis(picture, -1, 0))]
    batched = [model.predict(x, deterministic=True)[1] for x in (picture[None], np.moveaxis(picture, -1, 0)[None])]
    for parts in zip(*beliefs, *batched, strict=True):
        assert all(np.array_equal(parts[0], part) for part in parts)


def test_a_model_of_pictures_is_evaluated_in_environments_of_either_form(catcher):
    turned, model = catcher
    returns = []
    for other in (turned, not turned):
        venv = catches(other)
        venv.seed(4)
        with isolated_rng(model, 0):
            returns.append(evaluate_policy(model, venv, 3, return_episode_rewards=True))
    assert returns[0] == returns[1]
    assert len(evaluate(model, CATCH, 2)[0]) == 2


@pytest.mark.filterwarnings("ignore:Training and eval env")
def test_a_model_of_pictures_goes_on_in_environments_of_the_other_form(tmp_path):
    model = dreamer(catches(False), "CnnPolicy")
    callback = EvalCallback(catches(True), n_eval_episodes=1, eval_freq=10, warn=False, verbose=0)
    model.learn(10, callback)
    model.save(tmp_path / "a")
    again = Dreamer.load(tmp_path / "a", env=catches(True, 2))
    model.set_env(catches(True))
    for agent in (model, again):
        agent.learn(20, reset_num_timesteps=False)
        assert agent.observation_space.shape == (64, 64, 3)
    rows = model.replay.stream(0)
    assert rows.obs["obs"].shape[2:] == (64, 64, 3) and len(rows.reward[0]) > 30


def test_pictures_in_a_dict_are_turned_with_their_last_observations():
    hwc, chw = (dreamer(env, "MultiInputPolicy").learn(12) for env in (Pictures(), VecTransposeImage(DummyVecEnv([Pictures]))))
    assert chw.observation_space["picture"].shape == (3, 16, 20)
    chw.set_env(DummyVecEnv([Pictures]))
    chw.learn(12)
    first, then = hwc.replay.stream(0).obs["picture"][0], chw.replay.stream(0).obs["picture"][0]
    assert torch.equal(first, then[: len(first)].movedim(1, -1)) and torch.equal(then[: len(first)], then[len(first) :])


def test_set_env_refuses_pictures_of_another_size():
    model = dreamer(DummyVecEnv([Pictures]), "MultiInputPolicy")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(catches(True))
    assert model.observation_space["picture"].shape == (16, 20, 3)
