"""What release 0.1 called otherwise: its options and the names of its arrays, so that its runs and files open here.

An old option name that somebody writes is an error which names the new one; in what 0.1 wrote itself it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

_EDM = {"most": "sigma_max", "least": "sigma_min", "level_mean": "log_sigma_mean", "level_std": "log_sigma_std"}
_BEHAVIOUR = {"penalty": "uncertainty_penalty", "manifold": "typicality_penalty"}
_PREDICTIVE = {"anti": "anti_collapse", "ema": "ema_decay"}

OPTIONS: dict[str, dict[str, str | None]] = {
    "TrainConfig": {
        "ends": "terminal_fraction",
        "newest": "recent_fraction",
        "prefill_hold": "random_action_repeat",
        "average": "ema_decay",
    },
    "ScaleConfig": {"fit": "prior"},
    "ModelConfig": {"inputs": "vector_scaling"},
    "DreamerConfig": _BEHAVIOUR,
    "PlannerConfig": _BEHAVIOUR,
    "PlanConfig": {"penalty": "uncertainty_penalty"},
    "SB3Config": {"penalty": "uncertainty_penalty"},
    "DiffusionConfig": {**_EDM, "looks": "rate_samples", "drop": None, "path": None},
    "DiffusionDecoderConfig": _EDM,
    "LatentDiffusionDecoderConfig": {"law": "prior"},
    "DiamondConfig": _EDM,
    "EnergyConfig": {"most_gap": "max_gap", "most_moved": "max_displacement", "others": "context_negatives"},
    "VampConfig": {"inputs": "pseudo_inputs"},
    "JepaConfig": _PREDICTIVE,
    "HybridConfig": _PREDICTIVE,
}
"""Config class -> {old option: new option}; None: an option that is gone, because nothing used it or by REMOVED."""

REMOVED = {
    ("DiffusionConfig", "path"): (
        "edm",
        "Conditional flow matching (cfm) was removed, and diffusion is always EDM: leave `path` out, and train the model anew.",
    )
}
"""(config class, option that is gone) -> (the one value whose behaviour remained, what to do about others)."""

KINDS = {
    ("encoder", "pixels"): "standard",
    ("dynamics", "pixels"): "diamond",
    ("objective", "pixels"): "reconstruction",
}
"""(role, old kind) -> new kind. These three were one model."""
KINDS_HINT = "'pixels' is model.dynamics.kind=diamond now, which needs no kind of model.encoder or model.objective beside it."

EXTRACTOR_OUTPUTS = {"code": "latent"}
"""LatentExtractor's option `output`: old value -> new value."""

ARRAYS = (
    (r"\binitial_law\.", "initial_prior."),
    (r"^dynamics\.code_in\.", "dynamics.z_in."),
    (r"^dynamics\.carry_in\.", "dynamics.h_in."),
    (r"\bdecoder\.law\.", "decoder.prior."),
    (r"\bdecoder\.belief\.", "decoder.posterior."),
    (r"^(dynamics\.initial_prior|marginal)\.carry$", r"\1.h"),
)
"""(pattern, replacement) for the names of parameters and buffers, one after the other."""


def options_of(config: type) -> dict[str, str | None]:
    """{old name: new name} of a config class."""
    return OPTIONS.get(config.__name__, {})


def check_removed(config: type, option: str, value: Any) -> None:
    """ConfigError where a saved option asks for behaviour that is gone."""
    kept, advice = REMOVED.get((config.__name__, option), (value, ""))
    if value != kept:
        raise ConfigError(f"configs: '{option}={value}' cannot be opened. {advice}")


def in_new_kind(role: str, value: Any) -> Any:
    """A part as a config holds it, by its kind's name of today."""
    if isinstance(value, Mapping):
        return {**value, "kind": in_new_kind(role, value["kind"])} if "kind" in value else value
    return KINDS.get((role, value), value) if isinstance(value, str) else value


def array_names(names: Iterable[str]) -> dict[str, str]:
    """{name as saved: name today}."""
    found = {}
    for old in names:
        new = old
        for pattern, replacement in ARRAYS:
            new = re.sub(pattern, replacement, new)
        found[old] = new
    return found


