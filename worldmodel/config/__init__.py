"""YAML recipes -> frozen, typed configs: `recipes` reads and merges them, `config` checks and types them."""

from worldmodel.config.config import REQUIRED, Config, Frozen, OptionInfo, Options, Part, changed, describe, differences, resolve
from worldmodel.config.recipes import dump_yaml, flat_overrides, list_models, list_recipes, load_yaml, merge, parse_override, plain

__all__ = [
    "REQUIRED",
    "Config",
    "Frozen",
    "OptionInfo",
    "Options",
    "Part",
    "changed",
    "describe",
    "differences",
    "dump_yaml",
    "flat_overrides",
    "list_models",
    "list_recipes",
    "load_yaml",
    "merge",
    "parse_override",
    "plain",
    "resolve",
]
