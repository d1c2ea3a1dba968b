"""A sweep: combinations of options, or a search by Optuna; the training of one combination and seed; what all of them gave."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldmodel.agents.diagnosis import gathered, held_out
from worldmodel.agents.training import session
from worldmodel.agents.training.signals import Signals
from worldmodel.config import Config, flat_overrides, plain
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.envs.extras import install
from worldmodel.errors import ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError, require_choice
from worldmodel.storage.run import Run
from worldmodel.storage.run_folder import is_run
from worldmodel.view import pictures
from worldmodel.view.report import Part

TRAINED = ("final_return", "solved_at", "real_steps", "updates", "wall_seconds", "parameters")
FIGURES = (*TRAINED, "rate", "distortion")
"""Of a run: what its training gives, and nats per step of its newest world model on held-out episodes."""
EPISODES = 20
"""Held-out episodes, of which half are measured."""
DECADE = 10 - 1e-9

Options = dict[str, Any]


# What is swept ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers of a search from low to high, on a logarithmic scale where both are positive and a decade or more apart."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= DECADE


@dataclass(frozen=True)
class Plan:
    """All that decides a run, but for its seed.

    recipe   name, YAML file or Gymnasium id
    fixed    options of all runs, by dotted key
    swept    {dotted key: values, or a Range}
    figure   what is maximised, or minimised
    """

    recipe: str
    fixed: Options
    swept: dict[str, tuple[Any, ...] | Range]
    search: bool = False
    figure: str = "final_return"
    minimise: bool = False

    def given(self, options: Mapping[str, Any]) -> Options:
        """Overrides of the recipe for one combination."""
        return {**self.fixed, **options}

    def config(self, options: Mapping[str, Any]) -> Config:
        return Config.from_recipe(self.recipe, self.given(options))

    @property
    def combinations(self) -> list[Options]:
        """Each value with each; of a Range its ends."""
        values = [(x.low, x.high) if isinstance(x, Range) else x for x in self.swept.values()]
        return [dict(zip(self.swept, each)) for each in itertools.product(*values)]

    def to_json(self) -> dict[str, Any]:
        """What must be equal where rows are shared. Values of a grid may become more; of a search they may not."""
        file = Path(self.recipe)
        content = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
        spaces = {key: [x.low, x.high] if isinstance(x, Range) else list(x) for key, x in self.swept.items()}
        searched = {"figure": self.figure, "minimise": self.minimise} if self.search else None
        swept = spaces if self.search else sorted(self.swept)
        return {"recipe": self.recipe, "content": content, "fixed": self.fixed, "swept": swept, "search": searched}


def planned(
    recipe: str | Path, options: Mapping[str, Any] | Sequence[str], steps: int | None, search: bool, minimise: str | None
) -> Plan:
    """Raises ConfigError for what cannot run, MissingExtraError where a search finds no Optuna."""
    found = parsed(options)
    if steps is not None and found.setdefault("train.steps", (steps,)) != (steps,):
        raise ConfigError(f"steps={steps} and train.steps are given both. Give one of them.")
    if not search and (wrong := [key for key, values in found.items() if isinstance(values, Range)]):
        raise ConfigError(f"'{wrong[0]}' has a range, which is for a search: add --trials N, or give values, as in 1e-4,1e-3.")
    fixed = {key: values[0] for key, values in found.items() if not isinstance(values, Range) and len(values) == 1}
    swept = {key: values for key, values in found.items() if key not in fixed}
    if not swept:
        words = " ".join(f"{key}={shown(value)}" for key, value in fixed.items())
        raise ConfigError(
            f"Every option has one value, so there is nothing to sweep. Give several, as in train.lr=1e-3,3e-3, or train once: "
            f"worldmodel train {recipe} {words}".rstrip()
        )
    if minimise is not None:
        require_choice("minimise", minimise, FIGURES)
    plan = Plan(str(recipe), fixed, swept, search, minimise or "final_return", minimise is not None)
    if search:
        optuna()
        plan = Plan(plan.recipe, fixed, {key: _typed(plan, key, x) for key, x in swept.items()}, True, plan.figure, plan.minimise)
    _check(plan)
    return plan


def parsed(options: Mapping[str, Any] | Sequence[str]) -> dict[str, tuple[Any, ...] | Range]:
    """Values by dotted key. A word is read as on the command line; in a mapping a list holds the values.

    Raises ConfigError for a key that is given twice, an empty value, and a range whose ends are not in order.
    """
    if isinstance(options, str):
        raise ConfigError(f"options must be a list of words or a mapping, not the one word '{options}'. Write ['{options}'].")
    pairs = options.items() if isinstance(options, Mapping) else [_pair(text) for text in options]
    found: dict[str, tuple[Any, ...] | Range] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"'{key}' is given twice. Keep one; several values stand behind one another: {key}=A,B.")
        values = _values(key, value) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (value,)
        found[key] = values if isinstance(values, Range) else _different(key, values)
    return found


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' is no option. Write it as key=value or key=A,B, for example train.lr=1e-3,3e-3.")
    return key.strip(), value


def _values(key: str, text: str) -> tuple[Any, ...] | Range:
    pieces = split_values(text)
    if len(pieces) > 1 and not all(piece.strip() for piece in pieces):
        raise ConfigError(f"'{key}={text}' has an empty value. Write values with one comma between two of them; null is one.")
    if ends := re.fullmatch(r"\s*(.+?)\.\.(.+)", text):
        low, high = (_value(key, end) for end in ends.groups())
        if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high)):
            if not low < high:
                raise ConfigError(f"'{key}={text}': expected a range from a lower to a higher number.")
            return Range(low, high, isinstance(low, int) and isinstance(high, int))
    return tuple(_value(key, piece) for piece in pieces)


def _value(key: str, text: str) -> Any:
    return flat_overrides([f"{key}={text}"])[key]


def _different(key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """As JSON holds them, each once."""
    try:
        found = {json.dumps(value, sort_keys=True, allow_nan=False): value for value in map(plain, values)}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"'{key}': {error}. Expected words, finite numbers, and lists and mappings of them.") from None
    if not found:
        raise ConfigError(f"'{key}' has no value. Expected at least one.")
    return tuple(found.values())


def split_values(text: str) -> list[str]:
    """The pieces between commas that stand in no brackets and no quotes."""
    found, depth, quote = [""], 0, ""
    for before, char in zip(" " + text, text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in " ,:[{(":
            quote = char
        else:
            depth += (char in "[{(") - (char in "]})")
        if char == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += char
    return found


def _check(plan: Plan) -> None:
    """Raises ConfigError of the first combination that does not fit; of a search, where one value differs from the first."""
    every = plan.combinations
    for options in every:
        if plan.search and sum(options[key] != every[0][key] for key in options) > 1:
            continue
        try:
            config = plan.config(options)
        except ConfigError as error:
            raise ConfigError(f"With {label(options)}: {error}") from None
        if config.train.data and plan.search and plan.figure == "final_return":
            raise ConfigError("Recorded data have no returns to search by: add --minimise distortion, or another figure.")


def _typed(plan: Plan, key: str, values: Any) -> Any:
    """A range between whole numbers is one of real numbers where the option is a real number."""
    if not isinstance(values, Range) or not values.whole:
        return values
    value: Any = plan.config({name: each for name, each in plan.combinations[0].items()})
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return Range(values.low, values.high, not isinstance(value, float))


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def label(options: Mapping[str, Any]) -> str:
    """`train.lr=0.001 model=gaussian`."""
    return " ".join(f"{key}={shown(value)}" for key, value in options.items())


def run_name(options: Mapping[str, Any], seed: int) -> str:
    """A name for a run's files, which no other combination has."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', label(options))[:80]}-{digest}-s{seed}"