class Statistics(NamedTuple):
    """Where 0.1 kept what is a RunningMoments today. A # stands for a number; an array without a name was not kept.

    owner, today           class of the module that owns them, and their name in it
    mean, variance, count  names of the arrays of 0.1, beside each other in the owner
    convert                (what was stored, count) -> the mean or, where that is stored too, the variance of today
    """

    owner: str
    today: str
    mean: str = ""
    variance: str = ""
    count: str = ""
    convert: Callable[[Tensor, float], Tensor] = lambda x, count: x


LONG_AGO = 1e12
"""The count of statistics that 0.1 did not count: nothing moves them much any more."""

STATISTICS = (
    Statistics("Gaussian", "errors", mean="variance"),
    Statistics("Flow", "moments", "mean", "variance", "batches"),
    Statistics("Diffusion", "moments", "mean", "variance", "seen"),
    Statistics("Energy", "moments", "centre", "spread", "seen", lambda std, _: std.square()),
    Statistics("Ensemble", "moments", "mean", "variance", "batches"),
    Statistics("Decoder", "errors#", mean="log_std#", convert=lambda log_std, _: (2 * log_std.double()).exp()),
    Statistics("DiffusionDecoder", "differences#", mean="difference#", convert=lambda rms, _: rms.square()),
    Statistics("VectorScaling", "moments.#", "mean#", "square#", "count", lambda x, n: x / n if n else x.new_ones(x.shape)),
)
NEW_ARRAYS = {
    "RewardScale": {"squares.count": LONG_AGO, "squares.mean": 1.0, "squares.variance": 1.0},
    "ActorCritic": {"unit": 1.0},
}
"""Class -> arrays that 0.1 did not have, at the values by which it acted."""


def take_over_statistics(module: nn.Module, arrays: MutableMapping[str, Any], prefix: str = "") -> None:
    """Turns the statistics that 0.1 saved of a module into those of today, in place; others are left as they are.

    arrays  {name: array or tensor} of the module's state, each name behind `prefix`
    """
    import torch  # not above, since configs import this module and start without torch

    for path, part in module.named_modules(remove_duplicate=False):  # a state dict has what is shared under each of its names
        owner, kinds = prefix + path + "." * bool(path), {kind.__name__ for kind in type(part).__mro__}
        for old in STATISTICS:
            if old.owner in kinds:
                count = float(arrays.pop(owner + old.count, LONG_AGO)) if old.count else LONG_AGO
                for name, _ in part.named_modules():
                    if match := re.fullmatch(old.today.replace("#", r"(\d+)"), name):
                        number = "".join(match.groups())
                        mean, variance = (owner + x.replace("#", number) if x else "" for x in (old.mean, old.variance))
                        _take_over(arrays, owner + name, mean, variance, count, old.convert)
        for kind in kinds & NEW_ARRAYS.keys():
            for name, value in NEW_ARRAYS[kind].items():
                arrays.setdefault(owner + name, torch.tensor(value, dtype=torch.float64))


def _take_over(arrays: MutableMapping[str, Any], today: str, mean: str, variance: str, count: float, convert: Callable) -> None:
    """Writes one RunningMoments from the stored mean, variance or both; nothing where they are not stored or today's are."""
    import torch

    if f"{today}.count" in arrays or (variance or mean) not in arrays:
        return
    stored = {name: torch.as_tensor(arrays.pop(name)) for name in (mean, variance) if name}
    stored[variance or mean] = convert(stored[variance or mean], count)
    like = stored[variance or mean].double()
    arrays[f"{today}.mean"] = stored[mean].double() if mean else torch.zeros_like(like)
    arrays[f"{today}.variance"] = stored[variance].double() if variance else torch.ones_like(like)
    arrays[f"{today}.count"] = torch.tensor(count, dtype=torch.float64)


def extractor_options(output: str, model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The options `output` and `model` of a LatentExtractor; `Frozen.parse_saved` translates those of each part of the model."""
    names = OPTIONS["ModelConfig"]
    if model["encoder"]["kind"] == "pixels":  # whose dynamics were not saved beside it
        model = {"dynamics": {"kind": "diamond"}, **model}
    return EXTRACTOR_OUTPUTS.get(output, output), {names.get(name) or name: value for name, value in model.items()}
