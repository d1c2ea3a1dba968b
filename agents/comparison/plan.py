"""What a comparison is of: an environment, forms of equal size, seeds, and what is expected before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from worldmodel.agents.training.offline import agent_of_specs
from worldmodel.config import Config, flat_overrides, list_models
from worldmodel.envs.make import make_env
from worldmodel.errors import ConfigError, UnsupportedSpaceError, did_you_mean
from worldmodel.spaces import ActionSpec, ObsSpec

REFERENCE = "gaussian"
"""The form whose number of parameters the others are brought to."""
WITHIN = 0.1
"""Relative difference of parameters that counts as equal."""
STEPS = 2000
OTHERS = ("real simulator", "mlp ensemble", "persistence", "random policy", "model-free")
"""Rows that are no form: what a form can be held against."""
EXPECTATIONS = (
    "anchored < gaussian: error at 1",
    "anchored < persistence: error at 5",
    "gaussian < persistence: error at 5",
    "vamp < vae: marginal hole mass",
    "mixture < gaussian: regret",
    "gaussian < mixture: likelihood",
    "gaussian < flow: update",
    "gaussian < energy: update",
    "vae < latent_diffusion: update",
    "random policy < gaussian: return",
    "model-free < gaussian: return",
    "gaussian < real simulator: planned return",
)
"""What is expected where nothing else is said: latents that are the observation are truest, richer forms leave less to gain and
cost more, a learned marginal has fewer holes than a fixed one, an agent earns more in a dream than without a model, and a planner
most in reality."""


@dataclass(frozen=True)
class Plan:
    """All that decides a row, but for its form and its seed.

    env           recipe or Gymnasium id
    steps         real steps that are learned from; for each, `train.ratio` updates are made
    minutes       training of a row ends then, whatever updates it has made; None: it makes all
    overrides     options of every form, by dotted key
    expectations  "A < B: FIGURE", written down before anything is measured
    """

    env: str
    steps: int = STEPS
    minutes: float | None = None
    overrides: tuple[str, ...] = ()
    expectations: tuple[str, ...] = EXPECTATIONS

    def __post_init__(self) -> None:
        if self.steps < 100:
            raise ConfigError(f"steps is {self.steps}; expected at least 100 real steps to learn from.")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; expected more than 0.")
        for text in self.expectations:
            Expectation.parse(text)

    def config(self, form: str = REFERENCE, more: Sequence[str] = ()) -> Config:
        """Of one form; `more` options count before those of all. Raises ConfigError."""
        return Config.from_recipe(self.env, {**flat_overrides(self.overrides), "model": form, **flat_overrides(more)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """What `to_json` gave, as JSON keeps it."""
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in data.items()})


@dataclass(frozen=True)
class Expectation:
    """That one row's figure is below another's: "A < B: FIGURE"."""

    text: str
    below: str
    above: str
    figure: str

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Raises ConfigError for what is no such sentence."""
        found = re.fullmatch(r"\s*(.+?)\s*<\s*(.+?)\s*:\s*(.+?)\s*", text)
        if found is None:
            raise ConfigError(f"'{text}' is no expectation. Expected 'A < B: FIGURE', as in '{EXPECTATIONS[0]}'.")
        return cls(text, *found.groups())


# Forms of equal size ------------------------------------------------------------------------------------------------------


def checked_forms(asked: Sequence[str] | None) -> list[str]:
    """The forms that are asked for; None: every file of configs/model. Raises ConfigError for one that does not exist."""
    known = list_models()
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"There is no form '{name}'.{did_you_mean(name, known)} A form is a file of configs/model.")
    return list(dict.fromkeys(asked or known))


@cache
def spaces_of(env: str, overrides: tuple[str, ...]) -> tuple[ObsSpec, ActionSpec]:
    """Of the plan's environment, as its model sees them. Raises EnvError, MissingExtraError, UnsupportedSpaceError."""
    config = Config.from_recipe(env, list(overrides))
    if config.env.action_masks:
        raise ConfigError(
            "The forms learn from what SB3's DQN or PPO met, which know no masks: compare without env.action_masks=true."
        )
    one = make_env(config.env)
    one.close()
    return ObsSpec.from_space(one.observation_space, config.env.layout), ActionSpec.from_space(one.action_space)


def parameters(plan: Plan, form: str, more: Sequence[str] = ()) -> int:
    """Of the world model of a form. Raises ConfigError, UnsupportedSpaceError where it does not fit the spaces."""
    agent = agent_of_specs(plan.config(form, more), *spaces_of(plan.env, plan.overrides), seed=0, device="cpu")
    return sum(p.numel() for p in agent.policy.world.parameters())


def refusals(plan: Plan, forms: Sequence[str]) -> dict[str, str]:
    """{form: why it does not fit the environment's spaces}."""
    found = {}
    for form in forms:
        try:
            parameters(plan, form)
        except (ConfigError, UnsupportedSpaceError) as error:
            found[form] = str(error)
    return found


def sized(plan: Plan, form: str) -> list[str]:
    """Options that bring a form's parameters to those of REFERENCE by the width of its dynamics, as near as that can; the trunk
    beside (encoder, decoder, heads, the agent) stays as the recipe has it."""
    if form == REFERENCE:
        return []
    dynamics, target = plan.config(form).model.dynamics, parameters(plan, REFERENCE)
    widths = [name for name in ("deter", "units", "slow") if getattr(dynamics, name, 0)]

    def options(factor: float) -> list[str]:
        return [f"model.dynamics.{name}={max(8, 8 * round(factor * getattr(dynamics, name) / 8))}" for name in widths]

    low, high, best = 0.125, 8.0, (float("inf"), [])
    for _ in range(9):
        factor = (low * high) ** 0.5
        count = parameters(plan, form, options(factor))
        best = min(best, (abs(count / target - 1), options(factor)))
        low, high = (factor, high) if count < target else (low, factor)
    return best[1]
