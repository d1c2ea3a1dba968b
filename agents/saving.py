"""Agents as files: content <-> agent, zips that `save` writes and `load` opens, SB3's parameters."""

from __future__ import annotations

import copy
import io
import json
import pathlib
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import get_system_info
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.agents.experience import fit_scaling, pack_replay, unpack_replay
from worldmodel.config import Config
from worldmodel.envs.make import as_vec_env
from worldmodel.envs.vectors.plain import as_trained
from worldmodel.errors import ConfigError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import best, checkpoint
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import versions
from worldmodel.storage.weights import as_arrays, load_arrays, optimizer_arrays, restore_optimizer

PLACEHOLDERS = {"clip_range", "exploration_schedule", "learning_rate", "lr_schedule"}
"""What SB3's scripts give `load` as custom_objects whatever the file holds, so that no function in it has to be unpickled."""


class SavedAlgorithm(BaseAlgorithm):
    """The part of an agent that is saved and loaded; how it learns is in loop.py."""

    kind: ClassVar[str]

    # SB3's parameters -----------------------------------------------------------------------------------------------

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        raw_weights = [] if self.learner.ema is self.world else ["world"]  # else the policy holds it
        return ["policy", *raw_weights, *(f"optimizers.{name}" for name in self.optimizers_by_name)], []

    @property
    def optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return {"world": self.learner.optimizer}

    @property
    def optimizers(self) -> Any:
        """The optimisers as attributes: what SB3's get_parameters and set_parameters look up."""
        return SimpleNamespace(**self.optimizers_by_name)

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto") -> None:
        """Parameters from `get_parameters()`, or from a file that `save` wrote."""
        if isinstance(load_path_or_dict, Mapping):
            super().set_parameters(dict(load_path_or_dict), exact_match, device)
        elif not exact_match:
            raise ConfigError("set_parameters(exact_match=False) is for a dict: a file holds all parameters. Leave it out.")
        else:
            self.restore(*checkpoint.unpack(_path(load_path_or_dict))[:2], counters=False)

    # Saving ---------------------------------------------------------------------------------------------------------

    def content(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """The whole agent without its replay: ({file: {name: array}}, JSON state)."""
        arrays = {
            "world": as_arrays(self.learner.ema),
            "agent": as_arrays(self.controller),
            "optim": {},
        }
        for name, optimizer in self.optimizers_by_name.items():
            arrays["optim"] |= {f"{name}/{key}": x for key, x in optimizer_arrays(optimizer).items()}
        if self.learner.ema is not self.world:
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
            "script": {
                "verbose": self.verbose,
                "tensorboard_log": None if self.tensorboard_log is None else str(self.tensorboard_log),
                "stats_window_size": self._stats_window_size,
            },
            "counters": {
                "num_timesteps": self.num_timesteps,
                "episodes": self._episode_num,
                "n_updates": self._n_updates,
                "updates": self.learner.updates,
                "skipped": self.learner.skipped,
                "restarts": self.restarts,
                "credit": self._updates_due,
                "kept_rows": self.kept_rows,
            },
            "rng": self.rng.bit_generator.state,
            "behaviour": self._behaviour_state(),
            "exploration": self.exploration.state(),
        }
        return arrays, state

    @property
    def _generators(self) -> dict[str, torch.Generator]:
        return {"learn": self.generator, "act": self.policy.generator}

    def _behaviour_state(self) -> dict[str, Any]:
        """What the controller's learner keeps besides tensors, as JSON."""
        return {}

    def _restore_behaviour(self, state: Mapping[str, Any]) -> None:
        pass

    def restore(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any], *, counters: bool = True) -> None:
        """Restores what `content` gave; with `counters`, also steps, random states and the fraction of an update that is due."""
        load_arrays(self.learner.ema, arrays["world"])
        if self.learner.ema is not self.world:
            load_arrays(self.world, _without_prefix("live/", arrays["optim"]))
        load_arrays(self.controller, arrays["agent"])
        for name, optimizer in self.optimizers_by_name.items():
            restore_optimizer(optimizer, _without_prefix(f"{name}/", arrays["optim"]))
        self._restore_behaviour(state["behaviour"])
        if not counters:
            return
        for name, generator in self._generators.items():
            saved = torch.from_numpy(arrays["optim"][f"generator/{name}"].copy())
            if saved.shape == generator.get_state().shape:
                generator.set_state(saved)
            else:  # saved on another kind of device, whose random state means nothing here
                generator.manual_seed(self.seed + state["counters"]["num_timesteps"])
        self.rng.bit_generator.state = copy.deepcopy(dict(state["rng"]))
        count = state["counters"]
        self.num_timesteps, self._episode_num, self._n_updates = count["num_timesteps"], count["episodes"], count["n_updates"]
        self.learner.updates, self.learner.skips.count = count["updates"], count["skipped"]
        self._restarts, self._updates_due = count.get("restarts", 0), float(count["credit"])
        self.kept_rows = count.get("kept_rows", 0)
        if "exploration" in state:
            self.exploration.restore(state["exploration"])

    def save(self, path: str | pathlib.Path | io.BufferedIOBase, exclude: Any = None, include: Any = None) -> None:
        """One zip of safetensors, JSON and manifest, with no code in it and without the replay; `path` may be an open stream.

        What the file holds is fixed: ConfigError for `exclude` and `include` that name something.
        """
        for word, names in (("exclude", exclude), ("include", include)):
            if names := list(names or ()):
                raise ConfigError(f"save({word}={names}): a file holds weights, optimisers, counters and config. Leave {word} out.")
        content = self.num_timesteps, *self.content(), {"agent": self.kind, "versions": versions()}, self._description()
        checkpoint.pack(path if hasattr(path, "write") else _path(path), *content)

    def _description(self) -> dict[str, Any]:
        """A description under SB3's names, for tools that read it from the zip."""
        return {
            "class": f"worldmodel.agents.{type(self).__name__}",
            "policy_class": self.policy_name,
            "observation_space": str(self.observation_space),
            "action_space": str(self.action_space),
            "n_envs": self.n_envs,
            "num_timesteps": self.num_timesteps,
            "_n_updates": self._n_updates,
            "seed": self.seed,
            "config": json.loads(self.config.model_dump_json()),
        }

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
        """The agent of a zip that `save` wrote, by path or as a stream, or of a run folder (the checkpoint that `Run.agent` takes).

        kwargs are those of the class; a mapping `config` changes options of the saved one. ConfigError for custom_objects, which
        stand in for pickled objects, and for force_reset=False: the file holds neither.
        """
        _reject_custom_objects(custom_objects)
        if not force_reset:
            raise ConfigError("load(force_reset=False): a file holds no observation to go on from. Leave force_reset out.")
        if not hasattr(path, "read") and pathlib.Path(path).is_dir():
            arrays, state, manifest = _of_run(pathlib.Path(path))
        else:
            arrays, state, manifest = checkpoint.unpack(_path(path))
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
            print("== SAVED MODEL SYSTEM INFO ==")
            print("\n".join(f"- {name}: {version}" for name, version in manifest.get("versions", {}).items()))
        return cls.from_content(arrays, state, env=env, device=device, **kwargs)

    # The replay -----------------------------------------------------------------------------------------------------

    @property
    def replay_buffer(self) -> Replay | None:
        """The replay, by SB3's name, which CheckpointCallback asks for before it saves it."""
        return self.replay

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """Writes the replay as one zip without pickle; `path` may be an open stream, and without suffix gets SB3's, `.pkl`."""
        if self.replay is None:
            raise ConfigError("There is no experience to save yet. Call learn() first.")
        pack_replay(_path(path, ".pkl"), self.num_timesteps, self.replay, self.obs_spec, self.action_spec)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """Replaces the replay by what `save_replay_buffer` wrote; learning goes on from it with new episodes.

        Running statistics are computed from it where the model has none, and left alone where it has.
        ConfigError for truncate_last_traj=False: the environments cannot go on in the middle of an episode.
        """
        if not truncate_last_traj:
            raise ConfigError(
                "load_replay_buffer(truncate_last_traj=False): environments begin anew. Leave truncate_last_traj out."
            )
        if self.replay_folder is not None:
            raise ConfigError("The agent of a run has the run's experience. Load the agent by itself: Dreamer.load(RUN).")
        replay = self._new_replay()
        unpack_replay(_path(path, ".pkl"), replay, self.obs_spec, self.action_spec)
        replay.truncate_open_episodes()
        self.replay, self._last_obs, self._belief = replay, None, None
        if self.world.scaling.count == 0 and self.world.heads.scale.squares.count == 0:  # else they hold these rows already
            fit_scaling(self.world, replay)

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
    def from_content(
        cls,
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        state: Mapping[str, Any],
        *,
        env: Any = None,
        device: torch.device | str = "auto",
        **kwargs: Any,
    ) -> SavedAlgorithm:
        """The agent that `content` described; `env` may be given later with set_env."""
        if state.get("agent") != cls.kind:
            raise ConfigError(f"The file holds an agent of kind {state.get('agent')!r}, not '{cls.kind}'. Load it with that class.")
        specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
        config, script = Config.from_saved(state["config"]), dict(state.get("script", {}))
        verbose = script.pop("verbose", 0)  # set below: the new agent prints nothing
        options = {"seed": state["seed"], "device": device, **script, **kwargs}
        if not isinstance(changes := options.get("config"), Config):
            options["config"] = config.override(changes)
        agent = cls.from_specs(state["policy"], *specs, num_envs=state["num_envs"], **options)
        agent.verbose = kwargs.get("verbose", verbose)
        agent.restore(arrays, state)
        if env is not None:
            env = as_trained(agent, as_vec_env(env, seed=state["seed"]))
            agent.n_envs = env.num_envs  # set_env asks for as many as before, but nothing was collected yet
            agent._check_window()
            agent.set_env(env)
        return agent


