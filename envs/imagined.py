"""The world model as environments: N imagined worlds that step together in torch, and three interfaces to them.

| class | interface | resets |
|---|---|---|
| `ImaginedWorld` | tensors [N, ...] | the worlds that its caller names |
| `ImaginedVecEnv` | SB3's VecEnv | ended worlds, in the same step |
| `ImaginedVectorEnv` | Gymnasium's VectorEnv | ended worlds, in the same step (SAME_STEP), or by `autoreset_mode` |
| `ImaginedEnv` | Gymnasium's Env, one world | its caller does |

An episode is truncated after `horizon` steps. At each step it continues with the probability that the continue head gives,
else it terminates, so that returns have the expectation that the model predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from worldmodel.data import Sampling, State
from worldmodel.envs.draw import Viewer
from worldmodel.envs.vectors.plain import plain_action, plain_obs
from worldmodel.errors import ConfigError, NumericsError, require_choice, require_whole
from worldmodel.learner import reuse_memory
from worldmodel.model import WorldModel, needs_ensemble, needs_marginal, reward_penalty
from worldmodel.spaces import ObsSpec
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

Start = Literal["replay", "prior"]
ObservationKind = Literal["latent", "decoded"]
Source = WorldModel | Run | str | Path


def learned_world(source: Source) -> tuple[WorldModel, Run | None]:
    """(world model in eval mode, its run) of a run, a run folder or a model. Raises ConfigError, StorageError."""
    if isinstance(source, WorldModel):
        return source.eval(), None
    if not isinstance(source, Run | str | Path):
        raise ConfigError(f"Expected a Run, a run folder or a WorldModel; got {type(source).__name__}.")
    run = source if isinstance(source, Run) else Run.open(source)
    return run.world_model(), run


def latent_space(world: WorldModel) -> spaces.Box:
    """The space of features: float32 [F], without bounds."""
    return spaces.Box(-np.inf, np.inf, (world.feature_dim,), np.float32)


class ReplayStarts:
    """States [N, ...] at which episodes begin: the filter's, at recorded rows that are not terminal.

    `windows` windows of the replay are filtered at once; their states are a pool, from which starts are drawn uniformly, each
    `reuse` times on average, before the next windows are filtered. A row is in the pool if its window holds its episode's
    first row, or at least a quarter of the window before it.
    """

    windows, length, reuse = 64, 32, 4

    def __init__(self, world: WorldModel, replay: Replay):
        if not len(replay):
            raise ConfigError("start='replay' needs experience, but the replay is empty. Collect some first, or use start='prior'.")
        holds, needs = (replay.obs_spec, replay.action_dim), (world.obs.store, world.action.dim)
        if holds != needs:
            raise ConfigError(
                f"The replay is of another environment: its observations and actions are {holds}; the world model expects {needs}. "
                "Pass the experience that the model was trained on, or other of the same spaces."
            )
        self.world, self.replay = world, replay
        self.pool: State | None = None
        self.draws_left = 0

    def draw(self, count: int, generator: torch.Generator) -> State:
        if self.pool is None or self.draws_left <= 0:
            self.pool = self._filter(generator)
            self.draws_left = self.reuse * self.pool.batch_size
        self.draws_left -= count
        rows = torch.randint(self.pool.batch_size, (count,), generator=generator, device=generator.device)
        return self.pool.index(rows)

    def _filter(self, generator: torch.Generator) -> State:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        length = min(self.length, max(self.replay.lengths))
        batch = self.replay.sample(self.windows, length, np.random.default_rng(seed)).to(self.world.device)
        trace = self.world.trace(batch.with_obs(self.world.preprocess(batch.obs)), None, Sampling(generator=generator))
        episode_started = batch.is_first.cumsum(1) > 0
        known = episode_started | (torch.arange(length, device=episode_started.device) >= length // 4)
        rows = known & ~batch.is_terminal
        if not rows.any():
            raise ConfigError("start='replay': the world ended at every row of the replay. Collect more, or use start='prior'.")
        return trace.states.index(rows)  # [N, ...]


class StepResult(NamedTuple):
    """One step of N worlds: the new features, the rewards of the step, and which episodes end with it."""

    feature: Float[Tensor, "N F"]
    reward: Float[Tensor, " N"]
    terminated: Bool[Tensor, " N"]
    truncated: Bool[Tensor, " N"]


class ImaginedWorld:
    """N imagined worlds, stepped as one batch with a random generator of their own.

    source       a run, a run folder, or a WorldModel on the device to use (with start="replay" it needs `replay`)
    horizon      steps after which an episode is truncated
    start        "replay": filtered states of recorded rows; "prior": the initial prior
    observation  "latent": the feature, float32 [F]; "decoded": the expected observation, in the environment's own space
    seed         of the generator; None: a random one
    replay       recorded experience, instead of the run's
    uncertainty_penalty  subtracted from each reward, in units of the rewards' scale, per unit of the ensemble's disagreement;
                         below 0: a bonus for exploration
    max_uncertainty      an episode is truncated where the ensemble's disagreement is larger; None: nowhere
    typicality_penalty   subtracted from each reward, in units of the rewards' scale, per nat and dimension of the latent by
                         which it is less likely than latents of real observations are
    plain        spaces count from 0 and have one dimension, as SB3's own algorithms need them (see plain.py)

    Actions of `step` are canonical tensors; `encode` converts those of `action_space`. Raises ConfigError.
    """

    def __init__(
        self,
        source: Source,
        num_envs: int,
        horizon: int = 15,
        *,
        start: Start = "replay",
        observation: ObservationKind = "latent",
        seed: int | None = None,
        replay: Replay | None = None,
        uncertainty_penalty: float = 0.0,
        max_uncertainty: float | None = None,
        typicality_penalty: float = 0.0,
        plain: bool = False,
    ):
        require_whole(num_envs=num_envs, horizon=horizon)
        require_choice("start", start, get_args(Start))
        require_choice("observation", observation, get_args(ObservationKind))
        if max_uncertainty is not None and not max_uncertainty > 0:
            raise ConfigError(f"max_uncertainty is {max_uncertainty!r}; expected a number above 0, or None: nowhere.")
        self.world, run = learned_world(source)
        needs_ensemble(self.world, "uncertainty_penalty", uncertainty_penalty)
        needs_ensemble(self.world, "max_uncertainty", max_uncertainty)
        needs_marginal(self.world, "typicality_penalty", typicality_penalty)
        self.penalties, self.max_uncertainty = (uncertainty_penalty, typicality_penalty), max_uncertainty
        if start == "replay" and replay is None:
            if run is None:
                raise ConfigError(
                    "start='replay' needs experience, and a WorldModel alone holds none. Pass the run instead, or "
                    "replay=run.replay(), or use start='prior'."
                )
            replay = run.replay()
        self.num_envs, self.horizon = int(num_envs), int(horizon)
        env_id, names = ("", None) if run is None else (run.config.env.id, run.config.env.names)
        self.viewer = Viewer(env_id, self.world.obs, names)
        if run is not None and run.config.train.reuse_memory:
            reuse_memory()
        self.action = plain_action(self.world.action) if plain else self.world.action
        self.obs = None if observation == "latent" else plain_obs(self.world.obs) if plain else self.world.obs
        self.action_space = self.action.space
        self.observation_space = latent_space(self.world) if self.obs is None else self.obs.space
        self._replay = replay if start == "replay" else None
        self.device = self.world.device
        self.generator = torch.Generator(device=self.device)
        self.state = self.world.initial(self.num_envs)
        self.age = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.seed(int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed)

    def seed(self, seed: int | None) -> None:
        """Seeds the generator (None: leaves it as it is). Starts are filtered anew, with the current weights and replay."""
        if seed is not None:
            self.generator.manual_seed(int(seed))
        self._starts = None if self._replay is None else ReplayStarts(self.world, self._replay)

    @torch.no_grad()
    def reset(self, rows: Tensor | None = None) -> Float[Tensor, "n F"]:
        """Begins new episodes in the worlds with these indices (None: in all); their features."""
        rows = torch.arange(self.num_envs, device=self.device) if rows is None else rows
        if self._starts is None:
            fresh = self.world.dynamics.sample_initial(len(rows), Sampling(generator=self.generator))
        else:
            fresh = self._starts.draw(len(rows), self.generator)
        self.state = State({name: x.index_copy(0, rows, fresh[name]) for name, x in self.state.items()})
        self.age = self.age.index_fill(0, rows, 0)
        return self.world.dynamics.feature(fresh)

    @torch.no_grad()
    def step(self, action: Float[Tensor, "N A"]) -> StepResult:
        """One step of all worlds, those whose episodes have ended included. Raises NumericsError."""
        dream = self.world.imagine(self.state, lambda feature, step: action, 1, Sampling(generator=self.generator))
        self.state, self.age = dream.last, self.age + 1
        reward, cont = dream.reward[:, 0], dream.cont[:, 0]
        if not torch.isfinite(reward.sum() + cont.sum()):
            raise NumericsError(
                "An imagined reward or end is not finite; expected finite numbers. The world model is broken: open an earlier "
                "checkpoint, run.world_model(step)."
            )
        u = torch.rand(self.num_envs, generator=self.generator, device=self.device)
        terminated, truncated = u >= cont, self.age >= self.horizon
        if self.max_uncertainty is not None:
            truncated = truncated | (dream.uncertainty[:, 0] > self.max_uncertainty)
        reward = reward - self.world.heads.scale.value * reward_penalty(self.world, dream, *self.penalties)[:, 0]
        return StepResult(dream.feature[:, 1], reward, terminated, truncated & ~terminated)

    # As arrays ------------------------------------------------------------------------------------------------------

    def encode(self, actions: np.ndarray) -> Float[Tensor, "N A"]:
        """Actions of `action_space` [N, ...] -> canonical actions. Raises ValueError for others."""
        return torch.from_numpy(self.action.encode(actions)).to(self.device)

    def action_masks(self) -> Bool[np.ndarray, "N A"]:
        """Which actions the model expects to be legal now; only where it learned with masks."""
        return self.world.legal(self.world.dynamics.feature(self.state)).cpu().numpy()

    def to_observations(self, feature: Float[Tensor, "n F"]) -> Any:
        """The observations [n, ...] of features, as new arrays in `observation_space` (a dict where that is a Dict)."""
        return to_observations(self.world, feature, self.obs)

    def advance(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any]:
        """One step with automatic resets: (obs [N, ...], reward, terminated, truncated, ended, last).

        ended  [n], indices of the worlds whose episodes ended, which have the next episode's first observation in `obs`
        last   [n, ...], the last observations of those episodes
        """
        step_result = self.step(self.encode(actions))
        obs, reward = self.to_observations(step_result.feature), step_result.reward.cpu().numpy()
        terminated, truncated = step_result.terminated.cpu().numpy(), step_result.truncated.cpu().numpy()
        ended = np.flatnonzero(terminated | truncated)
        last = part(obs, ended)
        self.begin(ended, obs)
        return obs, reward, terminated, truncated, ended, last

    def begin(self, rows: np.ndarray, obs: Any) -> None:
        """New episodes in the worlds with these indices [n]; their first observations are written into `obs` [N, ...]."""
        if not len(rows):
            return
        fresh = self.to_observations(self.reset(torch.from_numpy(rows).to(self.device)))
        for into, first in [(obs[name], fresh[name]) for name in obs] if isinstance(obs, dict) else [(obs, fresh)]:
            into[rows] = first

    @property
    def render_modes(self) -> list[str]:
        """`rgb_array` where decoded observations can be drawn."""
        return ["rgb_array"] if self.viewer.can_draw and self.world.decoder is not None else []

    def check_render_mode(self, mode: str | None) -> None:
        """Raises ConfigError for a mode that is not among `render_modes`."""
        if mode is not None and mode not in self.render_modes:
            raise ConfigError(
                f"render_mode is {mode!r}; expected one of {[None, *self.render_modes]}. `rgb_array` needs an image among what "
                "the model decodes to, or a run of an environment that envs.draw knows."
            )

    def frames(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3] of the decoded observations. Raises ConfigError where they cannot be drawn."""
        state = self.state if rows is None else self.state.index(torch.as_tensor(list(rows), device=self.device))
        frames = self.viewer.frames(self.world.decode(self.world.dynamics.feature(state)))
        if frames is None:
            raise ConfigError(
                f"There is no way to draw {self.world.obs.space}; expected an image among the observations, or a run of an "
                "environment that envs.draw knows. Train on pictures (env.pixels=64), or do not render."
            )
        return frames


