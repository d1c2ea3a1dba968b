"""`SB3Agent`: an unmodified Stable-Baselines3 algorithm as an agent (`worldmodel train RECIPE agent=sb3 agent.algo=sac`).

Its policy collects real experience, the world model learns from it, and every `agent.every` real steps the algorithm's own
`learn()` runs in an ImaginedVecEnv of the current model: one training in the dream. `train_in_dream` (dream_training.py) is the
same in one call. With `agent.path` a policy that SB3 has saved collects and acts, on the environment's own observations, and the
world model alone learns.
"""

from __future__ import annotations

import hashlib
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
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor

from worldmodel.agents.belief import Controller
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.sb3.algorithms import algorithm_class, make_algorithm, open_algorithm, seeded_globals
from worldmodel.agents.sb3.preprocessing import transposed_space
from worldmodel.config import Frozen, Options
from worldmodel.data import State
from worldmodel.envs.imagined import ImaginedVecEnv, to_observations
from worldmodel.envs.vectors.plain import plain_action, plain_obs, plain_raw
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.registry import register
from worldmodel.storage.replay import Replay

DQN_COUNTERS = {"exploration_rate", "_n_calls"}
"""What DQN and its like count besides their steps."""


class SB3Config(Frozen):
    """An algorithm, and how it trains in the dream."""

    kind: Literal["sb3"] = "sb3"
    algo: Literal["ppo", "a2c", "dqn", "sac", "td3", "recurrent_ppo", "tqc", "qrdqn"] = Field("ppo", description="the algorithm")
    path: str | None = Field(
        None, description="a zip that the algorithm's save() wrote (needs --trust): it collects and acts, and is not trained"
    )
    options: Options = Field({}, description="keyword arguments of its constructor; defaults are those that suit the dream")
    every: int = Field(25, ge=1, description="real steps between trainings in the dream")
    visits: int | None = Field(None, ge=1, description="most trainings in the dream; null: to the end of the run")
    imagined: int = Field(4096, ge=1, description="imagined steps of each training, over all worlds")
    worlds: int = Field(64, ge=1, description="imagined worlds that step together")
    horizon: int = Field(15, ge=1, description="imagined steps after which an episode is truncated")
    start: Literal["replay", "prior"] = Field("replay", description="imagine from recorded rows, or from the initial distribution")
    observation: Literal["latent", "decoded"] = Field(
        "latent", description="the policy's observations: features, or expected observations"
    )
    noise: float = Field(0.0, ge=0, description="deviation of normal noise on real continuous actions, which are in [-1, 1]")
    uncertainty_penalty: float = Field(
        0.0, description="taken off each imagined reward, in units of the rewards' own size, per unit of the ensemble's uncertainty"
    )
    max_uncertainty: float | None = Field(None, gt=0, description="imagined episodes are truncated beyond this uncertainty")


class SB3Controller(Controller):
    """Acts by an SB3 policy.

    observes  "latent": the feature of the world model's state; "decoded": the decoded feature; "real": the observation itself,
              "decoded" in dreams
    noise     deviation of normal noise on continuous actions that are not deterministic
    """

    def __init__(self, algorithm: BaseAlgorithm, observes: str, noise: float = 0.0):
        super().__init__()
        self.algorithm, self.policy = algorithm, algorithm.policy
        self.observes, self.noise = observes, noise
        self.lstm = getattr(self.policy, "lstm_hidden_state_shape", None)

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
        if self.observes == "real" and rows is not None:
            obs = world.obs.to_env(plain_raw(world.obs, rows))
        else:
            obs = to_observations(world, world.dynamics.feature(state), None if self.observes == "latent" else plain_obs(world.obs))
        lstm_state, first = None, None
        if self.lstm is not None:
            lstm_state = tuple(memory[name].transpose(0, 1).contiguous().cpu().numpy() for name in ("lstm_h", "lstm_c"))
            first = ~memory["started"].cpu().numpy()
        with seeded_globals(generator, self.algorithm):
            action, lstm_state = self.algorithm.predict(obs, lstm_state, first, deterministic)
        if self.lstm is not None:
            h, c = (torch.as_tensor(x, device=world.device).transpose(0, 1).contiguous() for x in lstm_state)
            memory = State({"lstm_h": h, "lstm_c": c, "started": torch.ones_like(memory["started"])})
        action = torch.as_tensor(plain_action(world.action).encode(action), device=world.device)
        if self.noise and not deterministic and world.action.kind == "continuous":
            action = action + self.noise * torch.randn(action.shape, generator=generator, device=action.device)
        return action, memory


class _StopCallback(BaseCallback):
    """Ends a training in the dream where `should_continue` says no."""

    def __init__(self, should_continue: Callable[[], bool]):
        super().__init__()
        self.should_continue, self.stopped = should_continue, False

    def _on_step(self) -> bool:
        self.stopped = not self.should_continue()
        return not self.stopped


