"""The text side of configs: YAML read safely, recipes found by name, layers and dotted overrides merged.

All of it is plain data (dicts, lists, numbers, words); config.py gives it types.

A recipe file, configs/env/NAME.yaml, is the content of a config plus two keys of its own:

    description: one line
    defaults: {model: NAME, size: NAME}     # files of configs/model and configs/size, merged below this one
    env: {id: CartPole-v1}
    train: {ratio: 2.0}

Files of configs/model and configs/size hold the same groups (`model: {dynamics: {kind: rssm, deter: 128}}`), no defaults.
Those of configs/default are what environments without a recipe start from; they may have defaults.
What a recipe says about parts overrides them, whatever model is asked for, so it should say little.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from worldmodel.errors import ConfigError, did_you_mean

MAX_ALIASES, MAX_DEPTH, MAX_NODES, MAX_CHARACTERS = 100, 50, 100_000, 1_000_000
"""Limits on one YAML file; nodes are counted with every alias written out."""

FILES = ("size", "model")
"""What a recipe takes from files of their own, lower layer first."""


def plain(value: Any) -> Any:
    """Data of lists and dicts (tuples become lists, paths words) that shares nothing with `value`."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- YAML ------------------------------------------------------------------------------------------------------------

_SCALARS = {  # the core schema of YAML 1.2 with underscores in numbers: `1e-4` is a float, `no` and `010` are words
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    "float": (
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """The safe loader without tags and duplicate keys, with limits on aliases, depth and size."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases = self.depth = self.nodes = 0
        self.nodes_below: dict[str, int] = {}  # anchor -> nodes, once it is complete

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event, start = self.peek_event(), self.nodes
        self.depth += 1
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self.aliases += 1
            self.nodes += self.nodes_below.get(event.anchor, 0)
            if event.anchor in self.anchors and event.anchor not in self.nodes_below:
                _refuse("an alias that contains itself", event)
        elif event.tag is not None:
            _refuse(f"the tag '{event.tag}' is refused: configs hold plain data only", event)
        if self.aliases > MAX_ALIASES:
            _refuse(f"more than {MAX_ALIASES} aliases", event)
        if self.depth > MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH}", event)
        if self.nodes > MAX_NODES:
            _refuse(f"aliases expand to more than {MAX_NODES} values", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent) and event.anchor:
            self.nodes_below[event.anchor] = self.nodes - start
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                _refuse("a key must be a word (quote it if it looks like something else)", key)
            if key.value in first:
                _refuse(f"'{key.value}' is given twice, first on line {first[key.value]}; keep one", key)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _refuse(problem: str, place: yaml.Event | yaml.Node) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that this loader, or one of YAML 1.1, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        # PyYAML writes these line breaks bare, and would read them back as spaces.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def load_yaml(text: str, where: str = "config") -> dict[str, Any]:
    """The mapping that a YAML text holds, as plain data; an empty text is {}.

    ConfigError with the line for: syntax, tags, duplicate keys, keys that are not words, more than 100 aliases,
    aliases that expand to more than 100,000 values. `where` names the text in messages.
    """
    value = _load(text, where)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected keys with values (`train: {{ratio: 1}}`), not {value!r}.")
    return value


def _load(text: str, where: str) -> Any:
    """Plain data that belongs to the caller alone."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters are more than a config may have ({MAX_CHARACTERS}).")
    try:
        return plain(_parsed(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:  # unprintable characters
        raise ConfigError(f"{where}: {' '.join(str(error).split())}.") from None
    except ValueError:  # Python's own limit on reading integers
        raise ConfigError(f"{where}: an integer of thousands of digits. Write it as a float.") from None


@functools.lru_cache(maxsize=64)  # every agent that is made reads all recipes, and runs of one recipe hold the same text
def _parsed(text: str) -> Any:
    return _Loader(text).get_single_data()


def dump_yaml(value: Mapping) -> str:
    """The text that `load_yaml` reads back to the same data (tuples as lists, paths as words)."""
    return yaml.dump(plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---- layers ----------------------------------------------------------------------------------------------------------


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`, mappings deeply; the result shares nothing with either.

    A part whose `kind` changes keeps none of its options from below. A word over a mapping is its `kind`
    (`agent: random`), and so is a word below one.
    """
    if isinstance(above, str) and isinstance(below, Mapping):
        above = {"kind": above}
    if not isinstance(above, Mapping):
        return plain(above)
    if isinstance(below, str):
        below = {"kind": below}
    if not isinstance(below, Mapping) or ("kind" in above and "kind" in below and above["kind"] != below["kind"]):
        below = {}
    out = plain(below)
    for name, value in above.items():
        out[name] = merge(out.get(name), value)
    return out


def parse_override(text: str) -> dict[str, Any]:
    """`"model.dynamics.deter=128"` -> {"model": {"dynamics": {"deter": 128}}}. The value is YAML; nothing is null."""
    return _nested(*_split(text))


def flat_overrides(overrides: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    """Overrides as {dotted key: value}. ConfigError where two set the same key."""
    combine(overrides)
    return dict(overrides if isinstance(overrides, Mapping) else map(_split, overrides or ()))


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' is no override. Write it as key=value, for example train.ratio=2.")
    return key.strip(), _load(value, f"override '{text}'")


def _nested(key: str, value: Any) -> dict[str, Any]:
    steps = key.split(".")
    if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", step) for step in steps):
        raise ConfigError(f"'{key}' is no dotted key. Expected words joined by dots, for example train.batch_size.")
    for step in reversed(steps):
        value = {step: value}
    return value


def combine(overrides: Mapping | Iterable[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files that overrides name (`model=NAME`, `size=NAME`), and all others as one mapping, whatever their order.

    ConfigError where two set the same key.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of words or a mapping, not the one word '{overrides}'. Write ['{overrides}'].")
    given = overrides or {}
    trees = [_nested(k, v) for k, v in given.items()] if isinstance(given, Mapping) else [parse_override(text) for text in given]
    names: dict[str, Any] = {}
    out: dict[str, Any] = {}
    for tree in trees:
        ((key, value),) = tree.items()
        _join(names if key in FILES and not isinstance(value, Mapping) else out, tree, "")
    return names, out


def _join(below: dict[str, Any], above: Mapping, prefix: str) -> None:
    for name, value in above.items():
        old = below.get(name)
        if name not in below:
            below[name] = plain(value)
        elif isinstance(value, Mapping) and isinstance(old, (str, Mapping)):
            below[name] = {"kind": old} if isinstance(old, str) else old
            _join(below[name], value, f"{prefix}{name}.")
        elif isinstance(value, str) and isinstance(old, Mapping):
            _join(old, {"kind": value}, f"{prefix}{name}.")
        else:
            raise ConfigError(f"'{prefix}{name}' is given twice, as {old!r} and as {value!r}. Keep one.")


SLOTS = ("initial", "transition", "marginal")
"""Options of model that choose a distribution, and with it the kind of latent."""


def layers(
    recipe: str | Path | Mapping | None,
    overrides: Mapping | Iterable[str] | None,
    *,
    env_id: str | None,
    folder: str | Path | None,
    default: str | None = None,
) -> list[dict[str, Any]]:
    """What `config.resolve` lays over one another, lowest first: size, model, default, recipe, environment, overrides.

    default   the file of configs/default for environments without a recipe; it names a model where nothing else does
    """
    chosen, given = combine(overrides)
    body = _find(recipe if recipe is not None else env_id, folder, known_env=recipe is None)
    names = body.pop("defaults", None) or {}
    if not isinstance(names, Mapping) or set(names) - set(FILES):
        raise ConfigError(f"recipe: `defaults` must be a mapping of {' and '.join(FILES)} to names, not {names!r}.")
    for part in FILES:
        if part in body and not isinstance(body[part], Mapping):
            raise ConfigError(f"recipe: name the {part} under `defaults: {{{part}: {body[part]}}}`.")
    usual = {} if default is None or "recipe" in body else _default(default, folder, merge(body, given))
    usual_names, names = usual.pop("defaults", {}), {**names, **chosen}
    said = [*names, *body, *(given.get("model") or {})]
    if not {"model", "dynamics", "objective", *SLOTS} & set(said):
        names = {**usual_names, **names}
    below = {part: _fragment(part, names[part], folder) for part in FILES if names.get(part) is not None}
    for part in chosen:
        _refuse_to_undo(f"{part}={chosen[part]}", below.get(part, {}), body, given)
    environment = [] if env_id is None or _same_env(env_id, _env_id(body)) else [{"env": {"id": env_id}}]
    return [*below.values(), usual, body, *environment, given]


def _default(name: str, folder: str | Path | None, said: Mapping) -> dict[str, Any]:
    """A file of configs/default below what is said: updates a step that are said hold for all steps."""
    body = _content("default", name, folder)
    if isinstance(train := said.get("train"), Mapping) and "ratio" in train:
        body.get("train", {}).pop("early_ratio", None)
    return body


def _refuse_to_undo(asked: str, fragment: Mapping, body: Mapping, given: Mapping) -> None:
    """Refuse a file asked for by name where the recipe, merged over it, would silently put back another kind of part."""
    wanted, got = _kinds(merge(fragment, given)), _kinds(merge(merge(fragment, body), given))
    for key in sorted(wanted.keys() & got.keys()):
        if wanted[key] != got[key]:
            conflict = f"{asked} means {key}={wanted[key]}, but the recipe sets {key}={got[key]}"
            raise ConfigError(f"{conflict}. Choose one by giving {key} itself.")


def _kinds(tree: Mapping, prefix: str = "") -> dict[str, str]:
    """Dotted key -> word of every `kind` in a mapping."""
    out = {prefix + "kind": tree["kind"]} if isinstance(tree.get("kind"), str) else {}
    for name, value in tree.items():
        out.update(_kinds(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {})
    return out


def _env_id(body: Mapping) -> str | None:
    env = body.get("env")
    return env.get("id") if isinstance(env, Mapping) else None


def _same_env(one: str, other: Any) -> bool:
    """Whether two gym ids name one environment; an environment forgets the `module:` it was found in."""
    return isinstance(other, str) and one.rpartition(":")[2] == other.rpartition(":")[2]


# ---- recipes by name -------------------------------------------------------------------------------------------------


def list_recipes(folder: str | Path | None = None) -> list[tuple[str, str | None, str]]:
    """(name, env id, description) of every recipe, sorted by name; those of the user's folder hide ours of the same name."""
    entries = []
    for name, file in sorted(_files("env", folder).items()):
        body = _read(file)
        entries.append((name, _env_id(body), str(body.get("description") or "")))
    return entries


def list_models(folder: str | Path | None = None) -> list[str]:
    """Names of the models that a recipe may choose, sorted."""
    return sorted(_files("model", folder))


def _files(part: str, folder: str | Path | None) -> dict[str, Any]:
    """name -> file of one of default, env, model, size."""
    found: dict[str, Any] = {}
    for root in (importlib.resources.files("worldmodel.configs"), Path(folder) if folder is not None else None):
        inner = root.joinpath(part) if root is not None else None
        if inner is not None and inner.is_dir():
            found.update({f.name[: -len(".yaml")]: f for f in inner.iterdir() if f.name.endswith(".yaml")})
    return found


def _read(file: Any) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}). Expected a YAML file in UTF-8.") from None
    return load_yaml(text, str(file))


def _content(part: str, name: Any, folder: str | Path | None) -> dict[str, Any]:
    """What a file of configs/default, model or size holds, without its description."""
    files = _files(part, folder)
    if name not in files:
        raise ConfigError(f"no {part} is called '{name}'.{did_you_mean(str(name), files)}")
    body = _read(files[name])
    body.pop("description", None)
    return body


def _fragment(part: str, name: Any, folder: str | Path | None) -> dict[str, Any]:
    body = _content(part, name, folder)
    if "defaults" in body:
        raise ConfigError(f"{_files(part, folder)[name]}: only recipes may have `defaults`.")
    return body


def _find(recipe: str | Path | Mapping | None, folder: str | Path | None, *, known_env: bool) -> dict[str, Any]:
    """The content of a recipe. `known_env`: it is the id of an environment that exists, whatever it looks like."""
    if recipe is None:
        return {}
    if isinstance(recipe, Mapping):
        return plain(recipe)
    files = _files("env", folder)
    if not known_env and isinstance(recipe, str) and recipe in files:
        return {"recipe": recipe, **_read(files[recipe])}
    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml")):
        return {"recipe": Path(recipe).stem, **_read(Path(recipe))}
    entries = list_recipes(folder)
    made_for = sorted((name for name, env_id, _ in entries if _same_env(recipe, env_id)), key=lambda name: (len(name), name))
    if made_for:  # `cartpole` before `cartpole_pixels`
        return {"recipe": made_for[0], **_read(files[made_for[0]])}
    if known_env or re.search(r"-v\d+$|:", recipe):
        return {"env": {"id": recipe}}
    ids = [env_id for _, env_id, _ in entries if env_id]
    hint = did_you_mean(recipe, [*files, *ids])
    raise ConfigError(
        f"no recipe or environment is called '{recipe}'.{hint} A file ends in .yaml, a gym id in -v0, and a run folder "
        "holds config.yaml."
    )