# Search -------------------------------------------------------------------------------------------------------------------


def optuna() -> Any:
    """The package. Raises MissingExtraError."""
    try:
        return importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingExtraError(f"A search (--trials) needs Optuna, which is not installed. {install('sweep')}") from None


def suggested(plan: Plan, finished: Sequence[tuple[Options, float | None]], number: int) -> Options:
    """The options of trial `number`, by TPE from (options, figure) of those before; None: it has failed.

    The same arguments give the same options, so a search that was stopped goes on as if it had not been.
    Source: Bergstra et al. 2011, Algorithms for hyper-parameter optimization, section 4.
    """
    package = optuna()
    package.logging.set_verbosity(package.logging.WARNING)
    kinds = {key: _distribution(package.distributions, values) for key, values in plan.swept.items()}
    study = package.create_study(
        sampler=package.samplers.TPESampler(seed=number), direction="minimize" if plan.minimise else "maximize"
    )
    for options, value in finished:
        params = {key: x if isinstance(plan.swept[key], Range) else json.dumps(x) for key, x in options.items()}
        state = package.trial.TrialState.FAIL if value is None else package.trial.TrialState.COMPLETE
        study.add_trial(package.trial.create_trial(state=state, params=params, distributions=kinds, value=value))
    params = study.ask(kinds).params
    return {key: _rounded(x, params[key]) if isinstance(x, Range) else json.loads(params[key]) for key, x in plan.swept.items()}


