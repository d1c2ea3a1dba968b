"""`train_in_dream`: an SB3 algorithm is trained in a world model, by its own learn(), and acts in the real environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from worldmodel.agents.arguments import policy_name, read_config
from worldmodel.agents.belief import BeliefPolicy
from worldmodel.agents.evaluation import FINAL_SEED, evaluate, require_spaces
from worldmodel.agents.held_out import HELD_OUT_SEED, collect
from worldmodel.agents.rollouts import returns
from worldmodel.agents.sb3.agent import SB3Agent, SB3Controller
from worldmodel.agents.sb3.algorithms import ALGORITHMS, algorithm_class, make_algorithm, open_algorithm, seeded_globals
from worldmodel.config import Config
from worldmodel.envs.imagined import ImaginedVecEnv
from worldmodel.envs.make import EnvConfig, make_vec
from worldmodel.envs.vectors.plain import as_trained
from worldmodel.errors import ConfigError, require_choice, require_whole
from worldmodel.model import ModelConfig, WorldModel
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint
from worldmodel.storage.run import Run
from worldmodel.storage.run_folder import CONFIG
from worldmodel.storage.weights import as_arrays

WORLD, POLICY = "world.zip", "policy.zip"
"""The files of a saved DreamPolicy: the world model's, without pickle, and SB3's own."""


@dataclass(frozen=True)
class DreamResult:
    """The result of training in the dream.

    algorithm        SB3's class
    real_steps       steps of the real training environments, random ones included; 0 in the world of a finished run
    imagined_steps   steps of the imagined ones
    real_return      mean of 20 greedy real episodes (seeds 30000..)
    imagined_return  of the first 100 steps from the first observations of 20 other episodes, as the model predicts them
    gap              imagined_return minus the real return of those same 100 steps
    """

    env_id: str
    algorithm: str
    real_steps: int
    imagined_steps: int
    real_return: float
    imagined_return: float
    gap: float


class DreamPolicy:
    """A policy from the dream that acts on real observations; `evaluate_policy` takes it as it is.

    algorithm  the SB3 algorithm itself, whose own `learn()` continues the training. Once loaded it needs an environment first,
               e.g. `policy.algorithm.set_env(ImaginedVecEnv(run, 64))`
    world      the world model whose filtered state the policy observes
    result     DreamResult, or None before `measure`
    """

    def __init__(self, world: WorldModel, controller: SB3Controller, env: EnvConfig, *, seed: int = 0):
        self.world, self.env, self.seed = world.eval(), env, seed
        self.policy = BeliefPolicy(world.obs.space, world.action.space, world, controller, seed)
        self.obs_spec, self.action_spec, self.device = world.obs, world.action, world.device
        self.result: DreamResult | None = None

    @property
    def algorithm(self) -> BaseAlgorithm:
        return self.policy.controller.algorithm

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's recurrent predict, on the environment's own observations: `state` is the world model's filtered state."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    def measure(self, real_steps: int, imagined_steps: int, episodes: int = 20, max_steps: int | None = None) -> DreamResult:
        """Plays in reality and in the dream; the result is also kept in `result`. Raises EnvError, MissingExtraError.

        max_steps  real episodes are cut there, as by eval.max_steps
        """
        real = float(np.mean(evaluate(self, self.env, episodes, FINAL_SEED, max_steps=max_steps)[0]))
        held_out = collect(self, self.env, episodes, HELD_OUT_SEED, random=0.0, steps=100)
        generator = torch.Generator(self.device).manual_seed(HELD_OUT_SEED)
        imagined, real_prefix_return = (float(x.mean()) for x in returns(self, held_out, generator, 100, 0.0))
        name = type(self.algorithm).__name__
        self.result = DreamResult(self.env.id, name, real_steps, imagined_steps, real, imagined, imagined - real_prefix_return)
        return self.result

    def save(self, folder: str | Path) -> Path:
        """A folder: world.zip (safetensors, JSON, checksums; no pickle) and policy.zip, SB3's own file, which holds pickles."""
        folder = Path(folder)
        controller = self.policy.controller
        state = {
            "model": self.world.config.model_dump(mode="json"),
            "observation_spec": self.world.obs.to_json(),
            "action_spec": self.world.action.to_json(),
            "env": self.env.model_dump(mode="json"),
            "algorithm": type(self.algorithm).__name__,
            "sees": controller.observes,
            "noise": controller.noise,
            "seed": self.seed,
            "result": asdict(self.result) if self.result is not None else None,
        }
        checkpoint.pack(folder / WORLD, self.algorithm.num_timesteps, {"world": as_arrays(self.world)}, state, {})
        self.algorithm.save(folder / POLICY)
        return folder

    @classmethod
    def load(
        cls, folder: str | Path, *, trust: bool = False, algorithm: type[BaseAlgorithm] | None = None, device: str = "cpu"
    ) -> DreamPolicy:
        """What `save` wrote. Raises TrustError, ConfigError, CorruptError.

        trust      SB3's file may run code when it is opened: True for one that you trust
        algorithm  its class, where it is none of SB3's or sb3-contrib's own
        """
        folder = Path(folder)
        if not (folder / WORLD).is_file():
            raise ConfigError(f"'{folder}' holds no {WORLD}. Expected a folder that DreamPolicy.save wrote.")
        arrays, state, _ = checkpoint.unpack(folder / WORLD)
        specs = ObsSpec.from_json(state["observation_spec"]), ActionSpec.from_json(state["action_spec"])
        world = WorldModel.from_arrays(ModelConfig.parse_saved(state["model"]), *specs, arrays["world"])
        if algorithm is None:
            names = {attribute: name for name, (_, attribute) in ALGORITHMS.items()}
            if state["algorithm"] not in names:
                raise ConfigError(
                    f"'{state['algorithm']}' is no algorithm of SB3. Pass its class: DreamPolicy.load(..., algorithm=CLASS)."
                )
            algorithm = algorithm_class(names[state["algorithm"]])
        loaded = open_algorithm(algorithm, folder / POLICY, trust=trust, device=device)
        controller = SB3Controller(loaded, state["sees"], state["noise"])
        policy = cls(world.to(device), controller, EnvConfig.parse(state["env"]), seed=state["seed"])
        policy.result = DreamResult(**state["result"]) if state["result"] is not None else None
        return policy

    def __repr__(self) -> str:
        return f"DreamPolicy({type(self.algorithm).__name__}, {self.env.id}, {self.result})"


