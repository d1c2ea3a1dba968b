"""How true roll-outs are: their errors beside those of simple forecasts, their draws beside what happened, rewards and ends.

A roll-out sees a few rows of a held-out episode and goes on under the recorded actions. It is compared with three forecasts that
need no world model, or a plain one: the last observation repeated (persistence), the mean of all replayed observations
(climatology), and an ensemble of perceptrons that learned from the same replayed rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.data import Episodes
from worldmodel.diagnostics.calibration import SAMPLES as DRAWS
from worldmodel.diagnostics.calibration import draw_scores, fair_crps, spread_knows
from worldmodel.diagnostics.evidence import Curve, Evidence, Figure, Section, bootstrap, joined, resampled
from worldmodel.diagnostics.geometry import FilteredStates
from worldmodel.diagnostics.mlp_ensemble import BLOCK, MEMBERS, MlpWorld
from worldmodel.diagnostics.rollouts import NUMBERS_AT_ONCE, ROLLOUTS_AT_ONCE, Rollout, _errors, roll_out, spaced_starts
from worldmodel.diagnostics.usage import reads_off
from worldmodel.model import WorldModel
from worldmodel.storage.weights import cpu_randomness

HORIZONS = (1, 5, 15)
"""Steps ahead that figures are of."""
SAMPLES, EVERY, STARTS = 20, 10, 400
"""Roll-outs whose mean is the prediction, rows between two starts, and starts at most. A mean of so many has 2.5 % more of the
error's root than an exact one, where all of the error is noise."""
PICTURE_STARTS, NEXT_STARTS = 24, 4000
"""Starts at most where observations hold pictures, which cost more; and of one step for the next reward and end: ends are rare."""
NEXT_SAMPLES = 8
PEER_UPDATES, PEER_BATCH = 2000, 64
"""Of the ensemble of perceptrons: about 10 s on one quiet thread, a fifth of what `benchmarks/truth.py` gives it."""
PEER_ROWS = 4 * BLOCK
"""Replayed steps below which it is not fitted."""
CLIMATE = 99
"""Replayed observations that are climatology's draws."""
ENDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Where the bins of P(continue) begin. They are finer near 1, where almost all predictions are."""
REWARD_BINS = 10
SMALLEST = 1e-12
"""Squares below it count as that in a denominator."""
TOO_SURE, TOO_WIDE = 0.8, 2.0
"""Coverage of nominal 90 % below which draws are called too sure, and spread over error above which they are called too wide."""


# Estimators -----------------------------------------------------------------------------------------------------------


def root(square: Figure) -> Figure:
    """The square root of a figure and of its interval."""
    value, low, high = (None if x is None else math.sqrt(max(x, 0.0)) for x in (square.value, square.low, square.high))
    return Figure(value, low, high, square.unit)


def ratio(
    one: Float[Tensor, " R"], other: Float[Tensor, " R"], episode: Int[Tensor, " R"], seed: int = 0, unit: str = ""
) -> Figure:
    """The mean of one over the mean of another quantity of the same rows, not below 0, with its interval over episodes."""
    weight = other.double().clamp_min(SMALLEST)
    return bootstrap(one.double() / weight, episode, seed, unit, weight=weight)


def skill(of_score: Figure) -> Figure:
    """1 - score / score of the reference: 1 is perfect, 0 no better than the reference. Of the figure of that ratio."""
    value, high, low = (None if x is None else 1 - x for x in (of_score.value, of_score.low, of_score.high))
    return Figure(value, low, high, of_score.unit)


def slope(predicted: Float[Tensor, " N"], real: Float[Tensor, " N"]) -> float:
    """The slope of the real number on the predicted one: 1 where predictions are calibrated, below 1 where they overshoot.

    NaN where one of the two hardly varies. Source: Mincer and Zarnowitz 1969.
    """
    x, y = predicted.double() - predicted.double().mean(), real.double() - real.double().mean()
    varies, spread = x.square().mean(), y.square().mean()
    if float(spread) < SMALLEST or float(varies) < 1e-4 * float(spread):
        return math.nan
    return float((x * y).mean() / varies)


def reliability(
    predicted: Float[Tensor, " N"], happened: Float[Tensor, " N"], edges: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Int[Tensor, " B"]]:
    """(mean prediction, mean of what happened, count) in each bin of predictions; NaN in empty ones.

    edges   where bins begin, in ascending order; what lies below the first one is in the first bin

    Source: Murphy and Winkler 1977 (reliability diagram).
    """
    which = (torch.bucketize(predicted.double(), edges.double(), right=True) - 1).clamp_min(0)
    count = torch.bincount(which, minlength=len(edges))
    sums = (torch.zeros(len(edges)).double().index_add_(0, which, x.double()) for x in (predicted, happened))
    means = [x / torch.where(count > 0, count.double(), torch.nan) for x in sums]
    return means[0], means[1], count


def calibration_error(predicted: Float[Tensor, " N"], happened: Float[Tensor, " N"], edges: Float[Tensor, " B"]) -> float:
    """Expected calibration error: mean distance of prediction and frequency over bins, weighted by their counts.

    It is above 0 for few rows, also of a calibrated forecast. Source: Naeini et al. 2015, eq. 3.
    """
    mean, frequency, count = reliability(predicted, happened, edges)
    return float((count * (mean - frequency).abs()).nansum() / len(predicted))


# Roll-outs ------------------------------------------------------------------------------------------------------------


def some_starts(episodes: Episodes, context: int, every: int, limit: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"]]:
    """(episode, first row) of at most so many windows, evenly spaced among those of `spaced_starts`."""
    episode, start = spaced_starts(episodes, context, every)
    if len(episode) > limit:
        chosen = torch.linspace(0, len(episode) - 1, limit, dtype=torch.float64).round().long()
        episode, start = episode[chosen], start[chosen]
    return episode, start


def most_starts(world: WorldModel) -> int:
    """How many starts a roll-out of several steps has at most."""
    return PICTURE_STARTS if any(key.kind == "image" for key in world.obs.keys.values()) else STARTS


def on_device(roll: Rollout, device: torch.device) -> Rollout:
    """The roll-outs of a model that lives elsewhere, as the peer does."""
    obs = {name: {k: x.to(device) for k, x in getattr(roll, name).items()} for name in ("truth", "seen", "imagined")}
    rest = {name: getattr(roll, name).to(device) for name in ("window", "inside", "reward", "cont", "uncertainty")}
    return Rollout(**obs, **rest)


def rolled(
    model: Any,
    episodes: Episodes,
    starts: tuple[Int[Tensor, " S"], Int[Tensor, " S"]],
    context: int,
    horizon: int,
    samples: int,
    generator: torch.Generator | None = None,
    *,
    draw: bool = False,
) -> Iterator[Rollout]:
    """The roll-outs from all starts, in parts that fit into memory. `model`: a world model, or one with its verbs."""
    episode, start = starts
    numbers = 1 if model.decoder is None else sum(math.prod(key.shape) for key in model.obs.keys.values())
    at_once = max(1, min(ROLLOUTS_AT_ONCE, NUMBERS_AT_ONCE // (horizon * numbers)) // samples)
    for rows in torch.arange(len(episode)).split(at_once):
        options = {"samples": samples, "generator": generator, "draw": draw}
        yield roll_out(model, episodes, episode[rows], start[rows], context, horizon, **options)


def climatology(world: WorldModel, fitted: FilteredStates) -> dict[str, Tensor]:
    """{key: the mean of all replayed observations}, in canonical form."""
    sums = {name: torch.zeros(key.shape, dtype=torch.float64) for name, key in world.obs.keys.items()}
    for part in torch.arange(len(fitted.step)).split(1024):
        obs = world.obs.canonical({name: x[part, 0].cpu() for name, x in fitted.rows.obs.items()})
        sums = {name: x + obs[name].double().sum(0) for name, x in sums.items()}
    return {name: x / len(fitted.step) for name, x in sums.items()}


@dataclass(frozen=True)
class Errors:
    """Squared errors of S open-loop roll-outs at horizons 1..H, each the mean over the numbers of an observation, in deviations.

    episode      [S]     where each starts
    inside       [S, H]  whether the step is known
    model, persistence, climatology  [S, H]  NaN without a decoder
    reward       [S, H]  squared error of the reward, in its unit
    real_reward  [S, H]
    uncertainty  [S, H]  the model's own, mean of the roll-outs; zeros without an ensemble
    """

    episode: Int[Tensor, " S"]
    inside: Bool[Tensor, "S H"]
    model: Float[Tensor, "S H"]
    persistence: Float[Tensor, "S H"]
    climatology: Float[Tensor, "S H"]
    reward: Float[Tensor, "S H"]
    real_reward: Float[Tensor, "S H"]
    uncertainty: Float[Tensor, "S H"]


def errors_by_start(
    world: WorldModel,
    model: Any,
    episodes: Episodes,
    mean: dict[str, Tensor],
    context: int,
    horizon: int,
    *,
    samples: int = SAMPLES,
    generator: torch.Generator | None = None,
) -> Errors:
    """Errors of `model`, which may be the peer, in units of `world`. `mean`: what `climatology` predicts."""
    starts, parts = some_starts(episodes, context, EVERY, most_starts(world)), []
    for roll in rolled(model, episodes, starts, context, horizon, samples, generator):
        roll = on_device(roll, world.device)
        errors = _errors(world, roll, context)
        model_squares, persistence = errors[..., 4:].chunk(2, -1)
        away = [
            ((roll.truth[name][:, context:] - mean[name].to(roll.truth[name])) / world.scaling.deviation(name)).square().flatten(2)
            for name in roll.imagined
        ]
        constant = torch.cat(away, -1).mean(-1) if away else torch.full_like(errors[..., 0], torch.nan)
        inside, reward = roll.inside[:, context:], roll.window.reward[:, context:]
        means = model_squares.mean(-1), persistence.mean(-1), constant
        parts.append((inside, *means, errors[..., 1], reward, errors[..., 3]))
    columns = [torch.cat([x.cpu() for x in column]) for column in zip(*parts)] or [torch.zeros(0, horizon)] * 7
    return Errors(starts[0], columns[0].bool(), *columns[1:])


def transitions(fitted: FilteredStates) -> Episodes:
    """The replayed rows as episodes; where rows are missing behind one, it is the last of its episode."""
    episode, step = fitted.episode.cpu(), fitted.step.cpu()
    opens = torch.ones_like(episode, dtype=torch.bool)
    opens[1:] = (episode[1:] != episode[:-1]) | (step[1:] != step[:-1] + 1)
    rows = fitted.rows.map(lambda x: x.transpose(0, 1).cpu())
    return Episodes(replace(rows, is_first=opens.unsqueeze(0), is_last=opens.roll(-1).unsqueeze(0)))


def peer(evidence: Evidence, updates: int = PEER_UPDATES) -> MlpWorld | str:
    """The ensemble of perceptrons, fitted to the replayed rows in so many updates; or why there is none."""
    world = evidence.world
    if [key.kind for key in world.obs.keys.values()] != ["vector"]:
        return "because it knows observations of one vector only"
    episodes = transitions(evidence.fitted)
    count = int((~episodes.rows.is_last).sum())
    if count < PEER_ROWS:
        return f"because {count} replayed steps are too few to learn from; it takes {PEER_ROWS}"
    with cpu_randomness():  # it draws from torch's own generator
        return MlpWorld(world.obs, world.action, episodes, evidence.seed, batch=PEER_BATCH, updates=updates)


# The section ----------------------------------------------------------------------------------------------------------


def rollouts(evidence: Evidence, context: int = 5, horizon: int = 15, updates: int = PEER_UPDATES) -> Section:
    """Open-loop roll-outs of `horizon` steps from held-out episodes, of which the model sees `context` rows.

    updates   of the ensemble of perceptrons that learns from the same replayed rows; 0: without it
    """
    if not len(spaced_starts(evidence.episodes, context, EVERY)[0]):
        reason = f"because no held-out episode has more than {context} rows, which the model sees first."
        return Section(skipped=f"Roll-outs were not measured, {reason}")
    mean = climatology(evidence.world, evidence.fitted)
    errors = errors_by_start(
        evidence.world, evidence.world, evidence.episodes, mean, context, horizon, generator=evidence.generator(31)
    )
    sections = [_draws(evidence, context, horizon), _rewards(evidence, errors), _next(evidence, context)]
    if evidence.world.decoder is None:
        sections.insert(0, Section(skipped="Errors of observations were not measured, because the model has no decoder."))
    else:
        sections.insert(0, _observations(evidence, errors, mean, context, updates))
    return joined(sections)


def _at(errors: Errors) -> list[int]:
    """The horizons of figures that fit into an episode."""
    return [h for h in HORIZONS if h <= errors.inside.shape[1] and bool(errors.inside[:, h - 1].any())]


def _by_horizon(squares: Float[Tensor, "S H"], inside: Bool[Tensor, "S H"]) -> list[float | None]:
    """The root mean square at each horizon, for a curve."""
    means = torch.where(inside, squares, 0).double().sum(0) / inside.sum(0)
    return [float(x) if bool(x.isfinite()) else None for x in means.sqrt()]


def _observations(evidence: Evidence, errors: Errors, mean: dict[str, Tensor], context: int, updates: int) -> Section:
    """Errors of observations over those of the three forecasts."""
    world, seed, inside, horizon = evidence.world, evidence.seed, errors.inside, errors.inside.shape[1]
    others, skipped = {"persistence": errors.persistence, "climatology": errors.climatology}, None
    fitted = peer(evidence, updates) if updates else "because it was not asked for"
    if isinstance(fitted, str):
        skipped = f"The error over that of an MLP ensemble was not measured, {fitted}."
    else:
        own = errors_by_start(world, fitted, evidence.episodes, mean, context, horizon, samples=MEMBERS)
        others["mlp"] = own.model
    figures: dict[str, Figure] = {}
    for h in _at(errors):
        rows = inside[:, h - 1]
        episode, square = errors.episode[rows], errors.model[rows, h - 1]
        figures[f"error at {h}"] = root(bootstrap(square, episode, seed, "deviations"))
        for name, other in others.items():
            figures[f"error over {name} at {h}"] = root(ratio(square, other[rows, h - 1], episode, seed))
    lines = {name: _by_horizon(squares, inside) for name, squares in {"model": errors.model, **others}.items()}
    x = [float(h) for h in range(1, horizon + 1)]
    curves = {"error by horizon": Curve(x, lines, "steps ahead", "root mean square, deviations")}
    return Section(figures, skipped, tuple(_verdicts(evidence, figures, _at(errors))), curves)


def ahead(horizon: int) -> str:
    """A horizon in words."""
    return f"{horizon} step{'' if horizon == 1 else 's'} ahead"


def _verdicts(evidence: Evidence, figures: dict[str, Figure], horizons: list[int]) -> Iterator[str]:
    """Where another forecast is surely better; or one sentence that none is."""
    reported = False
    names = {
        "persistence": "repeating the last observation",
        "climatology": "predicting the mean observation",
        "mlp": "an MLP ensemble that learned from the same rows",
    }
    for name, words in names.items():
        known = {h: figures.get(f"error over {name} at {h}", Figure(None)) for h in horizons}
        worse = [h for h, figure in known.items() if figure.surely_above(1.1 if name == "mlp" else 1.0)]
        if worse:
            reported, h = True, max(worse, key=lambda h: known[h].value)
            remedy = f"learn for longer: {evidence.train_longer}"
            if name == "mlp" and not reads_off(evidence.world):
                remedy = (
                    f"latents that are the observation may be truer: `worldmodel train {evidence.run}/config.yaml model=anchored`"
                )
            yield f"{ahead(h)} the error is {known[h]} times that of {words}; {remedy}."
    if not reported and horizons:
        last, error = horizons[-1], figures[f"error over persistence at {horizons[-1]}"]
        yield f"{ahead(last)} the error is {error} times that of repeating the last observation."


def numbers(world: WorldModel, obs: dict[str, Tensor], keys: list[str], dims: int) -> Float[Tensor, "*N D"]:
    """The numbers of some keys side by side, in deviations; `dims` dimensions stand in front."""
    return torch.cat([(obs[name] / world.scaling.deviation(name)).flatten(dims) for name in keys], -1).float()


def _draws(evidence: Evidence, context: int, horizon: int) -> Section:
    """Drawn observations against what happened: scores, coverage, spread."""
    world = evidence.world
    keys = [name for name, key in world.obs.keys.items() if key.kind != "image"]
    if world.decoder is None or not keys:
        what = "the model has no decoder" if world.decoder is None else "pixels are no independent numbers"
        return Section(skipped=f"Draws of observations were not measured, because {what}.")
    starts, parts = some_starts(evidence.episodes, context, EVERY, most_starts(world)), []
    for roll in rolled(world, evidence.episodes, starts, context, horizon, DRAWS, evidence.generator(32), draw=True):
        truth = numbers(world, roll.truth, keys, 2)
        drawn, last = numbers(world, roll.imagined, keys, 3), truth[:, context - 1 : context]
        scores, square, variance = draw_scores(drawn - truth[:, None, context:])
        still = (last - truth[:, context:]).abs().mean(-1)
        parts.append([x.cpu() for x in (roll.inside[:, context:], scores, square, variance, still, truth[:, context:])])
    inside, scores, square, variance, still, truth = (torch.cat(column) for column in zip(*parts))
    chosen = torch.linspace(0, len(evidence.fitted.step) - 1, CLIMATE, dtype=torch.float64).round().long()
    rows = world.obs.canonical({name: x[chosen, 0].to(world.device) for name, x in evidence.fitted.rows.obs.items()})
    rows = numbers(world, rows, keys, 1).cpu()
    figures: dict[str, Figure] = {}
    for h in HORIZONS:
        fits = inside[:, h - 1] if h <= horizon else inside.new_zeros(len(inside))
        if not bool(fits.any()):
            continue
        at, episode = (fits, h - 1), starts[0][fits]
        constant = fair_crps(rows.expand(int(fits.sum()), -1, -1), truth[at]).mean(-1)
        figures |= _calibrated(
            scores[at], square[at], variance[at], {"persistence": still[at], "climatology": constant}, h, episode
        )
    return Section(figures, None, tuple(_of_draws(evidence, figures)))


def _calibrated(
    scores: Float[Tensor, "S 3"],
    square: Float[Tensor, "S D"],
    variance: Float[Tensor, "S D"],
    others: dict[str, Float[Tensor, " S"]],
    h: int,
    episode: Int[Tensor, " S"],
) -> dict[str, Figure]:
    """The figures of draws at one horizon; `others`: scores of the forecasts that they are compared with."""
    crps, half, nine_tenths = scores.unbind(-1)
    factor = (DRAWS + 1) / DRAWS  # as in `spread_skill`
    found = {
        f"crps at {h}": bootstrap(crps, episode, unit="deviations"),
        **{f"crps skill over {name} at {h}": skill(ratio(crps, score, episode)) for name, score in others.items()},
        f"coverage of 50 % at {h}": bootstrap(half, episode),
        f"coverage of 90 % at {h}": bootstrap(nine_tenths, episode),
        f"spread over error at {h}": root(ratio(factor * variance.mean(-1), square.mean(-1), episode)),
        f"spread knows error at {h}": resampled(lambda rows: float(spread_knows(variance[rows], square[rows], DRAWS)), episode),
    }
    if len(scores) < 3:  # no slope
        found[f"spread knows error at {h}"] = Figure(None)
    return found


def _of_draws(evidence: Evidence, figures: dict[str, Figure]) -> Iterator[str]:
    """What is wrong with the size of the draws' spread; or one sentence that nothing is."""
    covered = {h: figures[f"coverage of 90 % at {h}"] for h in HORIZONS if f"coverage of 90 % at {h}" in figures}
    sure = [h for h, figure in covered.items() if figure.surely_below(TOO_SURE)]
    wide = [h for h in covered if figures[f"spread over error at {h}"].surely_above(TOO_WIDE)]
    if sure:
        h = min(sure, key=lambda h: covered[h].value)
        remedy = f"`worldmodel train {evidence.run}/config.yaml model=anchored`"
        if evidence.world.dynamics.latent.continuous:
            remedy = f"`worldmodel fit-prior {evidence.run} --slot transition --kind flow`"
        yield (
            f"Draws are too sure: {ahead(h)}, intervals of 90 % hold {covered[h]} of what happens; a transition of another "
            f"form may help: {remedy}."
        )
    if wide:
        h = wide[0]
        text = f"Draws are too wide: {ahead(h)} they spread {figures[f'spread over error at {h}']} times as far as they err;"
        yield f"{text} learn for longer: {evidence.train_longer}."
    if covered and not sure and not wide:
        h = max(covered)
        yield f"{ahead(h)}, intervals of 90 % hold {covered[h]} of what happens."


