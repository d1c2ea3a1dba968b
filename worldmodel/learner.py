"""One gradient step of the world model: loss scales, precision, clipping, and skipped updates where numbers are not finite."""

from __future__ import annotations

import copy
import ctypes
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Sampling, Trace
from worldmodel.errors import NumericsError
from worldmodel.model import WorldModel
from worldmodel.nn.networks import clip_each_norm
from worldmodel.registry import register


class ScaleConfig(Frozen):
    """Weight of each loss of the world model (`WorldModel.loss`). Observation, dyn and rep are in nats per step."""

    observation: float = Field(1.0, ge=0, description="weight of the reconstruction's loss")
    reward: float = Field(1.0, ge=0, description="weight of the reward head's loss")
    cont: float = Field(1.0, ge=0, description="weight of the loss of the head that predicts whether an episode goes on")
    legal: float = Field(1.0, ge=0, description="weight of the loss of the head that predicts which actions are legal")
    dyn: float = Field(1.0, ge=0, description="weight of the KL (rate) that trains the transition and the initial distribution")
    rep: float = Field(0.1, ge=0, description="weight of the KL (rate) that trains the posterior")
    marginal: float = Field(1.0, ge=0, description="beta of a VAE: the KL to the marginal")
    prior: float = Field(1.0, ge=0, description="weight of losses of distributions without an exact density, such as denoising")
    denoise: float = Field(1.0, ge=0, description="weight of the loss of a decoder that draws by diffusion")
    prediction: float = Field(1.0, ge=0, description="weight of predicting latents from latents (jepa, hybrid)")
    collapse: float = Field(5.0, ge=0, description="anti-collapse regulariser (jepa, hybrid); independent of the batch's size")
    inverse: float = Field(1.0, ge=0, description="inverse dynamics: the action from two latents (jepa, hybrid)")
    ensemble: float = Field(1.0, ge=0, description="squared error of the ensemble's predictions; no gradient leaves the ensemble")


@register("group", "train")
class TrainConfig(Frozen):
    """How experience becomes gradient steps."""

    steps: int = Field(10_000, ge=1, description="real environment steps of a whole run, random ones included")
    minutes: float | None = Field(
        None,
        gt=0,
        description="time that a whole run may take, evaluations included; steps, ratio, batch_size and eval.every are chosen to "
        "fill it, where they are not given; null: no limit",
    )
    data: tuple[str, ...] = Field(
        (), description="recorded experience to learn from instead of an environment: .npz files, folders of them, minari:ID, runs"
    )
    warm_start: str | None = Field(
        None, description="run folder whose weights a new run begins with, part by part as they fit, in a model as that run's"
    )
    warm_start_step: int | Literal["best", "newest"] | None = Field(
        None, description="which checkpoint of it, by its real steps; null: the best evaluated, the newest where none was"
    )
    keep_data: bool = Field(False, description="the replay begins with the rows of the run that warm_start names")
    prefill: int = Field(500, ge=0, description="rows of random experience before the first update: steps, and first observations")
    random_action_repeat: float = Field(1.0, ge=1, description="steps for which each random action of prefill is kept, on average")
    explore: bool = Field(
        True,
        description="plays whole episodes by random actions that last, as long as each reward follows from the action alone and "
        "nothing was found; fewer of them with each episode that found more, and none after five. Until then actors that learn in "
        "dreams are rewarded for novelty",
    )
    pretrain: int = Field(100, ge=0, description="updates of the world model right after the prefill")
    ratio: float = Field(0.5, ge=0, description="updates per real step")
    early_ratio: float | None = Field(
        None,
        gt=0,
        description="updates per real step right after the prefill; they fall as one over the steps to train.ratio; null: "
        "train.ratio at once",
    )
    batch_size: int = Field(16, ge=1, description="sequences in a batch")
    batch_length: int = Field(32, ge=2, description="steps in a sequence")
    burn_in: int = Field(0, ge=0, description="steps before each sequence that only warm up its state, without gradient")
    capacity: int = Field(200_000, ge=1, description="steps that the replay holds")
    replay: Literal["memory", "disk"] = Field(
        "memory", description="where the replay's observations lie; disk: in the run folder, so that capacity may exceed the memory"
    )
    replay_gib: float | None = Field(
        None, gt=0, description="GiB that the replay holds at most, if that is less than capacity; its oldest steps make room"
    )
    recent_fraction: float = Field(0.0, ge=0, le=1, description="share of sequences that are the newest experience")
    terminal_fraction: float = Field(0.25, ge=0, le=1, description="share of sequences chosen so that an episode ends in them")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the world model")
    lr_decay_from: int | None = Field(
        None, ge=1, description="updates from which on lr falls as one over the root of the updates; null: never"
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip: float = Field(100.0, gt=0, description="largest norm of each parameter's gradient")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the exponential average of the weights, which acts and imagines; 0: none"
    )
    warmup: int = Field(0, ge=0, description="updates over which the weights of rep and marginal grow from 0")
    scales: ScaleConfig = ScaleConfig()
    threads: int = Field(1, ge=1, description="torch threads; part of the seed")
    reuse_memory: bool = Field(True, description="keep freed memory in the process (glibc): fewer page faults")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; slower than fp32 on CPUs without AMX")
    compile: bool = Field(False, description="torch.compile the recurrent step; pays on long runs only")

    def early_updates(self, start: int, stop: int) -> float:
        """Updates that early_ratio adds from real step `start` to `stop`: a step is worth more where few are known.

        Their rate at step t is early_ratio * prefill / t - ratio, while that is above 0.
        """
        if not self.early_ratio or not self.prefill or self.data:
            return 0.0
        first = self.early_ratio * self.prefill
        start, end = max(start, self.prefill), min(stop, first / self.ratio if self.ratio else stop)
        return first * math.log(end / start) - self.ratio * (end - start) if end > start else 0.0

    @model_validator(mode="after")
    def _a_warm_start_has_a_run(self) -> TrainConfig:
        if self.warm_start is None and (self.keep_data or self.warm_start_step is not None):
            name = "train.keep_data" if self.keep_data else "train.warm_start_step"
            raise ValueError(f"{name} is about the run of a warm start, and there is none: name it with --from (train.warm_start).")
        if self.keep_data and self.data:
            raise ValueError(
                "train.keep_data adds a run's rows to those of an environment, and train.data learns without one: name the run as "
                "one more --data instead."
            )
        return self