@dataclass(frozen=True)
class _Training:
    """An algorithm and the imagined worlds in which it is trained.

    options  of the ImaginedVecEnv: horizon, start, observation, uncertainty_penalty, max_uncertainty
    """

    algorithm: type[BaseAlgorithm]
    total_timesteps: int
    worlds: int
    options: dict[str, Any]
    seed: int
    device: str
    algo_kwargs: Mapping[str, Any]


def train_in_dream(
    algo: type[BaseAlgorithm] | str,
    world: Run | str | Path,
    *,
    total_timesteps: int,
    rounds: int = 1,
    algo_kwargs: Mapping[str, Any] | None = None,
    steps: int | None = None,
    worlds: int = 64,
    horizon: int = 15,
    start: str = "replay",
    observation: str = "latent",
    uncertainty_penalty: float = 0.0,
    max_uncertainty: float | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    env: EnvConfig | str | None = None,
    callback: BaseCallback | None = None,
    seed: int = 0,
    device: str = "cpu",
    episodes: int = 20,
) -> DreamPolicy:
    """An unmodified SB3 algorithm is trained in imagination, by its own learn(); the policy acts in the real environment.

        train_in_dream(PPO, "runs/demo", total_timesteps=100_000)            # a finished run: not one real step
        train_in_dream(PPO, "cartpole", total_timesteps=400_000, rounds=50)  # alternating

    algo             an algorithm's class (PPO, A2C, DQN, SAC, TD3; RecurrentPPO, TQC, QRDQN with the extra `contrib`), or its name
    world            a Run or run folder, whose world model is fixed; or a recipe or Gymnasium id: in each of `rounds` rounds the
                     policy collects real experience, the world model is updated, and the algorithm is trained in the dream
    total_timesteps  imagined steps over all rounds; on-policy algorithms take whole rollouts of n_steps in each world
    steps            alternating: real steps over all rounds, random ones included (default: the recipe's train.steps)
    algo_kwargs      arguments of the algorithm, e.g. {"policy_kwargs": ..., "n_steps": 32}
    worlds, horizon, start, observation, uncertainty_penalty, max_uncertainty: as those of ImaginedVecEnv
    overrides        alternating: dotted options of the recipe
    env              where the result is measured (default: the environment of the run or recipe)
    callback         finished run: an SB3 callback for learn(). An EvalCallback needs LatentVecEnv(make_vec(run.config.env), run)
    episodes         of the measurement at the end; 0: none. Raises ConfigError.
    """
    require_whole("train_in_dream: ", total_timesteps=total_timesteps, rounds=rounds, episodes=episodes + 1)
    options = {"horizon": horizon, "start": start, "observation": observation}
    options |= {"uncertainty_penalty": uncertainty_penalty, "max_uncertainty": max_uncertainty}
    training = _Training(_algorithm(algo), total_timesteps, worlds, options, seed, device, algo_kwargs or {})
    env = EnvConfig(id=env) if isinstance(env, str) else env
    run = world if isinstance(world, Run) else Run.open(world) if (Path(world) / CONFIG).is_file() else None
    if run is not None:
        if rounds != 1 or steps is not None or overrides:
            raise ConfigError(
                "train_in_dream: a run is a finished world: rounds, steps and overrides have no meaning. Leave them out, or pass "
                "the name of a recipe, to alternate."
            )
        config = run.config
        policy, counts = _train_in_run(training, run, env or config.env, callback)
    elif callback is not None:
        raise ConfigError("train_in_dream: a callback is for a finished world. To alternate, use SB3Agent and its learn().")
    else:
        config = _alternating_config(training, read_config(str(world), overrides), steps, rounds)
        policy, counts = _train_alternating(training, config, env or config.env)
    if episodes:
        policy.measure(*counts, episodes=episodes, max_steps=config.eval.max_steps)
    return policy