def _rewards(evidence: Evidence, errors: Errors) -> Section:
    """Errors of rewards by horizon, and over those of predicting their mean."""
    replayed = evidence.fitted.rows.reward[~evidence.fitted.rows.is_first].double().cpu()
    mean = float(replayed.mean()) if len(replayed) else math.nan
    figures: dict[str, Figure] = {}
    for h in _at(errors):
        rows = errors.inside[:, h - 1]
        episode, square, real = errors.episode[rows], errors.reward[rows, h - 1], errors.real_reward[rows, h - 1].double()
        figures[f"reward error at {h}"] = root(bootstrap(square, episode, evidence.seed, "reward"))
        constant = (real - mean).square()
        varies = float(constant.mean()) > 1e-8 * mean**2
        over = root(ratio(square, constant, episode, evidence.seed)) if varies else Figure(None)
        figures[f"reward error over its mean at {h}"] = over
    over = {h: figures[f"reward error over its mean at {h}"] for h in _at(errors)}
    worse = [h for h, figure in over.items() if figure.surely_above(1.0)]
    if worse:
        text = f"{ahead(worse[0])} rewards err {over[worse[0]]} times as much as their mean would; let their loss count more:"
        return Section(figures, None, (f"{text} `worldmodel train {evidence.run}/config.yaml train.scales.reward=10`.",))
    return Section(figures)