def _reject_custom_objects(custom_objects: Mapping[str, Any] | None) -> None:
    """ConfigError for custom_objects, and a warning where they are those that scripts give for every file."""
    if not custom_objects:
        return
    names = ", ".join(sorted(custom_objects))
    what = f"custom_objects ({names}) stand in for what a file holds pickled, and there is nothing pickled in files of this library"
    if set(custom_objects) <= PLACEHOLDERS:
        warnings.warn(f"{what}: they were not used.", stacklevel=3)
    else:
        raise ConfigError(f"{what}. Leave them out; load(config={{...}}) changes options, and other arguments go by their names.")


def _path(path: Any, suffix: str = ".zip") -> pathlib.Path | io.BufferedIOBase:
    """SB3's rule: a name without suffix gets one; a stream stays what it is."""
    if hasattr(path, "read") or hasattr(path, "write"):
        return path
    path = pathlib.Path(path)
    return path if path.suffix else path.with_suffix(suffix)


def _of_run(folder: pathlib.Path) -> checkpoint.Content:
    """The best checkpoint of a run folder, or else the newest that verifies. ConfigError where there is none."""
    if (content := best.content(folder)) is not None:
        return content
    found = checkpoint.newest(folder / best.CHECKPOINTS)
    if found is None:
        raise ConfigError(f"'{folder}' holds no checkpoint that verifies. Expected a run folder or a zip written by save().")
    return checkpoint.read(found[1])


def _without_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
