"""Unmodified Stable-Baselines3 algorithms that learn in the dream: in a finished world, or in turns with it.

`SB3Agent` is an agent like any other (`worldmodel train RECIPE agent=sb3 agent.algo=sac`): its policy collects real experience,
the world model learns from it, and every so many real steps the algorithm's own `learn()` runs in an ImaginedVecEnv over
the model as it stands. `train_in_dream` (in_dream.py) is the same in one call. With `agent.path` a policy that SB3 has saved
collects and acts as it is, on the environment's own observations, and the world model alone learns.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecTransposeImage
from torch import Tensor

from worldmodel.agents.belief import Controller
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.config import Frozen, Options
from worldmodel.data import State
from worldmodel.envs.extras import absent, install
from worldmodel.envs.imagined import ImaginedVecEnv, to_observations
from worldmodel.envs.vectors.plain import plain_action, plain_obs, plain_raw
from worldmodel.errors import ConfigError, MissingExtraError, TrustError
from worldmodel.model import WorldModel
from worldmodel.registry import register
from worldmodel.storage.replay import Replay
from worldmodel.storage.weights import cpu_randomness

HOMES = {
    **{name: ("stable_baselines3", name.upper()) for name in ("ppo", "a2c", "dqn", "sac", "td3")},
    **{"recurrent_ppo": ("sb3_contrib", "RecurrentPPO"), "tqc": ("sb3_contrib", "TQC"), "qrdqn": ("sb3_contrib", "QRDQN")},
}
"""Name in configs -> (package, class)."""

OFF_POLICY = {"learning_starts": 0, "train_freq": 1, "gradient_steps": 4}
VALUE_BASED = {**OFF_POLICY, "buffer_size": 50_000, "batch_size": 128, "learning_rate": 1e-3, "target_update_interval": 256}
ON_POLICY = {"n_steps": 16, "gamma": 0.99, "gae_lambda": 0.95}
DQN_COUNTERS = {"exploration_rate", "_n_calls"}
"""What DQN and its like count besides their steps."""
DREAM_DEFAULTS: dict[str, dict[str, Any]] = {
    "PPO": {**ON_POLICY, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3, "ent_coef": 1e-3},
    "A2C": {**ON_POLICY, "n_steps": 8, "learning_rate": 1e-3},
    "RecurrentPPO": {**ON_POLICY, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3},
    "DQN": VALUE_BASED,
    "QRDQN": {**VALUE_BASED, "gradient_steps": 1},
    "SAC": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
    "TD3": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
    "TQC": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
}
"""Arguments that suit some dozens of imagined worlds, where SB3's defaults suit one real environment; `options` lie over them."""


class SB3Config(Frozen):
    """An algorithm, and how it visits the dream."""

    kind: Literal["sb3"] = "sb3"
    algo: Literal["ppo", "a2c", "dqn", "sac", "td3", "recurrent_ppo", "tqc", "qrdqn"] = Field("ppo", description="the algorithm")
    path: str | None = Field(
        None, description="a zip that the algorithm's save() wrote (needs trust): it collects and acts, and learns no more"
    )
    options: Options = Field({}, description="keyword arguments of its constructor, over those that suit the dream")
    every: int = Field(25, ge=1, description="real steps between visits to the dream")
    visits: int | None = Field(None, ge=1, description="most visits; none: to the end of the run")
    imagined: int = Field(4096, ge=1, description="imagined steps of each visit, over all worlds")
    worlds: int = Field(64, ge=1, description="imagined worlds that step together")
    horizon: int = Field(15, ge=1, description="imagined steps after which an episode is truncated")
    start: Literal["replay", "prior"] = Field("replay", description="imagine from recorded rows, or from the initial distribution")
    observation: Literal["latent", "decoded"] = Field("latent", description="what it sees: features, or expected observations")
    noise: float = Field(0.0, ge=0, description="deviation of normal noise on real continuous actions, which are in [-1, 1]")
    uncertainty_penalty: float = Field(
        0.0, description="taken off each imagined reward, in units of the rewards' own size, per unit of the ensemble's uncertainty"
    )
    max_uncertainty: float | None = Field(None, gt=0, description="imagined episodes are truncated beyond this uncertainty")


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """SB3's class of a name. Raises MissingExtraError, and ConfigError where its package is broken."""
    package, attribute = HOMES[name]
    try:
        return getattr(importlib.import_module(package), attribute)
    except ImportError as error:
        if package.partition(".")[0] not in absent(error):
            raise ConfigError(
                f"agent.algo={name} comes with the package '{package}', which is installed and cannot be imported: {error}. "
                "Correct that installation: it may be of another version than stable-baselines3."
            ) from error
        raise MissingExtraError(
            f"agent.algo={name} comes with the package '{package}', which is not installed. {install('contrib')}"
        ) from error