def _distribution(kinds: Any, values: tuple[Any, ...] | Range) -> Any:
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution([json.dumps(value) for value in values])
    kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _rounded(values: Range, x: float) -> float:
    """Four digits, within the range."""
    return x if values.whole else min(max(float(f"{x:.4g}"), values.low), values.high)


# One run, in a process of its own -----------------------------------------------------------------------------------------


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """Trains the run of a job, or goes on with it: {"figures": {name: number or None}, "slot": ..., "skipped": why}."""
    path, given = Path(job["path"]), dict(job["overrides"])
    with Signals() as signals:
        how = session.Session(signals, job["device"], False, False, False, print, print)
        begin = session.resumed if is_run(path) else session.new
        trained = begin(how, job["recipe"], path, given, job["seed"])
    figures, slot, skipped = {name: getattr(trained, name) for name in TRAINED}, None, None
    try:
        found, slot, skipped = nats(path, job["device"])
    except (ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError) as error:
        found, skipped = {}, f"Rate and distortion were not measured, because: {error}"
    return {"figures": {"rate": None, "distortion": None, **figures, **found}, "slot": slot, "skipped": skipped}


def nats(path: Path, device: str) -> tuple[dict[str, float | None], str | None, str | None]:
    """(rate and distortion in nats per step, by the prior of which slot, why one is missing) of a run's newest world model."""
    with Run.open(path) as run:
        agent = run.agent("newest", device=device)
        played = held_out(agent, run, EPISODES, None)
        if played.warning:
            return {}, None, "Rate and distortion were not measured, because the environment played no held-out episodes."
        evidence = gathered(agent.policy.world.eval(), str(path), played.fitted, played.played)
    section = likelihood(evidence)
    slot = next((slot for slot in ("marginal", "transition") if f"{slot} rate" in section.figures), None)
    if slot is None:
        return {}, None, section.skipped
    values = {name: section.figures.get(f"{slot} {name}") for name in ("rate", "distortion")}
    known = {
        name: x.value if x is not None and x.value is not None and math.isfinite(x.value) else None for name, x in values.items()
    }
    exact = "There is no distortion, because the latent is the observation itself: its rate is all that it costs."
    return known, slot, exact if values["distortion"] is None else section.skipped


