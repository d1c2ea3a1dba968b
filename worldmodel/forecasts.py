"""What if? What a world model expects of plans, from what was seen and done; all in the environment's own units.

T steps of history   observations x_0 .. x_T, actions a_0 .. a_(T-1)
a plan               the H actions from x_T on; index h of every array belongs to the arrival after its action h
K samples            roll-outs, each from a draw of the belief about x_T; the k-th of one plan and of another draw alike
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Batch, Sampling, State
from worldmodel.errors import ConfigError, NumericsError, did_you_mean, require_whole
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import flatten, numbers
from worldmodel.spaces.keys import KeySpec
from worldmodel.spaces.names import signal_names

NUMBERS_AT_ONCE = 1 << 22
"""Numbers of observations that are encoded or decoded together."""
MAX_NUMBERS = 1 << 28
"""Numbers that one plan may need at a time: a gibibyte of float32."""
TOLERANCE = 1e-6
"""Share of a bound's span by which rounding may take an action over it."""

Arrays = np.ndarray | dict[str, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Forecast:
    """What the model expects of one plan of H actions, over K samples.

    name              of the plan
    actions           [H, *action]  the plan, as the environment takes it
    observation_mean  [H, ...]  expected observation after each action, as if the episode went on until then; {key: [H, ...]}
                      where the space is a Dict, None where the model has no decoder. Vectors are floats in the environment's units,
                      pictures have its layout, range and dtype; of a Discrete or MultiDiscrete it is the probability of each
                      category, group after group [H, sum of categories], of bits that of a 1
    observation_std   the same shapes, floats: the deviation of the expected observation over samples. That is how unsure the model
                      is of where the plan leads; the noise of a single measurement, which a decoder may model, is not in it
    reward_mean, reward_std  [H]  reward on arriving, as if the episode went on until then, and its deviation over samples
    survival          [H]  probability that the episode has not terminated by then (a time limit is no termination)
    uncertainty       [H]  disagreement of the model's ensemble, in deviations of the embedding, or of the transition's members, in
                      those of the latent; None without either
    returns           [K]  in each sample: the sum of discount^h * reward * probability that the step is reached
    discount          of the returns
    names             {key: names of the canonical numbers} of all keys but pictures; `env.names` where a config has them
    """

    name: str
    actions: np.ndarray
    observation_mean: Arrays | None
    observation_std: Arrays | None
    reward_mean: np.ndarray
    reward_std: np.ndarray
    survival: np.ndarray
    uncertainty: np.ndarray | None
    returns: np.ndarray
    discount: float = 1.0
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def return_mean(self) -> float:
        """Expected return of the plan."""
        return float(self.returns.mean())

    @property
    def return_std(self) -> float:
        """Deviation of the return over samples."""
        return float(self.returns.std(ddof=1))

    @property
    def return_error(self) -> float:
        """Standard error of `return_mean`, as it is a mean of K samples."""
        return self.return_std / sqrt(len(self.returns))

    @property
    def signals(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{name: (mean [H], std [H])} of every number of the observation but pixels."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for key, names in self.names.items() if self.observation_mean is not None else ():
            mean, std = (
                (x[key] if isinstance(x, dict) else x).reshape(len(self.actions), -1)
                for x in (self.observation_mean, self.observation_std)
            )
            found |= {name: (mean[:, i], std[:, i]) for i, name in enumerate(names)}
        return found

    def to_dict(self, pictures: bool = False) -> dict[str, Any]:
        """Everything as JSON holds it: numbers, and lists of them; of observations that are pictures only with `pictures`."""
        of_pictures = () if pictures else self._pictures

        def plain(x: Any) -> Any:
            if isinstance(x, Mapping):
                return {name: plain(part) for name, part in x.items() if name not in of_pictures}
            return x.tolist() if isinstance(x, np.ndarray) else x

        single_picture = "obs" in of_pictures and not isinstance(self.observation_mean, dict)
        observation = {"observation_mean": self.observation_mean, "observation_std": self.observation_std}
        return {
            "name": self.name,
            "actions": plain(self.actions),
            **{name: None if single_picture else plain(x) for name, x in observation.items()},
            "reward_mean": plain(self.reward_mean),
            "reward_std": plain(self.reward_std),
            "survival": plain(self.survival),
            "uncertainty": plain(self.uncertainty),
            "returns": plain(self.returns),
            "return_mean": self.return_mean,
            "return_std": self.return_std,
            "return_error": self.return_error,
            "discount": self.discount,
            "names": {name: list(words) for name, words in self.names.items()},
        }

    @property
    def _pictures(self) -> tuple[str, ...]:
        """Keys of the observation that have no names, which are its pictures."""
        keys = self.observation_mean if isinstance(self.observation_mean, dict) else ("obs",)
        return tuple(key for key in keys if key not in self.names)

    def __repr__(self) -> str:
        return (
            f"Forecast('{self.name}', {len(self.actions)} steps: return {self.return_mean:.4g} +- {self.return_error:.2g}, "
            f"survival {self.survival[-1]:.3f})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class PlanRanking(Mapping[str, Forecast]):
    """Forecasts by plan, the one with the highest expected return first; a mapping in that order.

    forecasts     of P plans of the same length
    win_share     [P]  share of the samples in which the plan's return is the highest; a tie is shared
    behind        [P]  by how much its expected return lies below that of the first
    behind_error  [P]  standard error of that difference, in which samples are compared one by one

    Both certainties are those of sampling: they say what the model believes, not whether it is right.
    """

    forecasts: tuple[Forecast, ...]
    win_share: np.ndarray
    behind: np.ndarray
    behind_error: np.ndarray

    @classmethod
    def of(cls, forecasts: Sequence[Forecast]) -> PlanRanking:
        """The ranking of forecasts whose samples are paired: the k-th of each was drawn alike."""
        ranked = tuple(sorted(forecasts, key=lambda forecast: -forecast.return_mean))  # stable: the first given wins a tie
        returns = np.stack([forecast.returns for forecast in ranked])
        highest = returns == returns.max(0)
        difference = returns[0] - returns
        error = difference.std(1, ddof=1) / sqrt(returns.shape[1])
        return cls(ranked, (highest / highest.sum(0)).mean(1), difference.mean(1), error)

    @property
    def best(self) -> Forecast:
        """The forecast of the plan with the highest expected return."""
        return self.forecasts[0]

    def __getitem__(self, name: str) -> Forecast:
        for forecast in self.forecasts:
            if forecast.name == name:
                return forecast
        raise KeyError(f"{name!r}: the plans are {list(self)}")

    def __iter__(self) -> Iterator[str]:
        return (forecast.name for forecast in self.forecasts)

    def __len__(self) -> int:
        return len(self.forecasts)

    def to_dict(self, pictures: bool = False) -> dict[str, Any]:
        """{"plans": [...]}: as `Forecast.to_dict`, best first, each with its `win_share`, `behind` and `behind_error`."""
        columns = {"win_share": self.win_share, "behind": self.behind, "behind_error": self.behind_error}
        return {
            "plans": [
                {**forecast.to_dict(pictures), **{name: float(column[i]) for name, column in columns.items()}}
                for i, forecast in enumerate(self.forecasts)
            ]
        }

    def __repr__(self) -> str:
        lines = [
            f"{i + 1}. {forecast.name}: return {forecast.return_mean:.4g} +- {forecast.return_error:.2g}, survival "
            f"{forecast.survival[-1]:.3f}, highest in {share:.0%} of {len(forecast.returns)} samples"
            for i, (forecast, share) in enumerate(zip(self.forecasts, self.win_share))
        ]
        return "\n".join(lines)


@torch.no_grad()
def what_if(
    world: WorldModel,
    observations: Any,
    actions: Any,
    plan: Any,
    samples: int = 32,
    *,
    seed: int = 0,
    discount: float = 1.0,
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> Forecast | PlanRanking:
    """What `world` expects of a plan, or of several, from what was seen and done.

    observations  the T + 1 of an episode up to now: an array [T + 1, ...], {key: array} for a Dict space, or a list of them as
                  `reset` and `step` gave them; one alone where nothing was done yet (T = 0)
    actions       the T taken between them; None or [] where T = 0
    plan          the H actions to try [H, ...]; several as {name: actions}, or as a list of plans, which are then ranked
    samples       roll-outs that means and spreads are taken over, at least 2
    seed          of all draws: the same arguments give the same numbers. Plans share their draws, so that they compare fairly
    discount      of the return by which plans are ranked, per step; 1: the plain sum
    names         of the observation's numbers, as `signal_names` gives them; None: by their places

    All in the environment's own units and shapes. The first observation counts as its episode's first one. Gives a `Forecast`, or a
    `PlanRanking` of several plans. Raises ConfigError for what is not of the spaces, for NaN, lengths that do not fit one another,
    and plans too long for the memory; NumericsError where the model's numbers are not finite.
    """
    require_whole("what_if: ", samples=samples)
    if samples < 2:
        raise ConfigError("what_if: samples is 1, which has no spread. Expected 2 or more; 32 are usual.")
    if not 0 < discount <= 1:
        raise ConfigError(f"what_if: discount is {discount!r}; expected a number above 0 and at most 1.")
    plans, several = _plans(world.action, plan)
    _check_size(world, plans, samples)
    rows, prev_action = _history(world, observations, actions)
    names = signal_names(world.obs) if names is None else names
    world.eval()
    generator = torch.Generator(world.device)
    start = _filtered(world, rows, prev_action, samples, generator.manual_seed(seed))
    found = [_forecast(world, start, name, raw, discount, names, generator.manual_seed(seed + 1)) for name, raw in plans.items()]
    return PlanRanking.of(found) if several else found[0]


# What is given --------------------------------------------------------------------------------------------------------


def _history(world: WorldModel, observations: Any, actions: Any) -> tuple[dict[str, np.ndarray], Float[Tensor, "L A"]]:
    """(raw observations {key: [T + 1, ...]}, the canonical actions that led to each, 0 to the first). ConfigError."""
    where = "what_if: the history's actions"
    taken = torch.zeros(0, world.action.dim)
    if not (actions is None or (isinstance(actions, Sized) and not len(actions))):
        given = numbers(actions)
        if given is None or given.ndim == 0:
            raise ConfigError(f"{where} are no array of numbers. Expected {['T', *world.action.key.raw_shape]}.")
        taken = torch.from_numpy(world.action.encode(_actions(world.action, given, where)))
    rows = {}
    for name, value in _by_key(world.obs, observations).items():
        key, where = world.obs.keys[name], f"what_if: the history's observation '{name}'"
        value = numbers(value)
        if value is not None and not len(taken) and value.ndim == len(key.raw_shape):
            value = value[None]  # one observation, as reset() gives it
        if value is not None and value.ndim and len(value) != len(taken) + 1:
            raise ConfigError(
                f"what_if: the history has {len(value)} observations ('{name}') and {len(taken)} actions. Expected one less: "
                "action t leads from observation t to observation t + 1, and what is done at the newest observation is the plan's."
            )
        rows[name] = key.fitted(value, len(taken) + 1, where)
        fault = key.fault(rows[name])
        if fault is not None:
            raise ConfigError(f"{where} of step {int(fault[0].argmax())} {fault[1]}. Expected values of {key.space}.")
    return rows, torch.cat([torch.zeros(1, world.action.dim), taken])


def _by_key(spec: ObsSpec, observations: Any) -> dict[str, Any]:
    """{flat key: its rows} of an array, a dict of arrays (perhaps nested), or a list of single observations."""
    if spec.single:
        named = observations if isinstance(observations, Mapping) else {"obs": observations}
    elif isinstance(observations, Mapping | tuple):
        named = flatten(observations, spec.keys)
    elif isinstance(observations, Sequence) and all(isinstance(one, Mapping | tuple) for one in observations):
        steps = [flatten(one, spec.keys) for one in observations]
        named = {name: [step.get(name) for step in steps] for step in steps for name in step}
    else:
        found = type(observations).__name__
        raise ConfigError(
            f"what_if: the history's observations are {found}; expected a dict of arrays [T + 1, ...] with the keys "
            f"{sorted(spec.keys)}, or a list of T + 1 such observations."
        )
    for name in named:
        if name not in spec.keys:
            raise ConfigError(f"what_if: the environment observes no '{name}'.{did_you_mean(str(name), spec.keys)}")
    if missing := [name for name in spec.keys if name not in named]:
        raise ConfigError(f"what_if: the history's observations lack {missing}. Expected the keys {sorted(spec.keys)}.")
    return named


def _plans(spec: ActionSpec, plan: Any) -> tuple[dict[str, np.ndarray], bool]:
    """({name: raw actions [H, ...]}, whether they are to be ranked); ConfigError where they cannot be."""
    depth = 1 + len(spec.key.raw_shape)
    if isinstance(plan, Mapping):
        named, several = {str(name): value for name, value in plan.items()}, True
    elif several := _depth(plan) > depth:
        named = {f"plan {i + 1}": value for i, value in enumerate(plan)}
    else:
        named = {"plan": plan}
    found = {}
    for name, value in named.items():
        where, given = f"what_if: '{name}'" if several else "what_if: the plan", numbers(value)
        if given is None or given.ndim == 0 or not len(given):
            shape = ["H", *spec.key.raw_shape]
            raise ConfigError(f"{where} holds no actions. Expected {shape} of {spec.space}, or several plans as {{name: actions}}.")
        found[name] = _actions(spec, given, where)
    if not found:
        raise ConfigError("what_if: there is no plan. Expected the actions to try, or {name: actions}.")
    lengths = {name: len(actions) for name, actions in found.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"what_if: plans of different lengths have no comparable returns: {lengths}. Give each as many actions.")
    return found, several


def _depth(value: Any) -> int:
    """How deep an array, or a nested list, is."""
    if isinstance(value, list | tuple):
        return 1 + _depth(value[0]) if value else 1
    return np.ndim(value)


def _actions(spec: ActionSpec, given: np.ndarray, where: str) -> np.ndarray:
    """Actions [N, *raw_shape] in the raw dtype. ConfigError that names the first one which the space does not hold."""
    key, space = spec.key, spec.space
    if given.dtype.kind == "f" and np.isnan(given).any():
        raise ConfigError(f"{where}: action {int(np.argwhere(np.isnan(given))[0][0])} is NaN. Expected values of {space}.")
    raw = key.fitted(given, len(given), where, f" of {space}, one for each step")
    if spec.kind == "continuous":
        low, high = (bound.astype(np.float64) for bound in (key.low, key.high))
        margin = TOLERANCE * (high - low)
        bad = (raw < low - margin) | (raw > high + margin)
        if bad.any():
            step = int(np.argwhere(bad)[0][0])
            raise ConfigError(
                f"{where}: action {step} is {raw[step].tolist()}, outside of {space}. Clip actions first if the environment clips "
                "them."
            )
        return raw
    fault = key.fault(raw)
    if fault is not None:
        raise ConfigError(f"{where}: action {int(fault[0].argmax())} {fault[1]}. Expected values of {space}.")
    return raw


def _check_size(world: WorldModel, plans: Mapping[str, np.ndarray], samples: int) -> None:
    """ConfigError where one plan's roll-outs would fill the memory."""
    steps = len(next(iter(plans.values())))
    per_step = samples * world.feature_dim + 2 * sum(prod(key.shape) for key in world.obs.keys.values())
    if steps * per_step > MAX_NUMBERS:
        raise ConfigError(
            f"what_if: {steps} actions in {samples} samples need {steps * per_step / 2**28:.1f} GiB. Expected at most "
            f"{MAX_NUMBERS // per_step} actions with so many samples; nobody can predict that far."
        )


# What is expected -----------------------------------------------------------------------------------------------------


def _filtered(
    world: WorldModel, rows: Mapping[str, np.ndarray], prev_action: Float[Tensor, "L A"], samples: int, generator: torch.Generator
) -> State:
    """K draws of the belief after the last row, from an episode's start at the first one."""
    raw, length = tensors(dict(rows), world.device), len(prev_action)
    is_first = torch.arange(length, device=world.device).unsqueeze(0) == 0
    no = torch.zeros_like(is_first)
    actions = prev_action.to(world.device).unsqueeze(0)
    taken = torch.cat([actions[:, 1:], torch.zeros_like(actions[:, :1])], 1)
    history = Batch({name: x.unsqueeze(0) for name, x in raw.items()}, taken, actions, no.float(), is_first, no, no)
    state, at_once = None, max(1, NUMBERS_AT_ONCE // (samples * sum(prod(key.shape) for key in world.obs.keys.values())))
    for begin in range(0, length, at_once):
        window = history.window(begin, begin + at_once)
        window = window.with_obs(world.preprocess(window.obs)).map(lambda x: x.repeat_interleave(samples, 0))
        state = world.trace(window, state, Sampling(generator=generator)).last
    return state


def _forecast(
    world: WorldModel,
    start: State,
    name: str,
    raw: np.ndarray,
    discount: float,
    names: Mapping[str, tuple[str, ...]],
    generator: torch.Generator,
) -> Forecast:
    """The forecast of one plan from K states."""
    action = torch.from_numpy(world.action.encode(raw)).to(world.device)
    samples = start.batch_size
    dream = world.imagine(start, lambda feature, step: action[step].expand(samples, -1), len(raw), Sampling(generator=generator))
    reward, cont = dream.reward.double(), dream.cont.double()
    reached = torch.cat([torch.ones_like(cont[:, :1]), cont.cumprod(1)], 1)  # [K, H+1]: before each step, and behind the last
    weight = discount ** torch.arange(len(raw), device=world.device)
    mean, std = _observations(world, dream.feature[:, 1:])
    forecast = Forecast(
        name,
        raw,
        mean,
        std,
        reward_mean=reward.mean(0).cpu().numpy(),
        reward_std=reward.std(0).cpu().numpy(),
        survival=reached[:, 1:].mean(0).cpu().numpy(),
        uncertainty=dream.uncertainty.double().mean(0).cpu().numpy() if world.has_uncertainty else None,
        returns=(weight * reward * reached[:, :-1]).sum(1).cpu().numpy(),
        discount=discount,
        names=names,
    )
    _check_finite(forecast)
    return forecast


def _observations(world: WorldModel, feature: Float[Tensor, "K H F"]) -> tuple[Arrays | None, Arrays | None]:
    """(mean, deviation) over samples of the expected observations [H, ...], in the environment's form; None without a decoder."""
    if world.decoder is None:
        return None, None
    keys, samples = world.obs.keys, len(feature)
    at_once = max(1, NUMBERS_AT_ONCE // (samples * sum(prod(key.shape) for key in keys.values())))
    means: dict[str, list[np.ndarray]] = {name: [] for name in keys}
    stds: dict[str, list[np.ndarray]] = {name: [] for name in keys}
    for part in feature.split(at_once, 1):
        for name, x in world.decode(part.flatten(0, 1)).items():
            x = x.unflatten(0, part.shape[:2]).double()
            means[name].append(_in_units(keys[name], x.mean(0)))
            stds[name].append(_in_units(keys[name], x.std(0), spread=True))
    mean, std = ({name: np.concatenate(parts) for name, parts in found.items()} for found in (means, stds))
    return world.obs.to_env(mean), world.obs.to_env(std)


def _in_units(key: KeySpec, x: Float[Tensor, "H ..."], spread: bool = False) -> np.ndarray:
    """Canonical means [H, *shape], or their spreads, in the environment's units and shape; probabilities stay what they are."""
    values = x.cpu().numpy()
    if key.kind == "image":
        return key.picture(values).astype(np.float32) if spread else key.raw(values)
    wide = key.canonical_dtype == torch.float64
    values = values.astype(np.float64 if wide else np.float32)
    return values if key.kind == "categorical" else values.reshape(len(values), *key.raw_shape)


def _check_finite(forecast: Forecast) -> None:
    """NumericsError where a prediction is not finite."""
    parts = {"reward": forecast.reward_mean, "survival": forecast.survival, "return": forecast.returns}
    mean = forecast.observation_mean
    parts |= mean if isinstance(mean, dict) else {} if mean is None else {"observation": mean}
    for name, values in parts.items():
        if not np.isfinite(values).all():
            step = int(np.argwhere(~np.isfinite(values))[0][0])
            raise NumericsError(
                f"what_if: the model's {name} is not finite at step {step} of '{forecast.name}'. Expected numbers: the world model "
                "has diverged. Use an earlier checkpoint, or train it again."
            )
