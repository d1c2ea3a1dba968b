"""What an agent is on the disk: content <-> agent, files that `save` writes and `load` opens, SB3's parameters."""

from __future__ import annotations

import copy
import io
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from worldmodel import checkpoint
from worldmodel.config import Config, load_yaml
from worldmodel.envs.make import as_vec_env
from worldmodel.envs.plain import as_trained
from worldmodel.errors import ConfigError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.weights import as_arrays, fill, optimizer_arrays, restore_optimizer


class SavedAlgorithm(BaseAlgorithm):
    """The part of an agent that files are made of; what it learns from stands in loop.py."""

    kind: ClassVar[str]

    # SB3's parameters -----------------------------------------------------------------------------------------------

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        live = [] if self.learner.average is self.world else ["world"]  # else the policy holds it
        return ["policy", *live, *(f"optimizers.{name}" for name in self.optimizers_by_name)], []

    @property
    def optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return {"world": self.learner.optimizer}

    @property
    def optimizers(self) -> Any:
        """The optimisers as attributes: what SB3's get_parameters and set_parameters look up."""
        return _Attributes(self.optimizers_by_name)

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto") -> None:
        """Parameters from `get_parameters()`, or from a file that `save` wrote."""
        if isinstance(load_path_or_dict, Mapping):
            super().set_parameters(dict(load_path_or_dict), exact_match, device)
        else:
            arrays, state, _ = checkpoint.unpack(_zip_path(load_path_or_dict))
            self.restore(arrays, state, counters=False)

    # Saving ---------------------------------------------------------------------------------------------------------

    def content(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """All that the agent is, without its replay: ({file: {name: array}}, JSON state)."""
        arrays = {
            "world": as_arrays(self.learner.average),
            "agent": as_arrays(self.controller),
            "optim": {
                f"{name}/{key}": x
                for name, optimizer in self.optimizers_by_name.items()
                for key, x in optimizer_arrays(optimizer).items()
            },
        }
        if self.learner.average is not self.world:
            arrays["optim"] |= {f"live/{name}": x for name, x in as_arrays(self.world).items()}
        for name, generator in self._generators.items():
            arrays["optim"][f"generator/{name}"] = generator.get_state().cpu().numpy()
        state = {
            "agent": self.kind,
            "policy": self.policy_name,
            "config": self.config.to_yaml(),
            "observation": self.obs_spec.to_json(),
            "action": self.action_spec.to_json(),
            "seed": self.seed,
            "num_envs": self.n_envs,
            "counters": {
                "num_timesteps": self.num_timesteps,
                "episodes": self._episode_num,
                "n_updates": self._n_updates,
                "updates": self.learner.updates,
                "skipped": self.learner.skipped,
                "restarts": self.restarts,
                "credit": self._credit,
            },
            "rng": self.rng.bit_generator.state,
            "behaviour": self._behaviour_state(),
        }
        return arrays, state

    @property
    def _generators(self) -> dict[str, torch.Generator]:
        return {"learn": self.generator, "act": self.policy.generator}

    def _behaviour_state(self) -> dict[str, Any]:
        """Numbers of the controller's learner that are no tensors."""
        return {}

    def _restore_behaviour(self, state: Mapping[str, Any]) -> None:
        pass

    def restore(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any], *, counters: bool = True) -> None:
        """Take over what `content` gave; with `counters`, also steps, random state and the ratio's remainder."""
        fill(self.learner.average, arrays["world"])
        if self.learner.average is not self.world:
            fill(self.world, _behind("live/", arrays["optim"]))
        fill(self.controller, arrays["agent"])
        for name, optimizer in self.optimizers_by_name.items():
            restore_optimizer(optimizer, _behind(f"{name}/", arrays["optim"]))
        self._restore_behaviour(state["behaviour"])
        if not counters:
            return
        for name, generator in self._generators.items():
            saved = torch.from_numpy(arrays["optim"][f"generator/{name}"].copy())
            if saved.shape == generator.get_state().shape:
                generator.set_state(saved)
            else:  # it was saved on another kind of device, whose draws cannot go on here
                generator.manual_seed(self.seed + state["counters"]["num_timesteps"])
        self.rng.bit_generator.state = copy.deepcopy(dict(state["rng"]))
        count = state["counters"]
        self.num_timesteps, self._episode_num, self._n_updates = count["num_timesteps"], count["episodes"], count["n_updates"]
        self._restarts = count.get("restarts", 0)
        self.learner.updates, self.learner.skips.count, self._credit = count["updates"], count["skipped"], float(count["credit"])

    def save(self, path: str | pathlib.Path | io.BufferedIOBase, exclude: Any = None, include: Any = None) -> None:
        """One zip of stored safetensors, JSON and manifest, with nothing in it that could run code; `path` may be an open stream.

        The replay stays out.
        """
        arrays, state = self.content()
        if hasattr(path, "write"):
            checkpoint.pack_into(path, self.num_timesteps, arrays, state, {"agent": self.kind})
        else:
            checkpoint.pack(_zip_path(path), self.num_timesteps, arrays, state, {"agent": self.kind})

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: str | gym.Env | VecEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: Any = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SavedAlgorithm:
        """The agent of a zip that `save` wrote, by path or as a stream, or of a run folder (its newest good checkpoint)."""
        if not hasattr(path, "read") and pathlib.Path(path).is_dir():
            path = pathlib.Path(path)
            found = checkpoint.newest(path / "checkpoints")
            if found is None:
                raise ConfigError(f"'{path}' holds no checkpoint that verifies. Expected a run folder or a zip written by save().")
            arrays, state, _ = checkpoint.read(found[1])
        else:
            arrays, state, _ = checkpoint.unpack(_zip_path(path))
        return cls.from_content(arrays, state, env=env, device=device, **kwargs)

    @classmethod
    def from_specs(
        cls, policy: str, obs_spec: ObsSpec, action_spec: ActionSpec, *, num_envs: int = 1, **options: Any
    ) -> SavedAlgorithm:
        """A new agent for these spaces, without an environment; `options` are those of the class."""
        agent = cls(policy, None, **options)
        agent.obs_spec, agent.action_spec = obs_spec, action_spec
        agent.observation_space, agent.action_space = obs_spec.space, action_spec.space
        agent.n_envs = num_envs
        agent._check_window()
        agent._setup_model()
        return agent

    @classmethod
    def from_content(cls, arrays, state: Mapping[str, Any], *, env=None, device="auto", **kwargs: Any) -> SavedAlgorithm:
        """The agent that `content` described; `env` may be given later with set_env."""
        if state.get("agent") != cls.kind:
            raise ConfigError(f"The file holds an agent of kind {state.get('agent')!r}, not '{cls.kind}'. Load it with that class.")
        specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
        options = {"config": Config.parse(load_yaml(state["config"])), "seed": state["seed"], "device": device, **kwargs}
        agent = cls.from_specs(state["policy"], *specs, num_envs=state["num_envs"], **options)
        agent.restore(arrays, state)
        if env is not None:
            env = as_trained(agent, as_vec_env(env, seed=state["seed"]))
            agent.n_envs = env.num_envs  # set_env wants as many as before, but here nothing was collected yet
            agent.set_env(env)
        return agent


class _Attributes:
    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)


def _zip_path(path: Any) -> pathlib.Path | io.BufferedIOBase:
    """SB3's rule: a name without suffix gets `.zip`; a stream stays what it is."""
    if hasattr(path, "read"):
        return path
    path = pathlib.Path(path)
    return path if path.suffix else path.with_suffix(".zip")


def _behind(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