# All of them --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """What a sweep has measured.

    runs    [{options, seed, figures, slot, skipped, failed}]: `failed` is None, or why there are no figures
    stale   whether another source than this has made some of them
    folder  where the report is, and the runs
    """

    plan: Plan
    seeds: tuple[int, ...]
    runs: tuple[dict[str, Any], ...]
    stale: bool
    folder: str

    @property
    def groups(self) -> list[list[dict[str, Any]]]:
        """The runs of each combination, the best first."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.runs:
            found.setdefault(json.dumps(run["options"], sort_keys=True), []).append(run)
        sign = 1 if self.plan.minimise else -1

        def place(group: list[dict[str, Any]]) -> float:
            value = median(group, self.plan.figure)
            return math.inf if value is None else sign * value

        return sorted(found.values(), key=place)

    @property
    def best(self) -> dict[str, Any] | None:
        """{options, figures}: medians over seeds; None where nothing has the figure that is compared."""
        group = next(iter(self.groups), [])
        if median(group, self.plan.figure) is None:
            return None
        return {"options": group[0]["options"], "figures": {name: median(group, name) for name in FIGURES}}

    @property
    def all_failed(self) -> bool:
        return all(run["failed"] for run in self.runs)

    @property
    def sentences(self) -> list[str]:
        """Which combination is best, and what is missing."""
        found, best = [], self.best
        way = "lowest" if self.plan.minimise else "highest"
        if best is None:
            found.append(f"No combination is best: none has a {self.plan.figure}.")
        else:
            value = best["figures"][self.plan.figure]
            found.append(f"The {way} {self.plan.figure}, {value:.4g}, is that of `{label(best['options'])}`.")
        if failed := sum(bool(run["failed"]) for run in self.runs):
            found.append(
                f"{failed} of {len(self.runs)} runs failed: the table at the end says why; the same command tries them again."
            )
        if self.stale:
            found.append("The source changed while some of these runs were made: the same command makes them again.")
        return found

    def to_json(self) -> dict[str, Any]:
        """What `worldmodel sweep --json` prints."""
        return {
            "recipe": self.plan.recipe,
            "seeds": list(self.seeds),
            "fixed": self.plan.fixed,
            "runs": list(self.runs),
            "best": self.best,
            "sentences": self.sentences,
            "out": self.folder,
        }

    # As a report ------------------------------------------------------------------------------------------------------------

    def lines(self) -> list[dict[str, str]]:
        """A line of the table for each combination; a figure that no run has is left out."""
        names = [name for name in FIGURES if any(median(group, name) is not None for group in self.groups)]
        return [
            {
                **{key: shown(value) for key, value in group[0]["options"].items()},
                "seeds": f"{sum(not run['failed'] for run in group)} of {len(group)}",
                **{name: cell(group, name) for name in names},
            }
            for group in self.groups
        ]

    def parts(self) -> list[Part]:
        """The table, its figures, and what is missing."""
        lines = self.lines()
        meaning = ["Medians over seeds (lowest to highest). Rate and distortion: nats per step of the newest world model."]
        found = [Part("combinations", meaning, tuple(lines[0]), [list(x.values()) for x in lines], None, self.figures())]
        because = [(label(run["options"]), str(run["seed"]), run["failed"] or run["skipped"]) for run in self.runs]
        missing = [line for line in because if line[2]]
        return [*found, Part("failed, skipped", (), ("run", "seed", "because"), missing)] if missing else found

    def figures(self) -> dict[str, bytes]:
        """{caption: PNG}: what is compared over the one option that is a number, and rate against distortion."""
        found, key, figure = {}, self._number(), self.plan.figure
        if key is not None and (lines := self._points(key, figure)):
            x = [point[1] for points in lines.values() for point in points]
            log = min(x) > 0 and max(x) / min(x) > 10
            found[f"{figure} over {key}"] = pictures.points_figure(lines, key, figure, log)
        known = [group for group in self.groups if median(group, "rate") is not None and median(group, "distortion") is not None]
        curves: dict[str, list[tuple[str, float, float, float, float]]] = {}
        for group in sorted(known, key=lambda group: group[0]["options"][key] if key else median(group, "rate")):
            options, (rate, distortion) = group[0]["options"], (median(group, name) for name in ("rate", "distortion"))
            slots = dict.fromkeys(run["slot"] for run in group if run["slot"])
            text = shown(options[key]) if key else label(options)
            name = f"{_others(options, key) if key else ''} by the {' and '.join(slots)}".strip()
            curves.setdefault(name, []).append((text, rate, distortion, distortion, distortion))
        if curves:
            labels = "rate, nats per step", "distortion, nats per step"
            found["rate and distortion"] = pictures.points_figure(curves, *labels)
        return found

    def _number(self) -> str | None:
        """The one swept option of numbers, if it is the only one."""
        values = {key: [run["options"][key] for run in self.runs] for key in self.plan.swept}
        numbers = [
            key for key, each in values.items() if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in each)
        ]
        return numbers[0] if len(numbers) == 1 else None

    def _points(self, key: str, figure: str) -> dict[str, list[tuple[str, float, float, float, float]]]:
        """Lines of (label, value, median, lowest, highest), one for each combination of the other options."""
        found: dict[str, list[tuple[str, float, float, float, float]]] = {}
        for group in sorted(self.groups, key=lambda group: group[0]["options"][key]):
            if values := list(_known(group, figure)):
                options = group[0]["options"]
                point = ("", options[key], statistics.median(values), min(values), max(values))
                found.setdefault(_others(options, key), []).append(point)
        return found


def _others(options: Mapping[str, Any], key: str) -> str:
    return label({name: value for name, value in options.items() if name != key})


def _known(group: Sequence[Mapping[str, Any]], figure: str) -> Iterator[float]:
    return (value for run in group if (value := run["figures"].get(figure)) is not None)


def median(group: Sequence[Mapping[str, Any]], figure: str) -> float | None:
    """Over the seeds that have the figure; None where none has."""
    values = list(_known(group, figure))
    return statistics.median(values) if values else None


def cell(group: Sequence[Mapping[str, Any]], figure: str) -> str:
    """`412 (380 to 500)`, and of how many runs where some have no such figure."""
    values, runs = list(_known(group, figure)), sum(not run["failed"] for run in group)
    if not values:
        return ""
    middle, low, high = (
        f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}" for x in (statistics.median(values), min(values), max(values))
    )
    text = f"{middle} ({low} to {high})" if low != high else middle
    return text if len(values) == runs else f"{text}, {len(values)} of {runs}"