def _next(evidence: Evidence, context: int) -> Section:
    """The next step's reward and end against what was predicted."""
    world, seed = evidence.world, evidence.seed
    limit = NEXT_STARTS if most_starts(world) == STARTS else STARTS
    starts, parts = some_starts(evidence.episodes, context, 1, limit), []
    for roll in rolled(world, evidence.episodes, starts, context, 1, NEXT_SAMPLES, evidence.generator(33)):
        row = roll.window.window(context)
        columns = roll.reward.mean(1), row.reward, roll.cont.mean(1), ~row.is_terminal
        parts.append([x[:, 0].cpu().double() for x in columns])
    reward, real, cont, goes_on = (torch.cat(column) for column in zip(*parts))
    episode, edges = starts[0], torch.tensor(ENDS)
    ends = 1 - goes_on
    base = (~evidence.fitted.rows.is_terminal[~evidence.fitted.rows.is_first]).double().mean().cpu()
    brier = (cont - goes_on).square()
    figures = {
        "reward bias": bootstrap(reward - real, episode, seed, "reward"),
        "reward slope": resampled(lambda rows: slope(reward[rows], real[rows]), episode, seed),
        "continue calibration error": resampled(lambda rows: calibration_error(cont[rows], goes_on[rows], edges), episode, seed),
        "continue brier": bootstrap(brier, episode, seed),
        "continue brier skill": Figure(None),
    }
    skipped = None
    if bool(ends.any()) and bool(base < 1):
        figures["continue brier skill"] = skill(ratio(brier, (base - goes_on).square(), episode, seed))
    else:
        skipped = "The skill of predicted ends was not measured, because no replayed or no held-out episode terminates."
    mean, frequency, _ = reliability(cont, goes_on, edges)
    curves = {"reliability of continue": _diagram(mean, frequency, "P(continue)", "frequency")}
    if float(real.var(correction=0)) > SMALLEST:
        quantiles = reward.quantile(torch.linspace(0, 1, REWARD_BINS + 1).double()[:-1]).unique()
        mean, frequency, _ = reliability(reward, real, quantiles)
        curves["reliability of rewards"] = _diagram(mean, frequency, "predicted reward", "mean real reward")
    varies = "reliability of rewards" in curves
    return Section(figures, skipped, tuple(_of_next(evidence, figures, varies)), curves)


