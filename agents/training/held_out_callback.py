"""`HeldOutCallback`: the world model's predictions on episodes that it never learns from, in TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat
from torch import Tensor

from worldmodel.agents.evaluation import EvaluationAborted
from worldmodel.agents.held_out import HELD_OUT_SEED, collect
from worldmodel.agents.rollouts import Figures, error_figure, figures, returns, rollout_video
from worldmodel.config import changed
from worldmodel.diagnostics.geometry import FilteredStates, filter_episodes, interpolation, traversal, usage
from worldmodel.envs.draw import Viewer
from worldmodel.envs.make import EnvConfig
from worldmodel.errors import ConfigError, StorageError, require_whole
from worldmodel.view import pictures, tensorboard

HORIZONS = (1, 2, 3, 5, 10, 15, 30, 50)
"""Horizons whose errors are scalars, as far as they are measured."""
VIDEO_STEPS, PROJECTOR_POINTS, TRAVERSED_VARIABLES = 40, 300, 8
"""Steps of the video, points of the projector, variables of the latent that are traversed."""
MAX_VARIABLES = 1024
"""Variables of a latent above which it is an image of the world: it is not traversed, and not in the projector."""
_log = logging.getLogger(__name__)


class HeldOutCallback(BaseCallback):
    """Every `every` real steps, and at the end of training: new episodes, and the world model's predictions on them.

    every     real steps between evaluations, which begin with the first update of the world model
    env       the environment to play them in; default: the one of the model's config
    episodes  held-out episodes of each evaluation, played greedily with a random action in five steps
    steps     of each episode at most; None: as in evaluations (eval.max_steps), at most 1000
    context   rows that the model observes before its open-loop predictions
    horizon   steps over which errors are measured
    should_abort  asked at every step of an episode; the evaluation is left out as soon as it is true

    | tag | what |
    |---|---|
    | world/open_loop/H, world/persistence/H | root mean square error H steps ahead, and that of persistence, in deviations |
    | world/ratio/H, world/ratio_by_part/PART | the first over the second; the same at the longest horizon by part of the episode |
    | world/open_loop_reward/H, world/open_loop_continue/H | root mean square error in reward units; Brier score |
    | world/uncertainty/H | disagreement of the ensemble H steps ahead, where the model has one |
    | world/open_loop_curve | the same by horizon and number |
    | dream/coverage50/H, dream/coverage90/H | share of observations within the central intervals of 50 and 90 % of what is drawn |
    | dream/spread_skill/H, dream/spread_knows/H | spread over error: 1; does the spread know the error: 1 if so, 0 if not |
    | dream/crps/H | fair score of the draws, in deviations: lower is better |
    | dream/reward_gap/H | imagined minus real reward H steps ahead under the greedy policy, played without random actions |
    | dream/video, dream/signals | animated: real, imagined and error; every number over time with its spread |
    | dream/imagined_return, dream/real_return, dream/gap | the first 100 steps of those episodes, imagined and real |
    | latent/usage, latent/traversal, latent/interpolation | rates of the latent's variables, and what they decode to |

    The projector shows the latents of these episodes, with reward, step and value. No random state, statistic or weight of the
    training changes. Raises ConfigError where the logger writes no TensorBoard files.
    """

    def __init__(
        self,
        every: int = 500,
        env: EnvConfig | str | None = None,
        *,
        episodes: int = 8,
        steps: int | None = None,
        context: int = 5,
        horizon: int = 15,
        should_abort: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        whole = {"every": every, "episodes": episodes, "steps": 1 if steps is None else steps}
        require_whole("HeldOutCallback: ", **whole, context=context, horizon=horizon)
        self.every, self.env, self.episodes, self.steps = every, env, episodes, steps
        self.context, self.horizon, self.should_abort = context, horizon, should_abort
        self.evaluated_at: int | None = None

    def _init_callback(self) -> None:
        env = self.env if self.env is not None else self.model.config.env
        if self.env is None and env.id == "custom":
            raise ConfigError(
                "HeldOutCallback plays in environments of its own, but the model was given one without an id. Pass "
                "HeldOutCallback(env='ID'), or an EnvConfig."
            )
        self.env = EnvConfig(id=env) if isinstance(env, str) else env

    def _on_training_start(self) -> None:
        self.writer  # noqa: B018 (raises here rather than hours later)
        if self.evaluated_at is None:
            self._log_config()

    def _on_step(self) -> bool:
        step = self.model.num_timesteps
        if step // self.every > (step - self.model.n_envs) // self.every:
            self.show()
        return True

    def _on_training_end(self) -> None:
        self.show()

    @property
    def writer(self) -> Any:
        """The SummaryWriter behind SB3's logger."""
        for output in self.model.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                return output.writer
        raise ConfigError(
            "HeldOutCallback writes into TensorBoard files, but the model logs none. Make it with tensorboard_log='FOLDER', or "
            "leave the callback out."
        )

    def show(self) -> None:
        """One evaluation now, unless there was one at this step or no update yet."""
        step = self.model.num_timesteps
        if self.evaluated_at == step or self.model.learner.updates == 0:
            return
        generator = torch.Generator(self.model.device).manual_seed(HELD_OUT_SEED)
        try:
            steps = self.model.config.eval.max_steps if self.steps is None else self.steps
            played = {"steps": steps, "should_abort": self.should_abort}
            episodes = collect(self.model, self.env, self.episodes, **played)
            found = figures(self.model, self.env, episodes, self.context, self.horizon, generator, **played)
        except EvaluationAborted:
            return
        self.evaluated_at = step
        world = self.model.policy.world
        viewer = Viewer(self.env.id, self.model.obs_spec, self.model.config.env.names)
        self._log_errors(found, viewer, step)
        rollout = rollout_video(world, viewer, episodes, self.context, VIDEO_STEPS, generator)
        for name, frames in (("video", rollout.video), ("signals", rollout.signals)):
            if frames is not None:
                tensorboard.image(self.writer, f"dream/{name}", pictures.gif(frames, fps=10), step)
        imagined, real = returns(self.model, episodes, generator)
        for name, value in (("imagined_return", imagined), ("real_return", real), ("gap", imagined - real)):
            self._scalar(f"dream/{name}", float(value.mean()), step)
        filtered = filter_episodes(world, episodes)
        self._log_latents(viewer, filtered, step)
        if filtered.z.shape[-1] <= MAX_VARIABLES:
            self._log_projector(viewer, filtered)
        self.writer.flush()

    # Entries in TensorBoard ---------------------------------------------------------------------------------------

    def _log_config(self) -> None:
        """The config as text, its differences from the defaults as hyper-parameters, and the layout of the charts."""
        config = self.model.config
        tensorboard.text(self.writer, "config", config.to_yaml(), self.model.num_timesteps)
        options = {"env.id": config.env.id, **{key: value for key, _, value in changed(config)}}
        tensorboard.hparams(self.writer, options, {"eval/mean_reward": 0.0, f"world/open_loop/{self.horizon}": 0.0})
        tensorboard.layout(self.writer)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if np.isfinite(value):
            self.writer.add_scalar(tag, value, step)

    def _log_errors(self, found: Figures, viewer: Viewer, step: int) -> None:
        errors = found.errors
        columns = {
            "world/open_loop": errors.error(),
            "world/persistence": errors.baseline(),
            "world/ratio": errors.ratio(),
            "world/open_loop_reward": errors.reward,
            "world/open_loop_continue": errors.cont,
            "world/uncertainty": errors.uncertainty,
            **{f"dream/{name}": column for name, column in found.calibration.columns().items()},
            "dream/reward_gap": found.gap.mean,
        }
        for horizon in sorted({*(h for h in HORIZONS if h < self.horizon), self.horizon}):
            for name, column in columns.items():
                self._scalar(f"{name}/{horizon}", float(column[horizon - 1]), step)
        for part, own in errors.parts.items():
            self._scalar(f"world/ratio_by_part/{part}", float(own.ratio()[-1]), step)
        if errors.count.any():
            tensorboard.image(self.writer, "world/open_loop_curve", error_figure(errors, viewer), step)

    def _log_latents(self, viewer: Viewer, filtered: FilteredStates, step: int) -> None:
        world = self.model.policy.world
        variables = min(TRAVERSED_VARIABLES, world.dynamics.latent.variables)
        rate, order = usage(world, filtered), list(range(variables))
        if rate is not None:
            order = rate.argsort(descending=True).tolist()
            title = f"Rate of each variable of the latent: {filtered.rate:.2f} nats per step, {filtered.active} variables active"
            bars = pictures.bar_figure([float(rate[i]) for i in order], [f"z{i}" for i in order], title, "nats per step")
            tensorboard.image(self.writer, "latent/usage", bars, step)
        if world.decoder is None:
            return
        rows, order = len(filtered.step), order[:TRAVERSED_VARIABLES]
        if filtered.z.shape[-1] <= MAX_VARIABLES:
            traversed = traversal(world, filtered, rows // 2)[order]
            names, title = [f"z{i}" for i in order], "One variable of the latent moved"
            self._log_strips("latent/traversal", viewer, traversed, names, title, step)
        ends = torch.linspace(0, rows - 1, 6).long().view(3, 2).tolist()
        paths = torch.stack([interpolation(filtered.feature[a], filtered.feature[b]) for a, b in ends])
        self._log_strips("latent/interpolation", viewer, paths, ["a", "b", "c"], "Between two states", step)

    def _log_strips(self, tag: str, viewer: Viewer, features: Tensor, rows: list[str], title: str, step: int) -> None:
        """Decoded features [R, S, F]: R rows of pictures where they can be drawn, else lines of their numbers."""
        obs = {k: x.unflatten(0, features.shape[:2]) for k, x in self.model.policy.world.decode(features.flatten(0, 1)).items()}
        if viewer.can_draw:
            frames = viewer.frames({name: x.flatten(0, 1) for name, x in obs.items()})
            picture = pictures.grid(frames.reshape(*features.shape[:2], *frames.shape[1:]), rows, title)
            encoded = pictures.png(picture)
        else:
            words, values = viewer.labels, viewer.numbers(obs)
            series = [
                (row, {w: values[r, :, i].tolist() for i, w in enumerate(words[:TRAVERSED_VARIABLES])})
                for r, row in enumerate(rows)
            ]
            encoded = pictures.lines_figure(list(range(features.shape[1])), series, title, "step")
        tensorboard.image(self.writer, tag, encoded, step)

    def _log_projector(self, viewer: Viewer, filtered: FilteredStates) -> None:
        """PROJECTOR_POINTS latents in the projector, evenly spaced over all rows."""
        count = len(filtered.step)
        chosen = torch.linspace(0, count - 1, min(PROJECTOR_POINTS, count)).long()
        metadata = {
            "episode": filtered.episode[chosen].tolist(),
            "step": filtered.step[chosen].tolist(),
            "reward": [float(f"{x:.4g}") for x in filtered.rows.reward[chosen, 0].tolist()],
        }
        value = self.model.policy.controller.estimate(filtered.feature[chosen])
        if value is not None:
            metadata["value"] = [float(f"{x:.4g}") for x in value.tolist()]
        obs = self.model.obs_spec.canonical({name: x[chosen, 0] for name, x in filtered.rows.obs.items()})
        thumbnails = viewer.frames(obs) if viewer.can_draw else None
        try:
            tensorboard.projector(Path(self.writer.log_dir), filtered.posterior.mean[chosen].cpu().numpy(), metadata, thumbnails)
        except StorageError as error:  # the run goes on; if the disk is full, its checkpoints will fail too
            _log.warning("The projector's points are left out: %s", error)
