"""Makes what release 0.1.0 left in files of Stable-Baselines3, which tests/test_extractor.py and tests/test_sb3.py open.

python make.py FOLDER        with release 0.1.0 on Python 3.11 or newer

extractor.zip   PPO.save() of a policy around a trained encoder, with output="code"
dream/          DreamPolicy.save() of a PPO that learned in the dream
expected.json   what 0.1.0 itself gave: the values of the observations in `observations`, and the real return of the policy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO

from worldmodel.agents import latent_policy_kwargs, train_in_dream
from worldmodel.model import WorldModel

TINY = {"kind": "standard", "units": 6, "layers": 1, "depth": 2}
MODEL = {
    "inputs": "symlog",
    "encoder": TINY,
    "decoder": TINY,
    "dynamics": {"kind": "rssm", "deter": 6, "units": 6, "posterior": "observation", "latent": {"kind": "gaussian", "size": 3}},
    "transition": {"kind": "gaussian"},
    "initial": {"kind": "gaussian"},
    "heads": {"kind": "standard", "units": 6, "layers": 1, "bins": 21},
}
ALGORITHM = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
OPTIONS = {
    **{f"model.{part}.{name}": size for part in ("encoder", "decoder") for name, size in (("units", 6), ("depth", 2))},
    **{"model.dynamics.deter": 6, "model.dynamics.units": 6, "model.heads.units": 6, "model.heads.bins": 21},
    **{"model.inputs": "symlog", "train.prefill": 24, "train.pretrain": 2, "train.batch_size": 2, "train.batch_length": 6},
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    env = gym.make("CartPole-v1")
    world = WorldModel.from_spaces(env.observation_space, env.action_space, MODEL, seed=1).eval()
    policy_kwargs = {**latent_policy_kwargs(world, output="code"), "net_arch": [4]}
    model = PPO("MlpPolicy", env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **ALGORITHM)
    model.learn(16)
    model.save(folder / "extractor.zip")
    observations = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    values = model.policy.predict_values(torch.from_numpy(observations)).flatten()
    policy = train_in_dream(
        PPO,
        "cartpole",
        total_timesteps=16,
        steps=40,
        worlds=2,
        horizon=3,
        algo_kwargs={**ALGORITHM, "policy_kwargs": {"net_arch": [4]}},
        overrides=OPTIONS,
        episodes=2,
    )
    policy.save(folder / "dream")
    expected = {"observations": observations.tolist(), "values": values.tolist(), "real_return": policy.result.real_return}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
