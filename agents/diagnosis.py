"""What is wrong with a run's world model: every section of a diagnosis, on held-out episodes, in figures and sentences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from worldmodel.agents.belief import ActsOnBelief
from worldmodel.agents.decisions import decisions
from worldmodel.agents.evaluation import warn_untrained
from worldmodel.agents.exploitation import exploitation
from worldmodel.agents.held_out import HELD_OUT_SEED, collect
from worldmodel.agents.states import states_of
from worldmodel.data import Episodes
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.diagnostics.evidence import Curve, Evidence, Section, Slot, joined, prior_of
from worldmodel.diagnostics.fidelity import rollouts
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.holes import holes
from worldmodel.diagnostics.prior import prior
from worldmodel.diagnostics.probe import States, probed
from worldmodel.diagnostics.rollouts import roll_out, spaced_starts
from worldmodel.diagnostics.smoothness import smoothness
from worldmodel.diagnostics.usage import latents
from worldmodel.envs.draw import Viewer
from worldmodel.envs.sources import recordings
from worldmodel.errors import ConfigError, EnvError, MissingExtraError
from worldmodel.model import WorldModel
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import pictures
from worldmodel.view.report import Part

EPISODES, LONGEST = 40, 300
"""Held-out episodes, half of them to choose on and half to measure on, and their steps at most."""
FITTED_EPISODES, FILTERED_STEPS = 40, 100
"""Replayed episodes that densities are fitted to, and the first steps of each episode that are filtered."""
FEWEST = 4
"""Held-out episodes below which there is no diagnosis."""
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
    data: Sequence[str | Path] | None = None,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> Diagnosis:
    """Plays held-out episodes with the run's newest agent, and measures its world model on them.

    slot      the prior that is looked at; None: the marginal where there is one, else the transition
    episodes  held-out ones, at least 4
    data      recorded experience that the model has not seen, as `recording` names it, in the place of played episodes.
              None: where a run that learned from recordings has no environment, a quarter of those is taken
    trust     the run's agent.path may be opened, where it has one
    log       gets a line as each section is done

    Raises ConfigError for a slot without a prior, too few episodes, or an empty replay; for data of other spaces or
    another environment; EnvError, MissingExtraError.
    """
    started = time.perf_counter()
    agent = run.agent("newest", device=device, trust=trust)
    warn_untrained(agent, log)
    world = agent.policy.world.eval()
    slot = checked_slot(world, slot)
    if episodes < FEWEST:
        raise ConfigError(
            f"A diagnosis of {episodes} episodes: expected at least {FEWEST}, of which half are held back for choices."
        )
    found = held_out(agent, run, episodes, data)
    played, evidence = found.played, gathered(world, str(run.path), found.fitted, found.played)
    log(f"{len(played.lengths)} held-out episodes, {played.rows.shape[1]} rows: {time.perf_counter() - started:.0f} s")
    work: dict[str, Callable[[], Section]] = {
        "rollouts": lambda: rollouts(evidence, CONTEXT, HORIZON),
        "prior": lambda: prior(evidence, slot),
        "latents": lambda: latents(evidence),
        "holes": lambda: joined([holes(evidence, slot), probed(evidence, slot, _states(run, evidence, found), CONTEXT, HORIZON)]),
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
    sections["rollouts"] = replace(sections["rollouts"], sentences=(*found.warning, *sections["rollouts"].sentences))
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


# Experience ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Episodes to fit to, held-out ones, and a sentence where the model has learned from those too.

    seed   environment seed of the first one; None: they are recorded ones
    """

    fitted: Episodes
    played: Episodes
    warning: tuple[str, ...] = ()
    seed: int | None = None