def to_observations(world: WorldModel, feature: Float[Tensor, "n F"], spec: ObsSpec | None) -> Any:
    """Features as observations in new arrays: themselves, or decoded into the space of a spec."""
    return feature.cpu().numpy() if spec is None else spec.to_env(spec.raw(world.decode(feature)))


def part(obs: Any, rows: Any) -> Any:
    """`rows` of batched observations: indices; one number, for an observation without batch axis; None, to add such an axis."""
    return {name: np.asarray(x)[rows] for name, x in obs.items()} if isinstance(obs, Mapping) else np.asarray(obs)[rows]


class ImaginedVecEnv(VecEnv):
    """N imagined worlds as an SB3 VecEnv, in which unmodified SB3 algorithms train.

    run_or_model  a Run, a run folder, or a WorldModel (on the device to use)
    num_envs      worlds; some hundreds are fastest per world
    horizon       steps after which an episode is truncated: `TimeLimit.truncated` is set, and algorithms bootstrap
    options       those of ImaginedWorld: start, observation, seed, replay, uncertainty_penalty, max_uncertainty, typicality_penalty

    Categories in observations and actions count from 0, as SB3's algorithms need them. Observations are new arrays, for SB3 writes
    into some of them. `seed()` takes effect at the next reset. `render` and `get_images` draw the decoded observations.
    Raises ConfigError.
    """

    def __init__(self, run_or_model: Source, num_envs: int, horizon: int = 15, **options: Any):
        self.worlds = ImaginedWorld(run_or_model, num_envs, horizon, plain=True, **options)
        self.rows = [ImaginedSubEnv(self.worlds, i) for i in range(num_envs)]
        super().__init__(num_envs, self.worlds.observation_space, self.worlds.action_space)

    def reset(self) -> Any:
        self.worlds.seed(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return self.worlds.to_observations(self.worlds.reset())

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, reward, terminated, truncated, ended, last = self.worlds.advance(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i, row in enumerate(ended.tolist()):
            infos[row] = {"terminal_observation": part(last, i), "TimeLimit.truncated": bool(truncated[row])}
        return obs, reward, terminated | truncated, infos

    def close(self) -> None:
        """Nothing to free."""

    def get_images(self) -> list[np.ndarray]:
        return list(self.worlds.frames())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.rows[i], attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        for i in self._get_indices(indices):
            setattr(self.rows[i], attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        return [getattr(self.rows[i], method_name)(*method_args, **method_kwargs) for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class ImaginedSubEnv:
    """One of several imagined worlds for `get_attr` and `env_method`; it has no step, since worlds step together."""

    spec = None

    def __init__(self, worlds: ImaginedWorld, index: int):
        self.worlds, self.index, self.horizon = worlds, index, worlds.horizon
        self.observation_space, self.action_space = worlds.observation_space, worlds.action_space
        self.render_mode = next(iter(worlds.render_modes), None)
        if worlds.world.is_masked:  # sb3-contrib asks whether the method is there
            self.action_masks = lambda: worlds.action_masks()[index]

    def render(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self.worlds.frames([self.index])[0]


class ImaginedEnv(gym.Env):
    """One imagined world as a Gymnasium environment: `gym.make("worldmodel.envs:Imagined-v0", run="runs/demo")`.

    The options are those of ImaginedWorld, `run` its source. render_mode "rgb_array": the decoded observation, where it can be
    drawn. Raises ConfigError.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, run: Source, horizon: int = 15, *, render_mode: str | None = None, **options: Any):
        self.worlds = ImaginedWorld(run, 1, horizon, **options)
        self.observation_space, self.action_space = self.worlds.observation_space, self.worlds.action_space
        self.worlds.check_render_mode(render_mode)
        self.render_mode, self.metadata = render_mode, {**self.metadata, "render_modes": self.worlds.render_modes}
        if self.worlds.world.is_masked:
            self.action_masks = lambda: self.worlds.action_masks()[0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.worlds.seed(seed)
        return part(self.worlds.to_observations(self.worlds.reset()), 0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step_result = self.worlds.step(self.worlds.encode(np.asarray(action)[None]))
        obs = part(self.worlds.to_observations(step_result.feature), 0)
        return obs, float(step_result.reward), bool(step_result.terminated), bool(step_result.truncated), {}

    def render(self) -> np.ndarray | None:
        return self.worlds.frames()[0] if self.render_mode == "rgb_array" else None


class ImaginedVectorEnv(gym.vector.VectorEnv):
    """N imagined worlds as a Gymnasium vector environment: `gym.make_vec("worldmodel.envs:Imagined-v0", 64, run="runs/demo")`.

    The options are those of ImaginedEnv, and
    max_episode_steps  a horizon, where it is the shorter one
    autoreset_mode     when ended worlds are reset. SAME_STEP: at once, `final_obs` in the infos is the last observation.
                       NEXT_STEP: in the next step, which ignores their action and has reward 0; some of Gymnasium's
                       wrappers, such as NormalizeObservation, need it. DISABLED: by the caller

    `reset(options={"reset_mask": rows})` resets some worlds alone. Raises ConfigError.
    """

    supports_reset_mask = True
    """`reset` knows `reset_mask` (see adapter.py)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        run: Source,
        num_envs: int = 1,
        horizon: int = 15,
        *,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **options: Any,
    ):
        if not isinstance(autoreset_mode, AutoresetMode):
            require_choice("autoreset_mode", autoreset_mode, [mode.value for mode in AutoresetMode])
        horizon = horizon if max_episode_steps is None else min(horizon, max_episode_steps)
        self.worlds = ImaginedWorld(run, num_envs, horizon, **options)
        self.worlds.check_render_mode(render_mode)
        self.mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.mode, "render_modes": self.worlds.render_modes}
        self.num_envs, self.render_mode, self._ended = num_envs, render_mode, np.zeros(num_envs, bool)
        self.single_observation_space, self.single_action_space = self.worlds.observation_space, self.worlds.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if not isinstance(seed, int | np.integer | None):
            raise ConfigError(f"seed is {seed!r}; expected one number: all worlds draw from one generator.")
        mask = (options or {}).get("reset_mask")
        if mask is not None and (np.shape(mask) != (self.num_envs,) or np.asarray(mask).dtype != bool or not np.any(mask)):
            raise ConfigError(f"options['reset_mask'] is {mask!r}; expected {self.num_envs} flags, at least one of them True.")
        super().reset(seed=seed)
        if mask is None:
            self._ended[:] = False
            self.worlds.seed(seed)
            return self.worlds.to_observations(self.worlds.reset()), {}
        if seed is not None:
            self.worlds.seed(seed)
        self.worlds.reset(torch.from_numpy(np.flatnonzero(mask)).to(self.worlds.device))
        self._ended[mask] = False
        return self.worlds.to_observations(self.worlds.world.dynamics.feature(self.worlds.state)), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self.mode is not AutoresetMode.SAME_STEP:
            return self._step_without_reset(actions)
        obs, reward, terminated, truncated, ended, last = self.worlds.advance(actions)
        infos: dict[str, Any] = {}
        if len(ended):
            final, mask = np.full(self.num_envs, None, object), np.zeros(self.num_envs, bool)
            for i, row in enumerate(ended.tolist()):
                final[row] = part(last, i)
            mask[ended] = True
            infos = {"final_obs": final, "_final_obs": mask, "final_info": {}, "_final_info": mask.copy()}
        return obs, reward, terminated, truncated, infos

    def _step_without_reset(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of NEXT_STEP or DISABLED: episodes that end in it are not reset in it."""
        to_reset = self._ended.copy()
        if to_reset.any() and self.mode is AutoresetMode.DISABLED:
            raise ConfigError(
                f"The worlds {np.flatnonzero(to_reset).tolist()} have ended, and autoreset_mode is DISABLED. Begin them anew "
                "before the next step: reset(options={'reset_mask': terminated | truncated})."
            )
        step_result = self.worlds.step(self.worlds.encode(actions))
        obs, reward = self.worlds.to_observations(step_result.feature), step_result.reward.cpu().numpy()
        terminated, truncated = step_result.terminated.cpu().numpy(), step_result.truncated.cpu().numpy()
        self.worlds.begin(np.flatnonzero(to_reset), obs)
        reward[to_reset], terminated[to_reset], truncated[to_reset] = 0, False, False
        self._ended = terminated | truncated
        return obs, reward, terminated, truncated, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        return tuple(self.worlds.frames()) if self.render_mode == "rgb_array" else None
