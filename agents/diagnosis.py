"""What is wrong with a run's world model: every section of a diagnosis, on fresh held-out episodes, in figures and sentences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from worldmodel.agents.decisions import decisions
from worldmodel.agents.evaluation import warn_untrained
from worldmodel.agents.exploitation import exploitation
from worldmodel.agents.held_out import HELD_OUT_SEED, collect
from worldmodel.data import Episodes
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.diagnostics.evidence import Curve, Evidence, Section, Slot, prior_of
from worldmodel.diagnostics.fidelity import rollouts
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.holes import holes
from worldmodel.diagnostics.prior import prior
from worldmodel.diagnostics.rollouts import roll_out, spaced_starts
from worldmodel.diagnostics.smoothness import smoothness
from worldmodel.diagnostics.usage import latents
from worldmodel.envs.draw import Viewer
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import pictures
from worldmodel.view.report import Part

EPISODES, LONGEST = 40, 300
"""Held-out episodes, half of them to choose on and half to measure on, and their steps at most."""
FITTED_EPISODES, FILTERED_STEPS = 40, 100
"""Replayed episodes that densities are fitted to, and the first steps of each episode that are filtered."""
CONTEXT, HORIZON = 5, 15
WORST, SHOWN_STEPS = 5, (0, 5, 10, 15)
"""Dreams that are shown, those with the largest errors, and the steps of them."""


@dataclass(frozen=True)
class Diagnosis:
    """Sections of figures, what they say, and pictures.

    sections  {name: Section}; one that could not be measured says why
    seconds   of all of it
    pictures  {section: {caption: PNG}}
    """

    run: str
    step: int
    slot: str
    seconds: float
    sections: dict[str, Section]
    pictures: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """What the sections say, in their order."""
        return [sentence for section in self.sections.values() for sentence in section.sentences]

    def to_json(self) -> dict[str, Any]:
        """What `worldmodel diagnose --json` prints."""
        sections = {
            name: {
                "figures": {
                    title: {"value": figure.value, "low": figure.low, "high": figure.high, "unit": figure.unit}
                    for title, figure in section.figures.items()
                },
                "skipped": section.skipped,
                "sentences": list(section.sentences),
            }
            for name, section in self.sections.items()
        }
        about = {"run": self.run, "step": self.step, "slot": self.slot, "seconds": round(self.seconds, 1)}
        return {**about, "sections": sections, "sentences": self.sentences}

    def parts(self) -> list[Part]:
        """The sections as parts of a report."""
        return [self._part(name, section) for name, section in self.sections.items()]

    def _part(self, name: str, section: Section) -> Part:
        lines = [
            (title, _number(figure.value), _interval(figure.low, figure.high), figure.unit)
            for title, figure in section.figures.items()
        ]
        drawn = {title: curve_figure(title, curve) for title, curve in section.curves.items()}
        head = ("figure", "value", "95 % interval", "unit")
        return Part(name, section.sentences, head, lines, section.skipped, drawn | self.pictures.get(name, {}))


def diagnose(
    run: Run,
    slot: Slot | None = None,
    *,
    episodes: int = EPISODES,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> Diagnosis:
    """Plays held-out episodes with the run's newest agent, and measures its world model on them.

    slot      the prior that is looked at; None: the marginal where there is one, else the transition
    episodes  held-out ones, at least 4
    trust     the run's agent.path may be opened, where it has one
    log       gets a line as each section is done

    Raises ConfigError for a slot without a prior, too few episodes, or an empty replay; EnvError, MissingExtraError.
    """
    started = time.perf_counter()
    agent = run.agent("newest", device=device, trust=trust)
    warn_untrained(agent, log)
    world = agent.policy.world.eval()
    slot = checked_slot(world, slot)
    if episodes < 4:
        raise ConfigError(f"A diagnosis of {episodes} episodes: expected at least 4, of which half are held back for choices.")
    played = collect(agent, run.config.env, episodes, steps=min(LONGEST, run.config.eval.max_steps or LONGEST))
    evidence = gathered(world, str(run.path), replayed(run.replay()), played)
    log(f"{episodes} held-out episodes, {played.rows.shape[1]} rows: {time.perf_counter() - started:.0f} s")
    work: dict[str, Callable[[], Section]] = {
        "rollouts": lambda: rollouts(evidence, CONTEXT, HORIZON),
        "prior": lambda: prior(evidence, slot),
        "latents": lambda: latents(evidence),
        "holes": lambda: holes(evidence, slot),
        "smoothness": lambda: smoothness(evidence, slot),
        "likelihood": lambda: likelihood(evidence),
        "exploitation": lambda: exploitation(agent, run.config.env, evidence, context=CONTEXT, horizon=HORIZON),
        "decisions": lambda: decisions(agent, run.config.env, evidence),
    }
    sections = {}
    for name, measure in work.items():
        since = time.perf_counter()
        sections[name] = measure()
        log(f"{name}: {time.perf_counter() - since:.0f} s")
    viewer = Viewer(run.config.env.id, agent.obs_spec, run.config.env.names)
    shown = {"rollouts": worst_dreams(evidence, viewer)}
    return Diagnosis(str(run.path), agent.num_timesteps, slot, time.perf_counter() - started, sections, shown)


def checked_slot(world: WorldModel, slot: str | None) -> Slot:
    """The slot to look at. Raises ConfigError where nothing fills it."""
    filled = [name for name in get_args(Slot) if prior_of(world, name) is not None]
    if slot is None:
        return "marginal" if "marginal" in filled else "transition"
    if slot not in filled:
        raise ConfigError(f"slot is '{slot}'; this world model has priors for: {', '.join(filled)}. Name one of them.")
    return slot


def gathered(world: WorldModel, run: str, fitted: Episodes, played: Episodes) -> Evidence:
    """Filtered episodes: `fitted` to learn from, and of those played every other one to choose and to measure on."""
    each = torch.arange(len(played.lengths))
    parts = fitted, chosen(played, each[1::2]), chosen(played, each[::2])
    learned, validation, test = (filter_episodes(world, part, FILTERED_STEPS) for part in parts)
    return Evidence(world, run, learned, validation, test, played, HELD_OUT_SEED)


def replayed(replay: Replay, limit: int = FITTED_EPISODES) -> Episodes:
    """The newest whole episodes of a replay, and one that is still open. Raises ConfigError where it holds none."""
    streams = [whole(replay.stream(number)) for number, rows in enumerate(replay.lengths) if rows]
    parts = [part for part in streams if part is not None]
    if not parts:
        raise ConfigError("The replay holds no episode from its beginning. Train for longer.")
    each = [chosen(part, torch.arange(len(part.lengths))[-max(1, limit // len(parts)) :]) for part in parts]
    rows = each[0].rows
    if len(each) > 1:
        names = {name: torch.cat([part.rows.obs[name] for part in each], 1) for name in rows.obs}
        columns = {
            name: torch.cat([getattr(part.rows, name) for part in each], 1)
            for name in ("action", "prev_action", "reward", "is_first", "is_last", "is_terminal")
        }
        rows = replace(rows, obs=names, **columns, row=None, weight=None)
    return Episodes(rows)


def whole(rows: Any) -> Episodes | None:
    """The episodes of a stream from the first that begins in it; None where none does."""
    first = rows.is_first[0].nonzero().flatten()
    return Episodes(rows.window(int(first[0]))) if len(first) else None


def chosen(episodes: Episodes, which: Int[Tensor, " K"]) -> Episodes:
    """Some of the episodes, in their order."""
    number = episodes.rows.is_first[0].cumsum(0) - 1
    mask = torch.isin(number, which)
    return Episodes(episodes.rows.map(lambda x: x[:, mask]))


# Pictures -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def worst_dreams(evidence: Evidence, viewer: Viewer) -> dict[str, bytes]:
    """{caption: PNG} of the dreams with the largest errors HORIZON steps ahead, one of an episode: real above imagined."""
    world, episodes = evidence.world, evidence.episodes
    if world.decoder is None:
        return {}
    episode, start = spaced_starts(episodes, CONTEXT, 10)
    fits = start + CONTEXT + HORIZON <= episodes.lengths[episode]
    episode, start = episode[fits], start[fits]
    if not len(episode):
        return {}
    roll = roll_out(world, episodes, episode, start, CONTEXT, HORIZON, samples=4, generator=evidence.generator(9))
    last = {
        name: (x[:, :, -1].mean(1) - roll.truth[name][:, -1]) / world.scaling.deviation(name) for name, x in roll.imagined.items()
    }
    error = torch.stack([x.flatten(1).square().mean(1) for x in last.values()]).mean(0).sqrt()
    found: dict[str, bytes] = {}
    for i in _worst_of_episodes(error, episode):
        caption = (
            f"episode {int(episode[i])}, step {int(start[i]) + CONTEXT - 1}: error {float(error[i]):.3g} after {HORIZON} steps"
        )
        real = {name: x[i, CONTEXT - 1 :] for name, x in roll.truth.items()}
        imagined = {
            name: torch.cat([real[name][:1].expand(len(x[i]), 1, *x.shape[3:]), x[i]], 1) for name, x in roll.imagined.items()
        }
        found[caption] = pictures.png(_picture(viewer, real, imagined, caption))
    return found


def _worst_of_episodes(error: Tensor, episode: Tensor) -> Iterator[int]:
    """The starts with the largest errors, at most one of each episode."""
    taken: set[int] = set()
    for i in error.argsort(descending=True).tolist():
        if int(episode[i]) not in taken and len(taken) < WORST:
            taken.add(int(episode[i]))
            yield i


def _picture(viewer: Viewer, real: dict[str, Tensor], imagined: dict[str, Tensor], title: str) -> Any:
    """Frames of a dream beside reality, or its signals where nothing can be drawn."""
    if not viewer.can_draw:
        return viewer.signals(real, imagined, 1)[-1]
    steps = [step for step in SHOWN_STEPS if step <= HORIZON]
    rows = [viewer.frames({name: x[steps] for name, x in side.items()}) for side in (real, {k: x[0] for k, x in imagined.items()})]
    return pictures.grid(np.stack(rows), ["real", "imagined"], f"{title} (steps {', '.join(map(str, steps))})", min_size=128)


def curve_figure(title: str, curve: Curve) -> bytes:
    """PNG of a curve; what is unknown is a gap."""
    lines = {name: [float("nan") if x is None else x for x in values] for name, values in curve.lines.items()}
    return pictures.lines_figure(curve.x, [(f"{curve.y_label} by {curve.x_label}", lines)], title, curve.x_label)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