class _ForwardingLogger(Logger):
    """The logger of the algorithm in the dream: its entries are averaged into the run's own log, as train/ and dream/."""

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
    """An SB3 algorithm that is trained in the dream alone, while its policy collects the world model's experience.

    With `agent.path` the policy of that file collects from the first step on, and is not trained.

    algorithm, algo_kwargs  a class and arguments that no config can hold (policy_kwargs with classes, schedules); without them,
                            those of the config

    Off-policy algorithms on latents begin each training with an empty buffer: features of an older world model are not
    comparable. On decoded observations the buffer is kept, except at a fence or a resume: checkpoints do not hold it.
    """

    kind: ClassVar[str] = "sb3"
    improves = False  # not with each update: in its trainings in the dream

    def __init__(self, *args: Any, algorithm: type[BaseAlgorithm] | None = None, algo_kwargs: dict | None = None, **kwargs: Any):
        self._algorithm_class, self._algo_kwargs = algorithm, algo_kwargs
        self._steps_since_dream = self.dreams = self.imagined_steps = 0
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
        """Whether the policy comes from a file, and is not trained."""
        return self.config.agent.path is not None

    @property
    def prefill_rows(self) -> int:
        """None of a trained policy, which collects from the first step on."""
        return 0 if self.is_fixed else super().prefill_rows

    def _dream(self, world: WorldModel, replay: Replay | None) -> VecMonitor:
        """The imagined worlds; without a replay for their spaces alone."""
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
        """The world model's updates, and a training in the dream where one is due."""
        self._steps_since_dream += 0 if self.is_fixed else steps
        super().update_for_steps(steps)

    @property
    def _dream_is_due(self) -> bool:
        every, at_most = self.config.agent.every, self.config.agent.visits
        return not self.is_fixed and self._steps_since_dream >= every and (at_most is None or self.dreams < at_most)

    @property
    def has_pending_updates(self) -> bool:
        return super().has_pending_updates or (self._is_ready and self._dream_is_due)

    def run_updates(self) -> bool:
        if not super().run_updates():
            return False
        while self._dream_is_due:
            if not (self.should_continue() and self.train_in_dream(self.config.agent.imagined)):
                return False
            self._steps_since_dream -= self.config.agent.every
        return True

    def restart_episodes(self, seed: int) -> None:
        super().restart_episodes(seed)
        if isinstance(self.algorithm, OffPolicyAlgorithm) and not self.is_fixed:
            self.algorithm.replay_buffer.reset()

    def train_in_dream(self, steps: int) -> bool:
        """The algorithm's own learn() for so many imagined steps, in new worlds of the current model.

        Its schedules follow the progress of this agent's learn(). False where `should_continue` ended it: it stays pending.
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
        self.dreams += not stop.stopped
        self.policy.set_training_mode(False)
        return not stop.stopped

    # Saving ---------------------------------------------------------------------------------------------------------

    @property
    def optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        if self.is_fixed:
            return super().optimizers_by_name
        names, _ = self.algorithm._get_torch_save_params()
        own = {name: recursive_getattr(self.algorithm, name) for name in names if name != "policy"}
        return {**super().optimizers_by_name, **{name: x for name, x in own.items() if isinstance(x, torch.optim.Optimizer)}}

    @property
    def _variables(self) -> dict[str, Tensor]:
        """Tensors that the algorithm learns besides its networks, such as SAC's entropy coefficient."""
        return {name: recursive_getattr(self.algorithm, name) for name in self.algorithm._get_torch_save_params()[1]}

    def content(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        arrays, state = super().content()
        arrays["optim"] |= {f"variable/{name}": x.detach().cpu().numpy() for name, x in self._variables.items()}
        return arrays, state

    def _behaviour_state(self) -> dict[str, Any]:
        given = self._algorithm_class is not None or bool(self._algo_kwargs)
        counts = {"steps": self.algorithm.num_timesteps, "updates": self.algorithm._n_updates}
        counts |= {"since_visit": self._steps_since_dream, "imagined": self.imagined_steps, "visits": self.dreams}
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
        self.algorithm.num_timesteps, self.algorithm._n_updates = state["steps"], state["updates"]
        self._steps_since_dream, self.imagined_steps, self.dreams = state["since_visit"], state["imagined"], state["visits"]


def _fits(real: gym.Space, trained: gym.Space) -> bool:
    """Whether a policy that SB3 trained on one space takes observations of another: SB3 transposes images."""
    if isinstance(real, gym.spaces.Dict) and isinstance(trained, gym.spaces.Dict):
        return real.keys() == trained.keys() and all(_fits(real[name], trained[name]) for name in real)
    return trained in (real, transposed_space(real))


@contextmanager
def _fixed_progress(algorithm: BaseAlgorithm, remaining: float) -> Iterator[None]:
    """SB3 counts the progress of its schedules within each learn(); inside this context it stays at `remaining`."""
    algorithm._update_current_progress_remaining = lambda done, total: setattr(algorithm, "_current_progress_remaining", remaining)
    try:
        yield
    finally:
        del algorithm._update_current_progress_remaining
