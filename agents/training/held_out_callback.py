"""A callback that shows in TensorBoard what the world model believes, on episodes that it never learns from."""

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
from worldmodel.agents.rollouts import SAMPLES, error_figure, returns, rollout_video
from worldmodel.config import Config, differences
from worldmodel.data import Episodes
from worldmodel.diagnostics.geometry import FilteredStates, filter_episodes, interpolation, traversal, usage
from worldmodel.diagnostics.rollouts import OpenLoop, open_loop
from worldmodel.envs.draw import Viewer
from worldmodel.envs.make import EnvConfig
from worldmodel.errors import ConfigError, StorageError
from worldmodel.view import pictures, tensorboard

HORIZONS = (1, 2, 3, 5, 10, 15, 30, 50)
"""Horizons whose errors are scalars, as far as they are measured."""
VIDEO_STEPS, PROJECTOR_POINTS, TRAVERSED_VARIABLES = 40, 300, 8
"""Steps of the film, points of the projector, variables of the code that are traversed."""
MAX_VARIABLES = 1024
"""Numbers beyond which a code is no list of variables, but a picture: none of them is moved, and the projector leaves it out."""
_log = logging.getLogger(__name__)


class HeldOutCallback(BaseCallback):
    """Every `every` real steps, and at the end: fresh episodes, and what the model makes of them, as TensorBoard tags.

    every     real steps between looks; looks begin with the first update of the world model
    env       the environment to play them in; without it the one of the model's own config
    episodes  held-out episodes of each look, played greedily with a random action in five steps
    steps     of each episode at most; None: as in evaluations (eval.max_steps), 1000 where nothing else is said
    context   rows that the model sees before it dreams
    horizon   steps over which errors are measured
    give_up   asked at every step of an episode; a look is left out as soon as it says yes

    | tag | what |
    |---|---|
    | world/open_loop/H, world/persistence/H | root mean square error H steps ahead, and that of "nothing changes", in deviations |
    | world/ratio/H, world/ratio_by_part/PART | the first over the second; the same at the longest horizon by part of the episode |
    | world/open_loop_reward/H, world/open_loop_continue/H | root mean square error in reward units; Brier score |
    | world/uncertainty/H | disagreement of the ensemble H steps ahead, where the model has one |
    | world/open_loop_curve | the same by horizon and number |
    | dream/video, dream/signals | animated: real, imagined and error; every number over time with its spread |
    | dream/imagined_return, dream/real_return, dream/gap | the first 100 steps of those episodes, dreamed and real |
    | latent/usage, latent/traversal, latent/interpolation | what the code carries, and what it means |

    The projector shows the codes of these episodes, with reward, step and value. Training goes on as if nothing had happened: no
    random state, statistic or weight is touched. Raises ConfigError where the logger writes no TensorBoard files.
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
        if min(every, episodes, 1 if steps is None else steps, context, horizon) < 1:
            raise ConfigError(f"Watch needs numbers of at least 1, not {every=}, {episodes=}, {steps=}, {context=}, {horizon=}.")
        self.every, self.env, self.episodes, self.steps = every, env, episodes, steps
        self.context, self.horizon, self.should_abort = context, horizon, should_abort
        self.evaluated_at: int | None = None

    def _init_callback(self) -> None:
        if self.env is None and self.model.config.env.id == "custom":
            raise ConfigError(
                "Watch plays in environments of its own, but the model was given one without an id. Pass Watch(env='ID'), or "
                "an EnvConfig."
            )
        env = self.env if self.env is not None else self.model.config.env
        self.env = EnvConfig(id=env) if isinstance(env, str) else env

    def _on_training_start(self) -> None:
        self.writer  # noqa: B018 (raises now rather than after hours)
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
            "Watch writes into TensorBoard files, but the model logs none. Make it with tensorboard_log='FOLDER', or leave "
            "Watch out."
        )

    def show(self) -> None:
        """One look now, unless this step was looked at already or nothing was learned yet."""
        step = self.model.num_timesteps
        if self.evaluated_at == step or self.model.learner.updates == 0:
            return
        try:
            steps = self.model.config.eval.max_steps if self.steps is None else self.steps
            episodes = collect(self.model, self.env, self.episodes, steps=steps, should_abort=self.should_abort)
        except EvaluationAborted:
            return
        self.evaluated_at = step
        generator = torch.Generator(self.model.device).manual_seed(HELD_OUT_SEED)
        world = self.model.policy.world
        viewer = Viewer(self.env.id, self.model.obs_spec)
        errors = open_loop(world, episodes, self.context, self.horizon, samples=SAMPLES, generator=generator)
        self._log_errors(errors, viewer, step)
        self._log_videos(viewer, episodes, generator, step)
        self._log_returns(episodes, generator, step)
        filtered = filter_episodes(world, episodes)
        self._log_latents(viewer, filtered, step)
        if filtered.z.shape[-1] <= MAX_VARIABLES:
            self._log_projector(viewer, filtered)
        self.writer.flush()

    # What is shown ------------------------------------------------------------------------------------------------

    def _log_config(self) -> None:
        """What the run is: its config as text, what differs from the defaults as hyper-parameters, charts that belong together."""
        config = self.model.config
        tensorboard.text(self.writer, "config", config.to_yaml(), self.model.num_timesteps)
        defaults = Config.parse({"env": {"id": "custom"}, "agent": {"kind": config.agent.kind}})
        options = {"env.id": config.env.id, **{key: value for key, _, value in differences(defaults, config)}}
        options.pop("description", None)
        tensorboard.hparams(self.writer, options, {"eval/mean_reward": 0.0, f"world/open_loop/{self.horizon}": 0.0})
        tensorboard.layout(self.writer)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if np.isfinite(value):
            self.writer.add_scalar(tag, value, step)

    def _log_errors(self, errors: OpenLoop, viewer: Viewer, step: int) -> None:
        columns = {
            "open_loop": errors.error(),
            "persistence": errors.baseline(),
            "ratio": errors.ratio(),
            "open_loop_reward": errors.reward,
            "open_loop_continue": errors.cont,
            "uncertainty": errors.uncertainty,
        }
        for horizon in sorted({*(h for h in HORIZONS if h < self.horizon), self.horizon}):
            for name, column in columns.items():
                self._scalar(f"world/{name}/{horizon}", float(column[horizon - 1]), step)
        for part, own in errors.parts.items():
            self._scalar(f"world/ratio_by_part/{part}", float(own.ratio()[-1]), step)
        if errors.count.any():
            tensorboard.image(self.writer, "world/open_loop_curve", error_figure(errors, viewer), step)

    def _log_videos(self, viewer: Viewer, episodes: Episodes, generator: torch.Generator, step: int) -> None:
        shown = rollout_video(self.model.policy.world, viewer, episodes, self.context, VIDEO_STEPS, generator)
        for name, frames in (("video", shown.video), ("signals", shown.signals)):
            if frames is not None:
                tensorboard.image(self.writer, f"dream/{name}", pictures.gif(frames, fps=10), step)

    def _log_returns(self, episodes: Episodes, generator: torch.Generator, step: int) -> None:
        imagined, real = returns(self.model, episodes, generator)
        self._scalar("dream/imagined_return", float(imagined.mean()), step)
        self._scalar("dream/real_return", float(real.mean()), step)
        self._scalar("dream/gap", float((imagined - real).mean()), step)

    def _log_latents(self, viewer: Viewer, filtered: FilteredStates, step: int) -> None:
        world = self.model.policy.world
        rate, order = usage(world, filtered), list(range(TRAVERSED_VARIABLES))
        if rate is not None:
            order = rate.argsort(descending=True).tolist()
            title = (
                f"Rate of each variable of the code: {filtered.rate:.2f} nats per step in all, {filtered.active} variables active"
            )
            bars = pictures.bar_figure([float(rate[i]) for i in order], [f"z{i}" for i in order], title, "nats per step")
            tensorboard.image(self.writer, "latent/usage", bars, step)
        if world.decoder is None:
            return
        rows, order = len(filtered.step), order[:TRAVERSED_VARIABLES]
        if filtered.z.shape[-1] <= MAX_VARIABLES:
            traversed = traversal(world, filtered, rows // 2)[order]
            self._log_strips(
                "latent/traversal", viewer, traversed, [f"z{i}" for i in order], "One variable of the code moved", step
            )
        ends = torch.linspace(0, rows - 1, 6).long().view(3, 2).tolist()
        paths = torch.stack([interpolation(filtered.feature[a], filtered.feature[b]) for a, b in ends])
        self._log_strips("latent/interpolation", viewer, paths, ["a", "b", "c"], "Between two beliefs", step)

    def _log_strips(self, tag: str, viewer: Viewer, features: Tensor, rows: list[str], title: str, step: int) -> None:
        """Decoded features [R, S, F]: pictures in rows where they can be drawn, else lines of their numbers."""
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
        """The newest codes in the projector, evenly spaced over all rows."""
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
        except StorageError as error:  # a picture is not worth a run; its checkpoints will say more
            _log.warning("The projector's points are left out: %s", error)