def _train_in_run(
    training: _Training, run: Run, env: EnvConfig, callback: BaseCallback | None
) -> tuple[DreamPolicy, tuple[int, int]]:
    """(policy, (real steps, imagined steps)) of training in the fixed world model of a run."""
    world = run.world_model(device=training.device)
    _require_fit(env, world.obs, world.action)
    replay = run.replay() if training.options["start"] == "replay" else None
    with seeded_globals(torch.Generator().manual_seed(training.seed)):
        imagined = VecMonitor(ImaginedVecEnv(world, training.worlds, seed=training.seed, replay=replay, **training.options))
        algorithm = make_algorithm(training.algorithm, imagined, training.seed, training.device, training.algo_kwargs)
        algorithm.learn(training.total_timesteps, callback=callback)
    controller = SB3Controller(algorithm, training.options["observation"])
    return DreamPolicy(world, controller, env, seed=training.seed), (0, algorithm.num_timesteps)


def _train_alternating(training: _Training, config: Config, env: EnvConfig) -> tuple[DreamPolicy, tuple[int, int]]:
    """The same of training by turns: real experience, updates of the world model, training in the dream."""
    venv = make_vec(config.env, seed=training.seed)
    try:
        specs = ObsSpec.from_space(venv.observation_space, config.env.layout), ActionSpec.from_space(venv.action_space)
        _require_fit(env, *specs)
        options = {"seed": training.seed, "device": training.device, "algo_kwargs": training.algo_kwargs}
        agent = SB3Agent(policy_name(specs[0]), venv, config=config, algorithm=training.algorithm, **options)
        agent.learn(config.train.steps)
    finally:
        venv.close()
    if not agent.learner.updates:
        rows = config.train.burn_in + config.train.batch_length
        raise ConfigError(
            f"train_in_dream: {agent.num_timesteps} real steps of {agent.n_envs} environments taught the world model nothing: it "
            f"begins with {config.train.prefill} rows (train.prefill), {rows} of them from one environment. Raise steps."
        )
    while agent.dreams < config.agent.visits:  # learning began later than the random steps ended
        agent.train_in_dream(config.agent.imagined)
    policy = DreamPolicy(agent.learner.ema, agent.controller, env, seed=training.seed)
    return policy, (agent.num_timesteps, agent.imagined_steps)


def _alternating_config(training: _Training, base: Config, steps: int | None, rounds: int) -> Config:
    """The recipe's config with an SB3 agent whose `rounds` share the real steps after the random ones."""
    steps = base.train.steps if steps is None else steps
    learning_steps = steps - base.train.prefill
    if rounds > learning_steps:
        raise ConfigError(
            f"train_in_dream: {rounds} rounds need as many real steps behind the {base.train.prefill} random ones "
            f"(train.prefill), but steps={steps}. Raise steps."
        )
    agent = {"kind": "sb3", "worlds": training.worlds, "visits": rounds, "every": learning_steps // rounds, **training.options}
    agent["imagined"] = max(1, training.total_timesteps // rounds)
    return base.override({"agent": agent, "train.steps": steps})


def _algorithm(algo: Any) -> type[BaseAlgorithm]:
    if isinstance(algo, str):
        require_choice("algo", algo, ALGORITHMS)
        return algorithm_class(algo)
    if not (isinstance(algo, type) and issubclass(algo, BaseAlgorithm)):
        raise ConfigError(f"train_in_dream: algo is a {type(algo).__name__}; expected an algorithm's class, like PPO, or its name.")
    return algo


def _require_fit(env: EnvConfig, obs: ObsSpec, action: ActionSpec) -> None:
    """ConfigError where the environment in which the policy is to act has other spaces than the world."""
    known = SimpleNamespace(obs_spec=obs, action_spec=action)
    venv = as_trained(known, make_vec(env, 1))
    try:
        require_spaces(known, venv, env.id)
    finally:
        venv.close()
