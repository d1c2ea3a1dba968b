"""Encoders in SB3's policies: what is saved, and by whom it is opened."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import subprocess
import sys
import weakref

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, VECTOR
from gymnasium import spaces
from small_runs import small_train
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv
from test_extractor import OF_0_1, PUSH, make, samples, toys, world_of

from worldmodel.agents import LatentExtractor, latent_policy_kwargs
from worldmodel.envs.make import make_vec
from worldmodel.errors import ConfigError

# Files ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extractor") / "run"
    options = {"agent": "random", "model.dynamics.posterior": "observation", "eval.every": 0, "eval.episodes": 1}
    small_train(folder, 40, options=options)
    return folder


def test_the_options_are_plain_data(chain_run):
    kwargs = latent_policy_kwargs(chain_run)["features_extractor_kwargs"]
    assert json.loads(json.dumps(kwargs, allow_nan=False)) == kwargs
    assert str(chain_run) == kwargs["weights"]["run"]


def test_a_saved_algorithm_predicts_elsewhere_without_the_run(chain_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain_run, run)
    model = make(PPO, make_vec(CHAIN, 2, 0), latent_policy_kwargs(run, "finetune")).learn(16)
    model.save(tmp_path / "model")
    shutil.rmtree(run)
    obs = np.eye(5, dtype=np.float32)
    script = (
        "import sys, numpy as np, torch\n"
        "from stable_baselines3 import PPO\n"
        "model = PPO.load(sys.argv[1], device='cpu')\n"
        "obs = torch.eye(5)\n"
        "print(model.policy.predict_values(obs).flatten().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = model.policy.predict_values(torch.as_tensor(obs)).flatten()
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC, TD3])
def test_load_gives_equal_predictions_and_goes_on_learning(algorithm, tmp_path):
    action = PUSH if algorithm in (SAC, TD3) else spaces.Discrete(2)
    model = make(algorithm, toys(action=action), latent_policy_kwargs(world_of(action=action))).learn(16)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", toys(action=action), device="cpu")
    obs = samples(world_of(), 5, seed=3)["obs"]
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(8)


def plain(options):
    """The options as a file holds them."""
    return json.loads(json.dumps(options))


def test_weights_are_kept_as_long_as_the_options_or_a_policy_made_with_them_and_then_freed():
    world = world_of(seed=11)
    kwargs = latent_policy_kwargs(world)
    again = copy.deepcopy(kwargs)
    held = weakref.ref(next(iter(kwargs["features_extractor_kwargs"]["weights"].tensors.values())))
    copied = copy.copy(again["features_extractor_kwargs"]["weights"])
    assert copied.tensors is kwargs["features_extractor_kwargs"]["weights"].tensors  # equal weights are kept once
    model = make(A2C, toys(), kwargs)
    pickled = cloudpickle.dumps(kwargs["features_extractor_kwargs"])
    assert type(cloudpickle.loads(pickled)["weights"]) is dict and len(pickled) < 3000
    del kwargs, copied
    LatentExtractor(VECTOR, **again["features_extractor_kwargs"])(torch.zeros(1, 4))
    del again
    gc.collect()
    assert held() is not None and model.policy_kwargs
    del model
    gc.collect()
    assert held() is None


def test_an_encoder_without_weights_refuses_to_be_used():
    kwargs = latent_policy_kwargs(world_of())
    model = make(DQN, toys(), {**kwargs, "features_extractor_kwargs": plain(kwargs["features_extractor_kwargs"])})
    with pytest.raises(ConfigError, match="no weights"):
        model.predict(np.zeros((1, 4), np.float32), deterministic=True)


def test_another_process_finds_the_weights_in_the_run_and_no_others(chain_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain_run, run)
    given = latent_policy_kwargs(run)["features_extractor_kwargs"]
    kwargs, space = plain(given), spaces.Box(0, 1, (5,), np.float32)
    expected = LatentExtractor(space, **given)(torch.eye(5))
    torch.testing.assert_close(LatentExtractor(space, **kwargs)(torch.eye(5)), expected)
    kwargs["weights"]["digest"] = "0" * 16  # the run was trained on, say
    with pytest.raises(ConfigError, match="latent_policy_kwargs"):
        LatentExtractor(space, **kwargs)(torch.eye(5))


def test_an_algorithm_that_release_0_1_saved_around_an_encoder_opens_with_its_values():
    """Its options have output="code" and model["inputs"], its arrays and the extractor's class other names."""
    expected = json.loads((OF_0_1 / "expected.json").read_text())
    model = PPO.load(OF_0_1 / "extractor.zip", DummyVecEnv([lambda: gym.make("CartPole-v1")]), device="cpu")
    assert model.policy.features_extractor.output == "latent"
    values = model.policy.predict_values(torch.tensor(expected["observations"])).flatten()
    torch.testing.assert_close(values, torch.tensor(expected["values"]), rtol=1e-4, atol=1e-5)
    model.learn(8)


def test_the_former_name_of_an_output_is_refused_with_the_new_one():
    with pytest.raises(ConfigError, match="called 'latent' now"):
        latent_policy_kwargs(world_of(), output="code")