def reuse_memory() -> bool:
    """Ask glibc to keep freed blocks of up to 32 MiB in the process; False where the C library is another.

    By default each activation of more than some hundred kilobytes is mapped, filled by page faults and unmapped again: tens
    of thousands of faults per update at larger sizes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    settings = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


class SkippedUpdates:
    """Counts updates that were not applied because a number was not finite; three in a row raise NumericsError.

    what    whose updates: "" or words that follow "Update 7"
    remedy  what may help
    """

    PATIENCE = 3

    def __init__(self, what: str, remedy: str):
        self.what, self.remedy = what, remedy
        self.count = 0
        self.in_a_row = 0

    def allow(self, update: int, nonfinite: list[str]) -> bool:
        """Whether this update may be applied; `nonfinite` names what in it is not finite."""
        if not nonfinite:
            self.in_a_row = 0
            return True
        self.count += 1
        self.in_a_row += 1
        if self.in_a_row >= self.PATIENCE:
            raise NumericsError(
                f"Update {update}{self.what}: not finite: {', '.join(nonfinite[:5])}; "
                f"{self.PATIENCE} updates in a row were skipped. Finite numbers were expected. {self.remedy}"
            )
        return False


class Learner:
    """Owns the optimiser of a world model; `update` is one gradient step.

    world  the model that gradients change
    ema    the exponential average of its weights, which acts and imagines; `world` itself where train.ema_decay is 0

    An update with a non-finite loss or gradient changes no weight and is counted in `skips`.
    """

    MEASURE_EVERY = 10
    """Updates between two evaluations of `WorldModel.measures`, which can cost as much as a loss."""

    CALIBRATE_EVERY = 5
    """Updates between two calibrations of what the model in use predicts of its own errors."""

    def __init__(self, world: WorldModel, config: TrainConfig):
        self.world, self.config = world, config
        self.optimizer = torch.optim.Adam(world.parameters(), lr=config.lr, eps=config.eps)
        self.updates = 0
        self.skips = SkippedUpdates("", "Look at the sizes of observations and rewards, or lower train.lr.")
        if config.reuse_memory:
            reuse_memory()
        self.ema = world
        if config.ema_decay:
            self.ema = copy.deepcopy(world).requires_grad_(False)
            self.ema.scaling, self.ema.heads.scale = world.scaling, world.heads.scale  # statistics of the data are shared
        if config.compile:
            for model in {world, self.ema}:
                model.dynamics.compile_step()

    @property
    def skipped(self) -> int:
        """Updates that were not applied."""
        return self.skips.count

    def prepare(self, batch: Batch) -> Batch:
        """A sampled batch on the model's device, its observations preprocessed."""
        batch = batch.to(self.world.device)
        return batch.with_obs(self.world.preprocess(batch.obs))

    def update(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[dict[str, float], Trace, Batch]:
        """One step on a prepared batch of burn_in + batch_length rows: (metrics, trace, the rows that it covers)."""
        self.world.train()
        with torch.autocast(batch.reward.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            trace, batch = self._trace(self.world, batch, generator)
            losses = self.world.loss(trace, batch, Sampling(generator=generator, update=self.updates))
            means = {name: term.mean() for name, term in losses.items()}
            total = sum(self.weight(name) * mean for name, mean in means.items())
        metrics = {f"loss/{name}": float(mean.detach()) for name, mean in means.items()}
        self.optimizer.zero_grad(set_to_none=True)
        nonfinite = self._nonfinite(metrics, batch)
        if not nonfinite:
            total.backward()
            metrics["gradient_norm"], nonfinite = clip_gradients(self.world, self.config.clip)
        if self.skips.allow(self.updates + self.skips.count + 1, nonfinite):
            self._set_lr()
            self.optimizer.step()
            self.updates += 1
            self.world.update_targets()
            self._update_ema()
            if self.updates % self.CALIBRATE_EVERY == 0:
                self.world.calibrate(self.ema, batch)
                self.world.train()
        return metrics | self._diagnostics(metrics, trace, batch), trace, batch

    def _set_lr(self) -> None:
        """What is learned late is learned in small steps: the error of a prediction has a floor that falls with the learning rate.

        Source: Robbins and Monro 1951; of Adam, Kingma and Ba 2015, theorem 4.1.
        """
        start = self.config.lr_decay_from
        share = 1.0 if start is None else min(1.0, math.sqrt(start / (self.updates + 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * share

    @torch.no_grad()
    def ema_trace(self, batch: Batch, generator: torch.Generator | None = None) -> Trace:
        """The averaged model's trace of the rows that `update` covers of the same prepared batch."""
        return self._trace(self.ema.eval(), batch, generator)[0]

    def _trace(self, world: WorldModel, batch: Batch, generator: torch.Generator | None) -> tuple[Trace, Batch]:
        """(trace, the rows after the burn-in, which it covers)."""
        sampling, state = Sampling(generator=generator), None
        if self.config.burn_in:
            training = world.training
            with torch.no_grad():  # in eval mode: rows that only warm up a state move no running statistics
                state = world.eval().trace(batch.window(0, self.config.burn_in), None, sampling).last
            world.train(training)
            batch = batch.window(self.config.burn_in)
        return world.trace(batch, state, sampling), batch

    def weight(self, name: str) -> float:
        """The weight of a loss at this update; of "prior/transition/nll" the first word names the scale."""
        name = name.partition("/")[0]
        scale = getattr(self.config.scales, "cont" if name == "continue" else name)
        if name in ("rep", "marginal") and self.config.warmup:
            scale *= min(1.0, self.updates / self.config.warmup)
        return scale

    @torch.no_grad()
    def _update_ema(self) -> None:
        """ema = keep * ema + (1 - keep) * world, with a smaller `keep` in the first updates; buffers are copied."""
        if self.ema is self.world:
            return
        keep = min(self.config.ema_decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.world.parameters()), 1 - keep)
        for own, new in zip(self.ema.buffers(), self.world.buffers(), strict=True):
            own.copy_(new)

    def _diagnostics(self, losses: dict[str, float], trace: Trace, batch: Batch) -> dict[str, float]:
        """Metrics beside losses and gradient norm."""
        metrics = self.world.measures(trace, batch.is_first) if self.updates % self.MEASURE_EVERY == 1 else {}
        if (compressed := self.world.scaling.compressed_fraction(batch.obs)) is not None:
            metrics["beyond_range"] = float(compressed)
        metrics["active_units"] = self.world.active_units(trace)
        if "loss/dyn" in losses:
            metrics["rate"] = losses["loss/dyn"]
        return metrics

    def _nonfinite(self, losses: dict[str, float], batch: Batch) -> list[str]:
        """Inputs, parameters and losses that are not finite, if a loss or a reward is not."""
        found = [name for name, value in losses.items() if not math.isfinite(value)]
        if not found and _finite(batch.reward):  # the heads' bins would clamp an infinite one
            return []
        inputs = {f"observation '{name}'": x for name, x in batch.obs.items()}
        inputs |= {"reward": batch.reward, "action": batch.prev_action}
        return [name for name, x in inputs.items() if not _finite(x)] + nonfinite_parameters(self.world) + found


def nonfinite_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, p in module.named_parameters() if not _finite(p)]


def clip_gradients(module: nn.Module, max_norm: float) -> tuple[float, list[str]]:
    """Clips each parameter's gradient by its norm: (the norm of the whole before, the parameters where it is not finite)."""
    norm = clip_each_norm(module.parameters(), max_norm)
    if norm.isfinite():
        return float(norm), []
    nonfinite = [name for name, p in module.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return float(norm), nonfinite or ["gradient_norm"]  # finite numbers may have squares that are not


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
