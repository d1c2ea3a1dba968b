"""What release 0.1 called otherwise: its options and the names of its arrays, so that its runs and files open here.

An old option name that somebody writes is an error which names the new one; in what 0.1 wrote itself it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

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
    "DiffusionConfig": {**_EDM, "looks": "rate_samples", "drop": None},
    "DiffusionDecoderConfig": _EDM,
    "LatentDiffusionDecoderConfig": {"law": "prior"},
    "PixelsConfig": _EDM,
    "EnergyConfig": {"most_gap": "max_gap", "most_moved": "max_displacement", "others": "context_negatives"},
    "VampConfig": {"inputs": "pseudo_inputs"},
    "JepaConfig": _PREDICTIVE,
    "HybridConfig": _PREDICTIVE,
}
"""Config class -> {old option: new option}; None: an option that is gone, because nothing used it."""

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


def array_names(names: Iterable[str]) -> dict[str, str]:
    """{name as saved: name today}."""
    found = {}
    for old in names:
        new = old
        for pattern, replacement in ARRAYS:
            new = re.sub(pattern, replacement, new)
        found[old] = new
    return found


def extractor_options(output: str, model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The options `output` and `model` of a LatentExtractor; those of a part of the model are `Frozen.parse_saved`'s to translate."""
    names = OPTIONS["ModelConfig"]
    return EXTRACTOR_OUTPUTS.get(output, output), {names.get(name) or name: value for name, value in model.items()}
