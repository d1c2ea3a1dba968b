"""YAML recipes -> frozen, typed configs. An unknown key is never ignored: the error names the nearest known one.

Three steps, each usable alone: `load_yaml` reads text into plain data, `resolve` merges recipes and overrides (both in
recipes.py, but for the knowledge of classes), `Config.parse` turns the result into typed, immutable values. The classes of
groups and parts stand beside what they configure and are found through the registry; this module imports none of them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined, ValidationError, core_schema

from worldmodel import registry, renamed
from worldmodel.config.recipes import combine, dump_yaml, layers, load_yaml, merge, plain
from worldmodel.errors import ConfigError, did_you_mean

Self = TypeVar("Self", bound="Frozen")


# ---- typed values ----------------------------------------------------------------------------------------------------


class _RaisesConfigError(type(pydantic.BaseModel)):
    """Direct construction reports like a file does: a ConfigError with the key."""

    def __call__(cls, **options: Any) -> Any:
        return cls.parse(options)


class Frozen(pydantic.BaseModel, metaclass=_RaisesConfigError):
    """Base of every config: immutable, no unknown keys, no silent conversions.

    `true` is no integer, `"3"` is no number; an integer is taken for a float, a list for a tuple, a string for a Path. NaN and
    infinity are refused unless the field says `Field(allow_inf_nan=True)`. Defaults are validated when a config is made:
    `dynamics: Annotated[Any, Part("dynamics")] = {"kind": "rssm"}` imports nothing before. A mapping given for a field is merged
    over that field's default, so one option can be set without resetting the others.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        unknown = [str(name) for name in data if name not in cls.model_fields]
        if unknown:
            raise _errors(cls, {name: f"is not an option of {cls.__name__}." for name in unknown})
        return {name: _coerce(cls.model_fields[name], value) for name, value in data.items()}

    @classmethod
    def parse(cls: type[Self], data: Any) -> Self:
        """The config that a mapping describes; ConfigError with every full dotted key that does not fit."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _config_error(error, cls) from None

    @classmethod
    def parse_saved(cls: type[Self], data: Mapping) -> Self:
        """`parse` of what a file holds, which release 0.1 may have written with the names of its time."""
        return cls.parse(_with_kinds(cls, data, rename=True))

    def replace(self: Self, **changes: Any) -> Self:
        """A validated copy with some options changed; mappings are merged."""
        return type(self).parse(merge(self.model_dump(), changes))


class Part:
    """Annotation of a field that holds the config of a part: `encoder: Annotated[Any, Part("encoder")]`.

    A mapping with `kind` is parsed by the class that the registry names (without: the default's kind); a word alone is the kind;
    an instance of that class passes. `Annotated[Any, Part("distribution")] | None` and tuples of parts work too.
    `Part("group", "train")` is the one class that is registered as the group `train`.
    """

    def __init__(self, role: str, kind: str | None = None) -> None:
        self.role, self.kind = role, kind

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda value, info: value.model_dump(mode=info.mode), info_arg=True)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def config_class(self, value: Any) -> type[Frozen]:
        """The class for a value: ConfigError where the registry has none, ValueError where the value names none."""
        kind = self.kind or (value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None))
        if not isinstance(kind, str):
            raise ValueError(f"should be a mapping with a 'kind', one of: {', '.join(registry.kinds(self.role))}")
        if (self.role, kind) in renamed.KINDS:
            raise ConfigError(renamed.KINDS_HINT)
        if self.role in ("group", "agent") and not registry.has(self.role, kind) and (self.kind or not registry.kinds(self.role)):
            return EmptyGroup
        return registry.config_class(self.role, kind)

    def validate(self, value: Any) -> Frozen:
        value = {"kind": value} if isinstance(value, str) and not self.kind else value
        try:
            config = self.config_class(value)
        except ConfigError as error:
            raise _errors(Frozen, {"kind": f"cannot be chosen: {error}"}) from None
        if config is EmptyGroup and set(value) - {"kind"}:
            raise ValueError(f"nothing that is installed has options here, so it must be empty, not {value!r}")
        return config.model_validate(value)


class EmptyGroup(Frozen):
    """A group for which nothing that is installed has options."""

    kind: str | None = None


Options = Annotated[dict[str, pydantic.JsonValue], pydantic.BeforeValidator(plain)]
"""Field type for free keyword arguments (of an environment, of a wrapper): any plain, finite data."""


def _registered(field: pydantic.fields.FieldInfo) -> Part | None:
    """The `Part` of a field, also within `... | None`."""
    inner = [m for option in get_args(field.annotation) for m in getattr(option, "__metadata__", ())]
    return next((m for m in [*field.metadata, *inner] if isinstance(m, Part)), None)


def _default(field: pydantic.fields.FieldInfo) -> Any:
    """A field's default as plain data; a part's as a mapping with its kind; PydanticUndefined where it is required."""
    default = field.get_default(call_default_factory=True)
    default = default.model_dump() if isinstance(default, Frozen) else default
    return {"kind": default} if isinstance(default, str) and _registered(field) else default


def _class_of(field: pydantic.fields.FieldInfo, value: Mapping) -> type[Frozen] | None:
    """The config class of a nested mapping, None for plain data and for parts that do not exist."""
    named = _registered(field)
    if named:
        try:
            return named.config_class(value)
        except ValueError:
            return None
    options = [field.annotation, *get_args(field.annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Frozen)), None)


def _coerce(field: pydantic.fields.FieldInfo, value: Any) -> Any:
    """A file's value in the field's own types, merged over its default where both are mappings."""
    if isinstance(value, Mapping) or (isinstance(value, str) and _registered(field)):
        default = _default(field)
        value = merge(default if isinstance(default, Mapping) else {}, value)
    return _as_annotated(field.annotation, value)


def _as_annotated(annotation: Any, value: Any) -> Any:
    """Lists as tuples and strings as paths where the annotation asks for them: YAML has neither."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_annotated(args[0], value)
    if origin in (Union, types.UnionType):
        fitted = [_as_annotated(option, value) for option in args]
        return next((f for f in fitted if type(f) is not type(value) or f != value), value)
    if isinstance(value, dict) and origin is dict:
        return {name: _as_annotated(args[1], item) for name, item in value.items()}
    if isinstance(value, list) and (annotation is tuple or origin is tuple):
        inner = args[:1] * len(value) if args[1:] == (...,) else args
        inner = inner if len(inner) == len(value) else (Any,) * len(value)
        return tuple(_as_annotated(a, v) for a, v in zip(inner, value, strict=True))
    return Path(value) if isinstance(value, str) and annotation is Path else value


# ---- errors ----------------------------------------------------------------------------------------------------------


def _errors(cls: type[Frozen], messages: dict[str, str]) -> ValidationError:
    """An error of our own for each key; pydantic puts the outer keys in front as it passes them upwards."""
    details = [
        InitErrorDetails(type=PydanticCustomError("worldmodel", "{text}", {"text": text, "cls": cls}), loc=(key,), input=None)
        for key, text in messages.items()
    ]
    return ValidationError.from_exception_data(cls.__name__, details)


def _config_error(error: ValidationError, root: type[Frozen]) -> ConfigError:
    """The same errors, one a line, each with its full dotted key and, for an unknown one, the nearest right name."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(step) for step in item["loc"] if not re.match(r"(tuple|dict)\[", str(step)))  # what a union could be
        where = f"'{key}'" if key else root.__name__
        if item["type"] == "worldmodel":
            hint = _hint(key, item["ctx"]["cls"], root) if "not an option" in item["msg"] else ""
            lines.append(f"configs: {where} {item['msg']}{hint}")
        elif item["type"] == "missing":
            lines.append(f"configs: {where} is required and not given.")
        elif item["type"] == "value_error":
            lines.append(f"configs: {where}: {item['msg'].removeprefix('Value error, ')}")
        else:
            got = repr(item["input"])
            got = got if len(got) <= 80 else got[:77] + "..."
            lines.append(f"configs: {where}: {item['msg'][:1].lower()}{item['msg'][1:]}, not {got}.")
    return ConfigError("\n".join(lines))


def _hint(key: str, cls: type[Frozen], root: type[Frozen]) -> str:
    """Where an unknown key may belong: a near sibling, another kind of the same part, or elsewhere in the tree."""
    leaf = key.rpartition(".")[2]
    names = renamed.options_of(cls)
    if leaf in names:
        now = names[leaf]
        gone = renamed.REMOVED.get((cls.__name__, leaf), ("", "It is gone: nothing used it."))[1]
        return f" {gone}" if now is None else f" It is called '{key.removesuffix(leaf)}{now}' now."
    known = registry.entries()
    role = next((role for role, _, config in known if config is cls and role != "group"), None)
    kinds = [kind for r, kind, config in known if r == role and leaf in config.model_fields]
    if kinds:
        return f" It is an option of {role} {' and '.join(map(repr, kinds))}."
    if near := did_you_mean(leaf, cls.model_fields, near_only=True):
        return near
    elsewhere = [option.key for option in describe(root) if option.key.rpartition(".")[2] == leaf]
    return f" Did you mean {' or '.join(map(repr, elsewhere[:3]))}?" if elsewhere else did_you_mean(leaf, cls.model_fields)


# ---- the root --------------------------------------------------------------------------------------------------------


class Config(Frozen):
    """Everything about a run. Each group belongs to the module that registered it; `agent` is chosen by its `kind`."""

    recipe: str | None = pydantic.Field(None, description="name of the recipe that this came from")
    description: str = pydantic.Field("", description="one line about it")
    env: Annotated[Any, Part("group", "env")] = {}
    model: Annotated[Any, Part("group", "model")] = {}
    agent: Annotated[Any, Part("agent")] = pydantic.Field({"kind": "dreamer"}, description="what acts")
    train: Annotated[Any, Part("group", "train")] = {}
    eval: Annotated[Any, Part("group", "eval")] = {}
    checkpoint: Annotated[Any, Part("group", "checkpoint")] = {}
    log: Annotated[Any, Part("group", "log")] = {}

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Path | Mapping | None = None,
        overrides: Mapping | Sequence[str] | None = None,
        env_id: str | None = None,
        folder: str | Path | None = None,
        default: str | None = None,
    ) -> Config:
        """`resolve` and `parse` in one."""
        return cls.parse(resolve(recipe, overrides, env_id=env_id, folder=folder, default=default))

    @classmethod
    def from_yaml(cls, text: str, where: str = "config") -> Config:
        """What `to_yaml` wrote; equal to the config that wrote it."""
        return cls.parse(load_yaml(text, where))

    @classmethod
    def from_saved(cls, text: str, where: str = "config") -> Config:
        """`from_yaml` of a run's own file, which release 0.1 may have written with the names of its time."""
        return cls.parse_saved(load_yaml(text, where))

    def in_new_names(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted overrides that a run of release 0.1 may have been made with, under the names that its options have today."""
        found = {}
        for key, value in overrides.items():
            value = renamed.in_new_kind(key.removesuffix(".kind").rpartition(".")[2], value)
            part, path = self, []
            for name in key.split("."):
                path.append(renamed.options_of(type(part)).get(name, name))
                part = getattr(part, str(path[-1]), None)
            if isinstance(part, Frozen) and isinstance(value, Mapping):
                value = _with_kinds(type(part), value, rename=True)
            if None not in path:
                found[".".join(path)] = value
        return found

    def to_yaml(self) -> str:
        """Every option with its value, in the order of the classes."""
        return dump_yaml(self.model_dump())

    def override(self, overrides: Mapping | Sequence[str] | None) -> Config:
        """A validated copy with dotted keys changed; a changed `kind` starts that part from its defaults."""
        names, given = combine(overrides)
        if names:
            raise ConfigError(f"{names} names files, and only a recipe starts from files. Give single options here.")
        return type(self).parse(merge(self.model_dump(), given))

    @property
    def recipe_name(self) -> str:
        """A name for files: the recipe's, else the environment's, in letters that every file system takes."""
        name = self.recipe or str(getattr(self.env, "id", None) or "run").rpartition(":")[2]
        return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "run"


def resolve(
    recipe: str | Path | Mapping | None = None,
    overrides: Mapping | Sequence[str] | None = None,
    *,
    env_id: str | None = None,
    folder: str | Path | None = None,
    default: str | None = None,
) -> dict[str, Any]:
    """The plain data of a run's config: size, model, default, recipe, overrides, each merged over the ones before.

    recipe     a name in configs/env, a path of a YAML file, a gym id (the recipe made for it, else its bare default),
               or the content of a recipe
    overrides  `["train.ratio=2", "agent=random", "size=small"]`, or a mapping of dotted keys
    env_id     the environment where the caller brings it along; without `recipe` it also finds one
    folder     recipes of the user, laid out like configs/ and searched first
    default    file of configs/default for an environment without a recipe

    Class defaults decide the `kind` of a part that no layer names, so that a later layer which changes the kind starts that
    part from its defaults. ConfigError with the nearest name for what is not found.
    """
    out: dict[str, Any] = {}
    for layer in layers(recipe, overrides, env_id=env_id, folder=folder, default=default):
        out = merge(_with_kinds(Config, out), layer)
    return out


def _with_kinds(cls: type[Frozen], data: Mapping, rename: bool = False) -> dict[str, Any]:
    """The data with the default `kind` in every part that names none; `rename`: options of release 0.1 by today's names."""
    out = {}
    for name, value in data.items():
        if rename:
            renamed.check_removed(cls, name, value)
            name = renamed.options_of(cls).get(name, name)
        field = cls.model_fields.get(name)
        if field is not None and _registered(field) and isinstance(value, (str, Mapping)):
            default = _default(field)
            if rename:
                value = renamed.in_new_kind(_registered(field).role, value)
            value = merge({"kind": default["kind"]} if isinstance(default, Mapping) and "kind" in default else {}, value)
        inner = _class_of(field, value) if field is not None and isinstance(value, Mapping) else None
        if name is not None:
            out[name] = _with_kinds(inner, value, rename) if inner else value
    return out


class OptionInfo(NamedTuple):
    """One option as `describe` lists it."""

    key: str
    type: str
    default: Any
    description: str


REQUIRED = "(required)"


def describe(config: type[Frozen] | Frozen, prefix: str = "") -> list[OptionInfo]:
    """Every option below a config class with its default, or below a config with its value, under its dotted key.

    Parts are followed into the kind that is the default (or the value); their `kind` is a row of its own.
    """
    if isinstance(config, Frozen):
        return list(_option_infos(type(config), config.model_dump(), prefix))
    return list(_option_infos(config, {}, prefix))


def _option_infos(cls: type[Frozen], given: Mapping, prefix: str) -> Iterator[OptionInfo]:
    for name, field in cls.model_fields.items():
        value, key, about = _default(field), prefix + name, field.description or ""
        if name in given:
            value = merge(value, given[name])
        value = REQUIRED if value is PydanticUndefined else value
        inner = _class_of(field, value) if isinstance(value, Mapping) else None
        part = _registered(field)
        if part and not part.kind:
            kind = value.get("kind") if isinstance(value, Mapping) else value
            words = [*registry.kinds(part.role), *(["null"] if type(None) in get_args(field.annotation) else [])]
            yield OptionInfo(f"{key}.kind" if isinstance(value, Mapping) else key, " | ".join(words) or part.role, kind, about)
        elif inner is None and not part:
            yield OptionInfo(key, _type_name(field.annotation, field.metadata), value, about)
        if inner is not None:
            options = _option_infos(inner, value, f"{key}.")
            yield from (option for option in options if not (part and option.key == f"{key}.kind"))


def differences(old: Frozen, new: Frozen) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every option that differs; None where one side has no such option."""
    before, after = ({option.key: option.default for option in describe(config)} for config in (old, new))
    return [(key, before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)]


def changed(config: Config) -> list[tuple[str, Any, Any]]:
    """`differences` from the options' own defaults: what the default of the spaces, a recipe and the user chose."""
    defaults = Config.parse({"env": {"id": "custom"}, "agent": {"kind": config.agent.kind}})
    return [entry for entry in differences(defaults, config) if entry[0] != "description"]


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A field's type in the words of a YAML file: `int >= 1`, `hwc | chw | null`, `list of int`."""
    origin, args = get_origin(annotation), get_args(annotation)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(m, word)}" for m in metadata for word, sign in signs.items() if getattr(m, word, None) is not None]
    if origin is Annotated:
        named = next((m for m in args[1:] if isinstance(m, Part)), None)
        name = named.role if named else _type_name(args[0], args[1:])
    elif origin is Literal:
        name = " | ".join(str(a) for a in args)
    elif origin in (Union, types.UnionType):
        name = " | ".join(_type_name(a) for a in args)
    elif origin in (tuple, list):
        words = [_type_name(a) for a in args if a is not ...]
        name = f"list of {words[0]}" if len(set(words)) == 1 else f"list ({', '.join(words)})"
    elif origin is dict:
        name = f"mapping of {_type_name(args[1])}"
    else:
        words = {type(None): "null", Any: "any", pydantic.JsonValue: "any", Path: "path", bool: "true | false"}
        name = words.get(annotation, getattr(annotation, "__name__", "any"))
    return " ".join([name, " and ".join(limits)]).strip()
