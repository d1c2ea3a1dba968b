"""Collect -> learn -> improve: the one loop that every agent with a world model shares, as an SB3 algorithm.

An agent differs in two things only: its `controller`, which turns a belief into an action, and what it improves on a
world-model batch. Evaluation, checkpoints and stopping are SB3 callbacks.
"""

from __future__ import annotations

import copy
import io
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import get_device, safe_mean
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_wrapper

from worldmodel import checkpoint
from worldmodel.agents.belief import BeliefPolicy, Controller
from worldmodel.agents.experience import arrivals, fit_scaling, new_replay, steps_held
from worldmodel.config import Config, load_yaml
from worldmodel.data import Batch, State, Trace
from worldmodel.envs.make import as_vec_env
from worldmodel.envs.restarts import Restarts, restarted
from worldmodel.errors import ConfigError, EnvError
from worldmodel.learner import Learner
from worldmodel.model import WorldModel, tensors
from worldmodel.recipes import combine
from worldmodel.replay import Replay
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.weights import as_arrays, fill, optimizer_arrays, restore_optimizer


class WorldModelAlgorithm(BaseAlgorithm):
    """Base of Dreamer and its like: a world model learned from the replay, and a controller that acts on its beliefs.

    env     id string, gymnasium environment, VectorEnv or VecEnv (VecNormalize is refused: observations are standardised inside)
    recipe  name or path; without it, the recipe made for the environment's id, else defaults from its spaces
    config  dotted overrides, e.g. {"train.ratio": 1.0} or ["model=vae"]
    trust   files that options name may be opened although that can run code (agent.path of agent=sb3); they are refused else
    """

    kind: ClassVar[str]
    replay_folder: pathlib.Path | None = None
    """Where a run keeps experience; None outside of a run."""
    improves: bool = True
    """Whether an update also improves the controller, on states of the averaged model."""
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": BeliefPolicy,
        "CnnPolicy": BeliefPolicy,
        "MultiInputPolicy": BeliefPolicy,
    }

    def __init__(
        self,
        policy: str,
        env: str | gym.Env | gym.vector.VectorEnv | VecEnv | None,
        *,
        recipe: str | pathlib.Path | None = None,
        config: Config | Mapping | Sequence[str] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        trust: bool = False,
        _init_setup_model: bool = True,
    ):
        self.trust = trust
        self.config = config if isinstance(config, Config) else self._resolve(recipe, config, env)
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        if isinstance(env, str):
            env = as_vec_env(self.config.env.model_copy(update={"id": env}), seed=seed)
        elif env is not None:
            env = as_vec_env(env, seed=seed)
        if env is not None:  # before SB3 looks, so that a space that has no form here is refused with the way out
            self.obs_spec = ObsSpec.from_space(env.observation_space, self.config.env.layout)
            self.action_spec = ActionSpec.from_space(env.action_space)
        train = self.config.train
        super().__init__(
            policy,
            env,
            learning_rate=train.lr,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=_device(device),
            support_multi_env=True,
            seed=seed,
        )
        self.policy_name = policy
        if env is not None and _init_setup_model:
            self._check_window()
            self._setup_model()

    def _resolve(self, recipe: Any, overrides: Any, env: Any) -> Config:
        env_id = env if isinstance(env, str) else getattr(getattr(env, "spec", None), "id", None)
        overrides = overrides if overrides is not None else []
        said = combine(overrides)[1].get("agent", {})
        if not isinstance(said, str) and "kind" not in said:  # else options of this kind would be unknown ones of the recipe's
            own = {"agent.kind": self.kind}
            overrides = {**overrides, **own} if isinstance(overrides, Mapping) else [*overrides, f"agent.kind={self.kind}"]
        base = Config.from_recipe(recipe, overrides, env_id=env_id or "custom")
        return base if base.agent.kind == self.kind else base.override({"agent.kind": self.kind})

    @staticmethod
    def _wrap_env(env: VecEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's hook: no transposed images here, for spaces.py knows the layout; other libraries' scaling is refused."""
        env = as_vec_env(env)
        if unwrap_vec_wrapper(env, VecNormalize) is not None:
            raise ConfigError(
                "VecNormalize is around the environment: its statistics would change what the replay holds. Expected plain "
                "observations: take it off, the world model standardises vectors itself (model.inputs=standardise)."
            )
        return env

    def _check_window(self) -> None:
        """ConfigError where the replay can never hold one sequence: nothing would be learned, and nobody told."""
        train = self.config.train
        held, needed = steps_held(train, self.obs_spec, self.action_spec), train.burn_in + train.batch_length
        kept = held // self.n_envs
        if kept < needed:
            also = "" if train.replay_gib is None else f" and train.replay_gib (now {train.replay_gib})"
            raise ConfigError(
                f"The replay keeps {kept} steps of each of {self.n_envs} environments, but one sequence needs {needed}. "
                f"Raise train.capacity (now {train.capacity}){also}, or lower train.batch_length (now {train.batch_length})."
            )

    # Building -------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        images = [key.kind == "image" for key in self.obs_spec.keys.values()]
        if self.policy_name == "CnnPolicy" and not any(images):
            raise ConfigError(f"CnnPolicy needs an image, but the observations are {self.observation_space}. Use MlpPolicy.")
        if self.policy_name == "MultiInputPolicy" and self.obs_spec.single:
            raise ConfigError(f"MultiInputPolicy needs a Dict, but the observations are {self.observation_space}. Use MlpPolicy.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.world = WorldModel(self.config.model, self.obs_spec, self.action_spec).to(self.device)
            self.controller = self._make_controller().to(self.device)
        self.learner = Learner(self.world, self.config.train)
        self.policy = BeliefPolicy(self.observation_space, self.action_space, self.learner.average, self.controller, self.seed)
        self.generator = torch.Generator(device=self.device).manual_seed(self.seed + 1)
        self.rng = np.random.default_rng(self.seed)
        self.replay: Replay | None = None
        self._credit, self._restarts = 0.0, 0
        self._belief: State | None = None
        self._updates_due = 0

    def _make_controller(self) -> Controller:
        raise NotImplementedError

    def _improve(self, trace: Trace, batch: Batch) -> dict[str, float]:
        """One improvement of the controller on a world-model batch; metrics by TensorBoard tag."""
        return {}

    @property
    def random_until(self) -> int:
        """Rows of experience that are collected at random, before anything is learned."""
        return self.config.train.prefill

    # Learning -------------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> WorldModelAlgorithm:
        """Collect `total_timesteps` real steps and learn from them; SB3's signature. `log_interval`: episodes between log lines."""
        if self.env is None:
            raise ConfigError(f"{type(self).__name__} has no environment to learn in. Call set_env(env) first.")
        fresh = reset_num_timesteps or self._last_obs is None  # when SB3 resets the environments, as after set_env
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        if fresh or self.replay is None or self._belief is None:
            self.open_streams(self._last_obs)
        callback.on_training_start(locals(), globals())
        goes_on = True
        while goes_on and self.num_timesteps < total_timesteps:
            goes_on = self._round(callback, log_interval)
        callback.on_training_end()
        return self

    def _round(self, callback: Any, log_interval: int | None) -> bool:
        """One step of every environment, the updates that it pays for, then the callbacks."""
        callback.on_rollout_start()
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)  # before any update reads it
        new_obs, rewards, dones, infos = self._collect()
        self.learn_from_replay()
        self.num_timesteps += self.env.num_envs
        self._episode_num += (ended := int(dones.sum()))
        self._update_info_buffer(infos, dones)
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        callback.on_rollout_end()
        if ended and log_interval is not None and self._episode_num // log_interval > (self._episode_num - ended) // log_interval:
            self.dump_logs()
        return True

    def open_streams(self, obs: Any) -> None:
        """Episodes begin: open ones end as by truncation, and the first observation of each environment goes into the replay."""
        if self.replay is None:
            self.replay = self._new_replay()
        elif self.replay.num_envs != self.n_envs:
            raise ConfigError(
                f"The replay was collected with {self.replay.num_envs} environments, the new VecEnv has {self.n_envs}. "
                "Use as many, or a fresh agent."
            )
        else:
            self.replay.cut()
        self._store_first(self._rows(obs), np.arange(self.n_envs))
        self._belief = self.policy.begin(self.n_envs)
        self._last_episode_starts = np.ones(self.n_envs, bool)

    def adopt(self, folder: pathlib.Path, log: Callable[[str], object]) -> None:
        """Begins with the experience that lies in a folder, as far as it is intact."""
        self.replay = self._new_replay()
        self.replay.adopt(folder, log)
        fit_scaling(self.world, self.replay)

    def _new_replay(self) -> Replay:
        return new_replay(self.config.train, self.obs_spec, self.action_spec, self.n_envs, self.replay_folder)

    def reopen(self, seed: int) -> None:
        """Open episodes end as by truncation, and new ones begin in environments seeded with seed, seed + 1, ..."""
        self.env.seed(seed)
        self._last_obs = self.env.reset()
        self.open_streams(self._last_obs)

    def _rows(self, obs: Any) -> dict[str, np.ndarray]:
        rows = self.obs_spec.to_rows(obs, self._place)
        self.obs_spec.check(rows, self._place)
        return rows

    def _place(self, env: int = 0) -> str:
        return f"environment {env}, episode {self._episode_num}, real step {self.num_timesteps}"

    def _store_first(self, rows: dict[str, np.ndarray], envs: np.ndarray) -> None:
        n = len(envs)
        no, yes = np.zeros(n, bool), np.ones(n, bool)
        self._store(rows, np.zeros((n, self.action_spec.dim), np.float32), np.zeros(n, np.float32), yes, no, no, envs)

    def _store(self, rows: dict[str, np.ndarray], action, reward, first, last, terminal, envs: np.ndarray | None = None) -> None:
        self.replay.add(rows, action, reward, first, last, terminal, streams=None if envs is None else envs)
        self.world.scaling.update(self.obs_spec.canonical(tensors(rows, self.device)))
        self.world.heads.scale.update(torch.as_tensor(reward, device=self.device))

    def _collect(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict]]:
        """One step of every environment into the replay."""
        if self.learner.updates == 0 and self.replay.added < self.random_until:
            action = self._random_action()
            self._belief = State({**self._belief, "prev_action": torch.as_tensor(action, device=self.device)})
        else:
            action, self._belief = self.policy.follow(
                self._belief, self._rows(self._last_obs), self._last_episode_starts, deterministic=False
            )
        env_action = self.action_spec.decode(action)
        new_obs, rewards, dones, infos = self.env.step(env_action)
        self.record(env_action, new_obs, rewards, dones, infos)
        self._last_obs, self._last_episode_starts = new_obs, dones.copy()
        return new_obs, rewards, dones, infos

    def record(self, env_action: np.ndarray, new_obs: Any, rewards: np.ndarray, dones: np.ndarray, infos: list[dict]) -> None:
        """What a step of the VecEnv brought goes into the replay, whoever took it; EnvError, and nothing of it, if any is ill.

        Of an environment that was made anew the episode is cut where it was, and the fresh one's first observation stored.
        """
        action = self.action_spec.encode(env_action)  # what the environment got, exactly
        if not np.isfinite(rewards).all():
            env = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise EnvError(
                f"{self._place(env)}: the reward is {rewards[env]}. A finite number was expected; the step was not stored."
            )
        following = self._rows(new_obs)
        arrived, terminal = arrivals(following, dones, infos, self._rows)
        lost = restarted(infos)
        self.replay.cut(np.flatnonzero(lost).tolist())
        if not lost.all():
            here = np.flatnonzero(~lost)
            arrived = {name: x[here] for name, x in arrived.items()}
            self._store(arrived, action[here], rewards[here], np.zeros(len(here), bool), dones[here], terminal[here], here)
        if dones.any():
            ended = np.flatnonzero(dones)
            self._store_first({name: x[ended] for name, x in following.items()}, ended)

    def _random_action(self) -> np.ndarray:
        """Uniform actions [N, A]; each is kept for `train.prefill_hold` steps on average, at most until its episode ends.

        White noise averages out: an Acrobot that is pushed at random at every step never swings up in 500 steps,
        one whose pushes last five steps does so in every second episode. Source: Dabney et al. 2021 (temporally
        extended exploration), with a geometric duration.
        """
        fresh = self.action_spec.sample(self.env.num_envs, self.rng)
        redraw = self._last_episode_starts | (self.rng.random(self.env.num_envs) * self.config.train.prefill_hold < 1)
        return np.where(redraw[:, None], fresh, self._belief["prev_action"].cpu().numpy())

    def learn_from_replay(self) -> None:
        """The updates that the step just taken pays for; the first ones once the prefill is there."""
        train = self.config.train
        rows = train.burn_in + train.batch_length
        if self.replay.added < train.prefill or max(self.replay.lengths) < rows:
            return
        if self.learner.updates == 0:
            for _ in range(train.pretrain):
                self.update(improve=False)
        self.spend(self.n_envs)

    def spend(self, steps: int) -> None:
        """The updates that so many steps pay for; what is left over counts towards the next."""
        self._credit += self.config.train.ratio * steps
        while self._credit >= 1:
            self._credit -= 1
            self.update()

    def update(self, improve: bool = True) -> dict[str, float]:
        """One gradient step of the world model and, with `improve`, of the controller; the metrics are logged."""
        train = self.config.train
        batch = self.replay.sample(
            train.batch_size, train.burn_in + train.batch_length, self.rng, newest=train.newest, ends=train.ends
        )
        batch = self.learner.prepare(batch)
        metrics, trace, rows = self.learner.update(batch, self.generator)
        metrics = {f"world/{name}": value for name, value in metrics.items()}
        if improve and self.improves:
            if self.learner.average is not self.world:
                trace = self.learner.averaged_trace(batch, self.generator)
            metrics |= self._improve(trace, rows)
        self._n_updates += 1
        if self._logger is not None:
            for name, value in metrics.items():
                self.logger.record_mean(name, value)
        return metrics

    def dump_logs(self) -> None:
        """Write what was recorded under SB3's usual names."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        if self.restarts:
            self.logger.record("env/restarts", self.restarts)
        self.logger.record("time/episodes", self._episode_num, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    @property
    def restarts(self) -> int:
        """Environments that failed and were made anew, those before a resume included."""
        here = getattr(self.env, "restarts", None)
        return self._restarts + (here.count if isinstance(here, Restarts) else 0)

    @property
    def parameter_count(self) -> int:
        """Numbers that gradients change, of world model and controller together."""
        return sum(p.numel() for module in (self.world, self.controller) for p in module.parameters() if p.requires_grad)

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
        """One zip of stored safetensors, JSON and manifest, with nothing in it that could run code. The replay stays out."""
        arrays, state = self.content()
        checkpoint.pack(_zip_path(path), self.num_timesteps, arrays, state, {"agent": self.kind})

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        env: str | gym.Env | VecEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: Any = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> WorldModelAlgorithm:
        """The agent of a zip that `save` wrote, or of a run folder (its newest good checkpoint)."""
        path = pathlib.Path(path)
        if path.is_dir():
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
    ) -> WorldModelAlgorithm:
        """A new agent for these spaces, without an environment; `options` are those of the class."""
        agent = cls(policy, None, **options)
        agent.obs_spec, agent.action_spec = obs_spec, action_spec
        agent.observation_space, agent.action_space = obs_spec.space, action_spec.space
        agent.n_envs = num_envs
        agent._check_window()
        agent._setup_model()
        return agent

    @classmethod
    def from_content(cls, arrays, state: Mapping[str, Any], *, env=None, device="auto", **kwargs: Any) -> WorldModelAlgorithm:
        """The agent that `content` described; `env` may be given later with set_env."""
        if state.get("agent") != cls.kind:
            raise ConfigError(f"The file holds an agent of kind {state.get('agent')!r}, not '{cls.kind}'. Load it with that class.")
        specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
        options = {"config": Config.parse(load_yaml(state["config"])), "seed": state["seed"], "device": device, **kwargs}
        agent = cls.from_specs(state["policy"], *specs, num_envs=state["num_envs"], **options)
        agent.restore(arrays, state)
        if env is not None:
            env = as_vec_env(env, seed=state["seed"])
            agent.n_envs = env.num_envs  # set_env wants as many as before, but here nothing was collected yet
            agent.set_env(env)
        return agent


def policy_name(spec: ObsSpec) -> str:
    """SB3's name of a policy for such observations."""
    if set(spec.keys) != {"obs"}:
        return "MultiInputPolicy"
    return "CnnPolicy" if spec.keys["obs"].kind == "image" else "MlpPolicy"


class _Attributes:
    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)


def _device(device: torch.device | str) -> torch.device:
    if torch.device("cpu" if device == "auto" else device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda was asked for, but torch finds no CUDA device. Use device=cpu, or install a CUDA build of torch."
        )
    return get_device(device)


def _zip_path(path: Any) -> pathlib.Path:
    """SB3's rule: a name without suffix gets `.zip`."""
    path = pathlib.Path(path)
    return path if path.suffix else path.with_suffix(".zip")


def _behind(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