def open_algorithm(algorithm: type[BaseAlgorithm], path: str | Path, *, trust: bool, device: Any) -> BaseAlgorithm:
    """What SB3's save() wrote. Raises TrustError without `trust`, ConfigError where there is no such algorithm in the file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"'{path}' is no file. Expected the zip that {algorithm.__name__}.save() wrote, suffix included.")
    if not trust:
        raise TrustError(
            f"'{path}' is a file of Stable-Baselines3: opening it unpickles, which can run any code. Expected --trust, or "
            "trust=True: give it where the file comes from you, or from somebody you trust."
        )
    try:
        return algorithm.load(path, device=device)
    except Exception as error:  # whatever its pickles raise
        raise ConfigError(
            f"'{path}' could not be opened as {algorithm.__name__}: {type(error).__name__}: {error}. Expected the zip that its "
            "save() wrote: check agent.algo, or that the file is whole."
        ) from error


@contextmanager
def seeded_globals(generator: torch.Generator, algorithm: BaseAlgorithm | None = None) -> Iterator[None]:
    """SB3 draws from the process's own random states: in here they follow from `generator`, and outside nothing of it is seen.

    So does the action space of `algorithm`, from which DQN draws its random actions. CUDA's generators are left as the user seeded
    them: what an algorithm of SB3 draws on a GPU follows from those.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    python, legacy = random.getstate(), np.random.get_state()
    with cpu_randomness(seed):
        random.seed(seed)
        np.random.seed(seed)
        if algorithm is not None:
            algorithm.action_space.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def make_algorithm(
    algorithm: type[BaseAlgorithm], dream: VecEnv, seed: int, device: Any, options: Mapping[str, Any]
) -> BaseAlgorithm:
    """The algorithm in an imagined environment. ConfigError where the action space or an argument does not fit."""
    space = dream.observation_space
    image = getattr(space, "shape", None) is not None and len(space.shape) == 3
    kind = "MultiInput" if hasattr(space, "spaces") else "Cnn" if image else "Mlp"
    recurrent = any("Recurrent" in c.__name__ for c in algorithm.__mro__)
    policy = f"{kind}{'LstmPolicy' if recurrent else 'Policy'}"
    fitting = next((DREAM_DEFAULTS[c.__name__] for c in algorithm.__mro__ if c.__name__ in DREAM_DEFAULTS), {})
    given = {**fitting, "seed": seed, "device": device, **options}
    try:
        return algorithm(given.pop("policy", policy), dream, **given)
    except (AssertionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        if "action spaces" in said:
            raise ConfigError(
                f"{algorithm.__name__} does not fit this environment: {said}. Choose one that does: ppo, a2c or recurrent_ppo take "
                "any actions, dqn and qrdqn discrete ones, sac, td3 and tqc continuous ones."
            ) from None
        raise ConfigError(f"{algorithm.__name__} refused its arguments: {said}. Correct agent.options or algo_kwargs.") from error


class SB3Controller(Controller):
    """Acts by an SB3 policy.

    sees  "latent": the belief's feature; "decoded": what that decodes to; "real": the observation itself, "decoded" in dreams
    """

    def __init__(self, algorithm: BaseAlgorithm, sees: str, noise: float = 0.0):
        super().__init__()
        self.policy = algorithm.policy
        self._algorithm = [algorithm]  # in a list: a module would be sought in it, and its networks stand in `policy` already
        self.sees, self.noise = sees, noise
        self.lstm = getattr(self.policy, "lstm_hidden_state_shape", None)

    @property
    def algorithm(self) -> BaseAlgorithm:
        return self._algorithm[0]

    def memory(self, world: WorldModel, batch_size: int) -> State:
        """A recurrent policy's hidden states [B, layers, H], and whether the episode is under way."""
        if self.lstm is None:
            return State({})
        zeros = torch.zeros(batch_size, self.lstm[0], self.lstm[2], device=world.device)
        started = torch.zeros(batch_size, dtype=torch.bool, device=world.device)
        return State({"lstm_h": zeros, "lstm_c": zeros.clone(), "started": started})

    def act(
        self, world: WorldModel, state: State, memory: State, deterministic: bool, generator: torch.Generator, rows: Any = None
    ) -> tuple[Tensor, State]:
        if self.sees == "real" and rows is not None:
            obs_for_policy = world.obs.to_env(plain_raw(world.obs, rows))
        else:
            obs_for_policy = to_observations(
                world, world.dynamics.feature(state), plain_obs(world.obs) if self.sees != "latent" else None
            )
        lstm_state, first = None, None
        if self.lstm is not None:
            lstm_state = tuple(memory[name].transpose(0, 1).contiguous().cpu().numpy() for name in ("lstm_h", "lstm_c"))
            first = ~memory["started"].cpu().numpy()
        with seeded_globals(generator, self.algorithm):
            action, lstm_state = self.algorithm.predict(obs_for_policy, lstm_state, first, deterministic)
        if self.lstm is not None:
            h, c = (torch.as_tensor(x, device=world.device).transpose(0, 1).contiguous() for x in lstm_state)
            memory = State({"lstm_h": h, "lstm_c": c, "started": torch.ones_like(memory["started"])})
        action = torch.as_tensor(plain_action(world.action).encode(action), device=world.device)
        if self.noise and not deterministic and world.action.kind == "continuous":
            action = action + self.noise * torch.randn(action.shape, generator=generator, device=action.device)
        return action, memory


class _StopCallback(BaseCallback):
    """Ends a visit to the dream where `go_on` says no."""

    def __init__(self, should_continue: Callable[[], bool]):
        super().__init__()
        self.should_continue, self.ended = should_continue, False

    def _on_step(self) -> bool:
        self.ended = not self.should_continue()
        return not self.ended


class _ForwardingLogger(Logger):
    """SB3's logger of the algorithm in the dream: what it records is averaged into the run's own log, under names of its own."""

    def __init__(self, target: Callable[[], Logger | None]):
        super().__init__(folder=None, output_formats=[])
        self._target = target

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        logger = self._target()
        if logger is not None and key.startswith(("train/", "rollout/")) and isinstance(value, int | float | np.number):
            logger.record_mean(key.replace("rollout/", "dream/"), float(value))

    def record_mean(self, key: str, value: Any, exclude: Any = None) -> None:
        self.record(key, value)


@register("agent", "sb3", SB3Config)
class SB3Agent(WorldModelAlgorithm):
    """An SB3 algorithm that learns in the dream alone, while its policy collects what the world model learns from.

    With `agent.path` the policy of that file collects from the first step on, and does not learn.

    algorithm, algo_kwargs  a class and arguments that no config can hold (policy_kwargs with classes, schedules); without them,
                            those of the config

    Off-policy algorithms on latents begin each visit with an empty buffer: the features of an older world model mean other
    things. On decoded observations the buffer is kept, but for a fence or a resume: checkpoints do not hold it.
    """

    kind: ClassVar[str] = "sb3"
    improves = False  # it improves on its visits to the dream

    def __init__(self, *args: Any, algorithm: type[BaseAlgorithm] | None = None, algo_kwargs: dict | None = None, **kwargs: Any):
        self._algorithm_class, self._algo_kwargs = algorithm, algo_kwargs
        self._since_visit = 0
        self.imagined_steps = self.visits = 0
        self._digest: str | None = None
        super().__init__(*args, **kwargs)

    def _make_controller(self) -> SB3Controller:
        config = self.config.agent
        algorithm = self._algorithm_class or algorithm_class(config.algo)
        options = {**config.options, **(self._algo_kwargs or {})}
        with seeded_globals(torch.Generator().manual_seed(self.seed)):
            if self.is_fixed:
                return SB3Controller(self._load_policy(algorithm), "real", config.noise)
            made = make_algorithm(algorithm, self._dream(self.world, None), self.seed, self.device, options)
        made.set_logger(_ForwardingLogger(lambda: self._logger))
        return SB3Controller(made, config.observation, config.noise)

    def _load_policy(self, algorithm: type[BaseAlgorithm]) -> BaseAlgorithm:
        """The algorithm of `agent.path`. ConfigError where it was trained on other spaces."""
        path = Path(self.config.agent.path)
        made = open_algorithm(algorithm, path, trust=self.trust, device=self.device)
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()
        observation, action = plain_obs(self.obs_spec).space, plain_action(self.action_spec).space
        if not (_fits(observation, made.observation_space) and action == made.action_space):
            raise ConfigError(
                f"The policy in '{path}' was trained on {made.observation_space} and {made.action_space}, but the environment has "
                f"{observation} and {action}, counted from 0 as SB3 does. Expected a policy of this environment."
            )
        return made

    @property
    def is_fixed(self) -> bool:
        """Whether the policy comes from a file, and learns no more."""
        return self.config.agent.path is not None

    @property
    def prefill_rows(self) -> int:
        """A policy that comes with its skill collects from the first step on."""
        return 0 if self.is_fixed else super().prefill_rows

    def _dream(self, world: WorldModel, replay: Replay | None) -> VecMonitor:
        """The imagined worlds; without experience they are there for their spaces alone."""
        names = ("horizon", "start", "observation", "uncertainty_penalty", "max_uncertainty")
        options = {name: getattr(self.config.agent, name) for name in names}
        options |= {} if replay is not None else {"start": "prior"}
        return VecMonitor(ImaginedVecEnv(world, self.config.agent.worlds, seed=self.seed, replay=replay, **options))

    @property
    def algorithm(self) -> BaseAlgorithm:
        """The SB3 algorithm itself."""
        return self.controller.algorithm

    # Learning -------------------------------------------------------------------------------------------------------

    def update_for_steps(self, steps: int) -> None:
        """The world model's updates, and a visit to the dream where one is due."""
        self._since_visit += 0 if self.is_fixed else steps
        super().update_for_steps(steps)

    @property
    def _visit_is_due(self) -> bool:
        max_phases = self.config.agent.visits
        return (
            not self.is_fixed and self._since_visit >= self.config.agent.every and (max_phases is None or self.visits < max_phases)
        )

    @property
    def has_pending_updates(self) -> bool:
        return super().has_pending_updates or (self._is_ready and self._visit_is_due)

    def run_updates(self) -> bool:
        if not super().run_updates():
            return False
        while self._visit_is_due:
            if not (self.should_continue() and self.visit(self.config.agent.imagined)):
                return False
            self._since_visit -= self.config.agent.every
        return True

    def restart_episodes(self, seed: int) -> None:
        super().restart_episodes(seed)
        if isinstance(self.algorithm, OffPolicyAlgorithm) and not self.is_fixed:
            self.algorithm.replay_buffer.reset()

    def visit(self, steps: int) -> bool:
        """The algorithm's own learn() for so many imagined steps, in worlds that begin anew with the model as it stands.

        Its schedules follow the real steps: what is left of this agent's learn(), not of the visit. False where `go_on` ended
        it: then it counts as none, and is owed.
        """
        algorithm = self.algorithm
        dream = self._dream(self.learner.ema, self.replay)
        dream.seed(int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device)))
        algorithm.set_env(dream, force_reset=True)
        if isinstance(algorithm, OffPolicyAlgorithm) and self.config.agent.observation == "latent":
            algorithm.replay_buffer.reset()
        with seeded_globals(self.generator, algorithm), _fixed_progress(algorithm, self._current_progress_remaining):
            before = algorithm.num_timesteps
            stop = _StopCallback(self.should_continue)
            algorithm.learn(steps, callback=stop, log_interval=1, reset_num_timesteps=before == 0)
        self.imagined_steps += algorithm.num_timesteps - before
        self.visits += not stop.ended
        self.policy.set_training_mode(False)
        return not stop.ended

    # Saving ---------------------------------------------------------------------------------------------------------

    @property
    def optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        if self.is_fixed:
            return super().optimizers_by_name
        names, _ = self.algorithm._get_torch_save_params()
        own = {name: _get_by_path(self.algorithm, name) for name in names if name != "policy"}
        return {**super().optimizers_by_name, **{name: x for name, x in own.items() if isinstance(x, torch.optim.Optimizer)}}

    @property
    def _variables(self) -> dict[str, Tensor]:
        """Tensors that the algorithm learns besides its networks, such as SAC's entropy coefficient."""
        return {name: _get_by_path(self.algorithm, name) for name in self.algorithm._get_torch_save_params()[1]}

    def content(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        arrays, state = super().content()
        arrays["optim"] |= {f"variable/{name}": x.detach().cpu().numpy() for name, x in self._variables.items()}
        return arrays, state

    def _behaviour_state(self) -> dict[str, Any]:
        given = self._algorithm_class is not None or bool(self._algo_kwargs)
        counts = {"steps": self.algorithm.num_timesteps, "updates": self.algorithm._n_updates}
        counts |= {"since_visit": self._since_visit, "imagined": self.imagined_steps, "visits": self.visits}
        counts |= {name: getattr(self.algorithm, name) for name in DQN_COUNTERS if hasattr(self.algorithm, name)}
        return {**counts, "given": given, "file": self._digest}

    def restore(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any], *, counters: bool = True) -> None:
        super().restore(arrays, state, counters=counters)
        for name, x in self._variables.items():
            x.data.copy_(torch.from_numpy(np.array(arrays["optim"][f"variable/{name}"])))

    def _restore_behaviour(self, state: Mapping[str, Any]) -> None:
        if state["file"] != self._digest:
            raise ConfigError(
                f"'{self.config.agent.path}' is another file than the one that this run began with. Bring that one back."
            )
        if state["given"] and self._algorithm_class is None and not self._algo_kwargs:
            raise ConfigError(
                "This agent was made with an algorithm or algo_kwargs that no file holds. Expected them again: "
                "SB3Agent.load(path, algorithm=..., algo_kwargs=...)."
            )
        for name in DQN_COUNTERS & state.keys():
            setattr(self.algorithm, name, state[name])
        self.visits = state["visits"]
        self.algorithm.num_timesteps, self.algorithm._n_updates = state["steps"], state["updates"]
        self._since_visit, self.imagined_steps = state["since_visit"], state["imagined"]


def _fits(real: gym.Space, trained: gym.Space) -> bool:
    """Whether a policy that SB3 trained on one space takes observations of another: it has its images transposed."""
    if isinstance(real, gym.spaces.Dict) and isinstance(trained, gym.spaces.Dict):
        return real.keys() == trained.keys() and all(_fits(real[name], trained[name]) for name in real)
    transposed = is_image_space(real) and not is_image_space_channels_first(real)
    return real == trained or (transposed and VecTransposeImage.transpose_space(real) == trained)


@contextmanager
def _fixed_progress(algorithm: BaseAlgorithm, remaining: float) -> Iterator[None]:
    """SB3 would count the progress of its schedules within each learn(): in here it stands at `remaining`."""
    algorithm._update_current_progress_remaining = lambda done, total: setattr(algorithm, "_current_progress_remaining", remaining)
    try:
        yield
    finally:
        del algorithm._update_current_progress_remaining


def _get_by_path(root: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        root = getattr(root, name)
    return root