def held_out(agent: ActsOnBelief, run: Run, episodes: int, data: Sequence[str | Path] | None) -> HeldOut:
    """Held-out episodes: recorded ones where `data` names some, played ones, or else replayed ones. Errors: as `diagnose`."""
    steps = min(LONGEST, run.config.eval.max_steps or LONGEST)
    if data is not None:
        learned = [str(source) for source in data if _is_known(source, run)]
        why = f"Errors flatter: the model has learned from {', '.join(learned)}, which --data names as held out."
        played = recorded(agent, run, data, episodes, steps)
        return HeldOut(replayed(run.replay()), played, (f"{why} {_name_others(run)}",) if learned else ())
    try:
        return HeldOut(replayed(run.replay()), collect(agent, run.config.env, episodes, steps=steps), seed=HELD_OUT_SEED)
    except (ConfigError, EnvError, MissingExtraError) as error:
        if not run.config.train.data:
            raise
        fitted, played = divided(replayed(run.replay(), limit=None), episodes)
        why = f"Errors flatter: the {len(played.lengths)} held-out episodes are replayed ones, which the model has learned from, "
        why += f"because the environment did not play ({type(error).__name__})."
        return HeldOut(fitted, first_steps(played, steps), (f"{why} {_name_others(run)}",))


def _is_known(source: str | Path, run: Run) -> bool:
    """Whether a run was trained on a source, or is it."""
    return Path(source).resolve() in [Path(name).resolve() for name in (*(run.config.train.data or ()), run.path)]


def _name_others(run: Run) -> str:
    return f"Name recorded episodes that it has not seen: `worldmodel diagnose {run.path} --data FILE`."


def _states(run: Run, evidence: Evidence, found: HeldOut) -> States | str:
    """The environment's own numbers at held-out rows; or why there are none."""
    if not any(key.kind == "image" for key in evidence.world.obs.keys.values()):
        return "because observations have no pictures"
    if found.seed is None:
        return "because held-out episodes are recorded ones, whose states are not known"
    return states_of(run.config.env, evidence.world, found.played, found.seed)


def recorded(agent: ActsOnBelief, run: Run, data: Sequence[str | Path], limit: int, steps: int) -> Episodes:
    """The first steps of recorded episodes, evenly spaced among all. Raises ConfigError for others than the run's, or too few."""
    found = recordings(data, run.config.env.layout, run.config.env.declared)
    found.check_same_spaces(agent.obs_spec, agent.action_spec, str(run.path))
    ours, theirs = run.config.env.id, found.env_id
    if theirs is not None and ours.rpartition(":")[2] != theirs.rpartition(":")[2]:
        raise ConfigError(f"{found.origin} was recorded in '{theirs}', but {run.path} learned '{ours}'. Choose other data.")
    if found.episodes < FEWEST:
        raise ConfigError(
            f"{found.origin} holds {found.episodes} episodes; a diagnosis takes at least {FEWEST}. Add more with --data."
        )
    which = torch.linspace(0, found.episodes - 1, min(limit, found.episodes), dtype=torch.float64).round().long()
    return first_steps(chosen(found.to_episodes(), which), steps)


def divided(episodes: Episodes, limit: int) -> tuple[Episodes, Episodes]:
    """(the newest FITTED_EPISODES of the first ones, the last quarter: FEWEST to `limit`). Raises ConfigError for too few."""
    count = len(episodes.lengths)
    if count <= FEWEST:
        text = f"The replay holds {count} episodes; without an environment a diagnosis takes at least {FEWEST + 1} of them, one to"
        raise ConfigError(f"{text} fit to and {FEWEST} to measure on. Name others with --data, or install the environment.")
    each, held = torch.arange(count), max(FEWEST, count // 4)
    return chosen(episodes, each[:-held][-FITTED_EPISODES:]), chosen(episodes, each[-held:][-limit:])


def first_steps(episodes: Episodes, steps: int) -> Episodes:
    """At most so many steps of each episode."""
    inside = torch.cat([torch.arange(n) <= steps for n in episodes.lengths.tolist()])
    return Episodes(episodes.rows.map(lambda x: x[:, inside]))


def replayed(replay: Replay, limit: int | None = FITTED_EPISODES) -> Episodes:
    """The newest whole episodes of a replay, and one that is still open; None: all. Raises ConfigError where it holds none."""
    streams = [whole(replay.stream(number)) for number, rows in enumerate(replay.lengths) if rows]
    parts = [part for part in streams if part is not None]
    if not parts:
        raise ConfigError("The replay holds no episode from its beginning. Train for longer.")
    newest = None if limit is None else -max(1, limit // len(parts))
    each = [chosen(part, torch.arange(len(part.lengths))[newest:]) for part in parts]
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