def _diagram(mean: Tensor, happened: Tensor, x_label: str, y_label: str) -> Curve:
    """A reliability diagram: the diagonal is right."""
    known = mean.isfinite()
    x = mean[known].tolist()
    return Curve(x, {"observed": happened[known].tolist(), "right": x}, x_label, y_label)


def _of_next(evidence: Evidence, figures: dict[str, Figure], varies: bool) -> Iterator[str]:
    """What is wrong with predicted rewards and ends; or one sentence that nothing is. `varies`: whether real rewards do."""
    reported, known = False, figures["reward slope"]
    if varies and not known.known:
        reported = True
        yield (
            f"Predicted rewards are all alike, {figures['reward bias']} off on average, and real ones are not; learn for longer: "
            f"{evidence.train_longer}."
        )
    if known.surely_below(0.8) or known.surely_above(1.25):
        reported = True
        text = f"Predicted rewards {'overshoot' if known.surely_below(0.8) else 'are too flat'}: the slope of real ones on them is "
        yield f"{text}{known}; learn for longer: {evidence.train_longer}."
    found = figures["continue brier skill"]
    if found.surely_below(0.0):
        reported = True
        text = f"Ends are predicted worse than by their frequency alone, with a skill of {found}; show more of them:"
        yield f"{text} `worldmodel train {evidence.run}/config.yaml train.terminal_fraction=0.5`."
    error = figures["continue calibration error"]
    if error.surely_above(0.05):
        reported = True
        text = f"P(continue) is {error} off what happens; show fewer or more ends:"
        yield f"{text} `worldmodel train {evidence.run}/config.yaml train.terminal_fraction=0.5`."
    if not reported:
        yield f"The next reward and the next end are predicted without clear bias: P(continue) is {error} off what happens."
