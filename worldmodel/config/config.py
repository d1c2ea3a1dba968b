"""YAML recipes -> frozen, typed configs. A key that nobody knows is never ignored: it names its nearest neighbour.

Three steps, each usable alone: `load_yaml` reads text into plain data, `resolve` lays recipes and overrides over one
another (both in recipes.py, but for the knowledge of classes), `Config.parse` turns the result into typed, immutable
values. Rooms own the classes of their groups and parts and tell the registry; this module imports none of them.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticUndefined, ValidationError, core_schema

from worldmodel import registry, renamed
from worldmodel.config.recipes import combine, dump_yaml, layers, load_yaml, merge
from worldmodel.errors import ConfigError, did_you_mean

Self = TypeVar("Self", bound="Frozen")


# ---- typed values ----------------------------------------------------------------------------------------------------


class _RaisesConfigError(type(pydantic.BaseModel)):
    """Direct construction reports like a file does: a ConfigError with the key."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise _config_error(error, cls) from None


class Frozen(pydantic.BaseModel, metaclass=_RaisesConfigError):
    """Base of every config: immutable, no unknown keys, no silent conversions.

    `true` is no integer, `"3"` is no number, an integer is a float, a list is a tuple, a string is a Path;
    NaN and infinity are refused unless the field says `Field(allow_inf_nan=True)`. Defaults are validated too, and
    lazily: `dynamics: Part["dynamics"] = {"kind": "rssm"}` imports nothing until a config is made. A mapping given
    for a field is merged over that field's default, so one option can be set without resetting its neighbours.
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
            raise _errors(cls, {name: f"is not an option of {cls.__name__}." for name in unknown}, data)
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
        return cls.parse(_in_new_names(cls, data))

    def replace(self: Self, **changes: Any) -> Self:
        """A validated copy with some options changed; mappings are merged."""
        return type(self).parse(merge(self.model_dump(), changes))


class _Registered:
    """Annotation: the registry names the value's class, under `role` and its own `kind`, or under a fixed `kind`."""

    def __init__(self, role: str, kind: str | None = None, *, group: bool = False) -> None:
        self.role, self.kind, self.group = role, kind, group

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda value, info: value.model_dump(mode=info.mode), info_arg=True)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def config_class(self, value: Any) -> type[Frozen]:
        """The class for a value: ConfigError where the registry has none, ValueError where the value names none."""
        kind = self.kind or (value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None))
        if not isinstance(kind, str):
            raise ValueError(f"should be a mapping with a 'kind', one of: {', '.join(registry.kinds(self.role))}")
        if self.group and not registry.has(self.role, kind) and (self.kind or not registry.kinds(self.role)):
            return EmptyGroup  # no installed room has options for this group
        return registry.config_class(self.role, kind)

    def validate(self, value: Any) -> Frozen:
        value = {"kind": value} if isinstance(value, str) and not self.kind else value
        try:
            config = self.config_class(value)
        except ConfigError as error:
            raise _errors(Frozen, {"kind": f"cannot be chosen: {error}"}, value if isinstance(value, Mapping) else {}) from None
        if config is EmptyGroup and set(value) - {"kind"}:
            raise ValueError(f"nothing that is installed has options here, so it must be empty, not {value!r}")
        return config.model_validate(value)


class Part:
    """`Part["encoder"]`: a field that holds the config of one encoder, chosen by its `kind`.

    A mapping with `kind` is parsed by the class that the registry names (without: the default's kind); a word alone is
    the kind; an instance of that class passes. `Part["marginal"] | None` and `tuple[Part["head"], ...]` work too.
    """

    def __class_getitem__(cls, role: str) -> Any:
        return Annotated[Any, _Registered(role)]


class Group:
    """`Group["train"]`: a field whose class a room registered with `@register("group", "train")`."""

    def __class_getitem__(cls, name: str) -> Any:
        return Annotated[Any, _Registered("group", name, group=True)]


class EmptyGroup(Frozen):
    """A group for which no installed room has options."""

    kind: str | None = None


def _plain(value: Any) -> Any:
    """A copy that YAML and JSON can hold: mappings with string keys, lists, finite numbers, strings, booleans, None."""
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"may only have words as keys, not {[n for n in value if not isinstance(n, str)]}")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}, but numbers must be finite")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"may hold numbers, words, lists and mappings only, not {type(value).__name__}")


Options = Annotated[dict[str, Any], pydantic.AfterValidator(_plain)]
"""Field type for free keyword arguments (of an environment, of a wrapper): any plain, finite data."""


def _registered(field: pydantic.fields.FieldInfo) -> _Registered | None:
    """The `Part` or `Group` annotation of a field, also within `... | None`."""
    inner = [m for option in get_args(field.annotation) for m in getattr(option, "__metadata__", ())]
    return next((m for m in [*field.metadata, *inner] if isinstance(m, _Registered)), None)


def _default(field: pydantic.fields.FieldInfo) -> Any:
    """A field's default as plain data; a part's as a mapping with its kind; PydanticUndefined where it is required."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Frozen):
        return default.model_dump()
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
    if isinstance(value, str) and _registered(field):
        value = {"kind": value}
    if isinstance(value, Mapping):
        default = _default(field)
        value = merge(default if isinstance(default, Mapping) else None, value)
    return _as_annotated(field.annotation, value)


def _as_annotated(annotation: Any, value: Any) -> Any:
    """Lists as tuples and strings as paths where the annotation asks for them: YAML has neither."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_annotated(args[0], value)
    if origin in (Union, types.UnionType):
        fitted = [_as_annotated(option, value) for option in args]
        return next((f for f in fitted if type(f) is not type(value)), value)
    if isinstance(value, dict) and origin is dict:
        return {name: _as_annotated(args[1], item) for name, item in value.items()}
    if isinstance(value, list) and (annotation is tuple or origin is tuple):
        inner = args[:1] * len(value) if args[1:] == (...,) else args
        inner = inner if len(inner) == len(value) else (Any,) * len(value)
        return tuple(_as_annotated(a, v) for a, v in zip(inner, value, strict=True))
    return Path(value) if isinstance(value, str) and annotation is Path else value


# ---- errors ----------------------------------------------------------------------------------------------------------


def _errors(cls: type[Frozen], messages: dict[str, str], data: Mapping) -> ValidationError:
    """A finding of our own for each key; pydantic puts the outer keys in front as it passes them upwards."""
    details = []
    for key, text in messages.items():
        kind = PydanticCustomError("worldmodel", "{text}", {"text": text, "cls": cls})
        details.append(InitErrorDetails(type=kind, loc=(key,), input=data.get(key)))
    return ValidationError.from_exception_data(cls.__name__, details)


def _config_error(error: ValidationError, root: type[Frozen]) -> ConfigError:
    """The same findings, one a line, each with its full dotted key and, for an unknown one, the nearest right name."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(step) for step in item["loc"])
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
    before, _, leaf = key.rpartition(".")
    if leaf in (names := renamed.options_of(cls)):
        now = names[leaf]
        return " It is gone: nothing used it." if now is None else f" It is called '{before}{'.' if before else ''}{now}' now."
    near = did_you_mean(leaf, cls.model_fields)
    known = registry.entries()
    role = next((role for role, _, config in known if config is cls and role != "group"), None)
    kinds = [kind for r, kind, config in known if r == role and leaf in config.model_fields]
    if kinds:
        return f" It is an option of {role} {' and '.join(repr(k) for k in kinds)}."
    if near.startswith(" Did"):
        return near
    elsewhere = [option.key for option in describe(root) if option.key.rpartition(".")[2] == leaf]
    return f" Did you mean {' or '.join(repr(k) for k in elsewhere[:3])}?" if elsewhere else near


# ---- the root --------------------------------------------------------------------------------------------------------


class Config(Frozen):
    """Everything about a run. Each group belongs to the room that registered it; `agent` is chosen by its `kind`."""

    recipe: str | None = pydantic.Field(None, description="name of the recipe that this came from")
    description: str = pydantic.Field("", description="one line about it")
    env: Group["env"] = {}
    model: Group["model"] = {}
    agent: Annotated[Any, _Registered("agent", group=True)] = pydantic.Field({"kind": "dreamer"}, description="what acts")
    train: Group["train"] = {}
    eval: Group["eval"] = {}
    checkpoint: Group["checkpoint"] = {}
    log: Group["log"] = {}

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Path | Mapping | None = None,
        overrides: Mapping | Sequence[str] | None = None,
        env_id: str | None = None,
        folder: str | Path | None = None,
    ) -> Config:
        """`resolve` and `parse` in one."""
        return cls.parse(resolve(recipe, overrides, env_id=env_id, folder=folder))

    @classmethod
    def from_yaml(cls, text: str, where: str = "config") -> Config:
        """What `to_yaml` wrote; equal to the config that wrote it."""
        return cls.parse(load_yaml(text, where))

    @classmethod
    def from_saved(cls, text: str, where: str = "config") -> Config:
        """`from_yaml` of a run's own file, which release 0.1 may have written with the names of its time."""
        return cls.parse_saved(load_yaml(text, where))

    def in_new_names(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted overrides that a run was made with, by the names that its options have today."""
        found = {}
        for key, value in overrides.items():
            config, path = self, []
            for name in key.split("."):
                path.append(renamed.options_of(type(config)).get(name, name))
                config = getattr(config, path[-1] or "", None)
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
) -> dict[str, Any]:
    """The plain data of a run's config: size, then model, then recipe, then overrides, each over the ones before.

    recipe     a name in configs/env, a path of a YAML file, a gym id (the recipe made for it, else its bare default),
               or the content of a recipe
    overrides  `["train.ratio=2", "agent=random", "size=small"]`, or a mapping of dotted keys
    env_id     the environment where the caller brings it along; without `recipe` it also finds one
    folder     recipes of the user, laid out like configs/ and looked at first

    Class defaults lie below all of it: they decide the `kind` of a part that no layer names, so that a layer above
    which changes the kind starts that part afresh. ConfigError with the nearest name for what is not found.
    """
    out: dict[str, Any] = {}
    for layer in layers(recipe, overrides, env_id=env_id, folder=folder):
        out = merge(_with_kinds(Config, out), layer)
    return out


def _with_kinds(cls: type[Frozen], data: Mapping) -> dict[str, Any]:
    """The data with the default `kind` written into every part that names none."""
    out = {}
    for name, value in data.items():
        field = cls.model_fields.get(name)
        if field is not None and _registered(field) and isinstance(value, str):
            value = {"kind": value}
        if field is not None and isinstance(value, Mapping):
            default = _default(field)
            if _registered(field) and isinstance(default, Mapping) and "kind" in default:
                value = {"kind": default["kind"], **value}
            inner = _class_of(field, value)
            value = _with_kinds(inner, value) if inner else value
        out[name] = value
    return out


def _in_new_names(cls: type[Frozen], data: Mapping) -> dict[str, Any]:
    """The data with the options that release 0.1 called otherwise under the names of today."""
    out = {}
    for name, value in data.items():
        name = renamed.options_of(cls).get(name, name)
        field = cls.model_fields.get(name or "")
        inner = _class_of(field, value) if field is not None and isinstance(value, Mapping) else None
        if name is not None:
            out[name] = _in_new_names(inner, value) if inner else value
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
        value = merge(_default(field), given[name]) if name in given else _default(field)
        inner = _class_of(field, value) if isinstance(value, Mapping) else None
        named = _registered(field)
        if named and not named.kind:
            kind = value.get("kind") if isinstance(value, Mapping) else value
            key = f"{prefix}{name}.kind" if isinstance(value, Mapping) else prefix + name
            words = [*registry.kinds(named.role), *(["null"] if type(None) in get_args(field.annotation) else [])]
            yield OptionInfo(key, " | ".join(words) or named.role, _shown(kind), field.description or "")
        elif inner is None and not named:
            yield OptionInfo(prefix + name, _type_name(field.annotation, field.metadata), _shown(value), field.description or "")
        if inner is not None:
            yield from (
                option
                for option in _option_infos(inner, value, f"{prefix}{name}.")
                if not (named and option.key == f"{prefix}{name}.kind")
            )


def differences(old: Frozen, new: Frozen) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every option that differs; None where one side has no such option."""
    before, after = ({option.key: option.default for option in describe(config)} for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _shown(value: Any) -> Any:
    return REQUIRED if value is PydanticUndefined else value


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A field's type in the words of a YAML file: `int >= 1`, `hwc | chw | null`, `list of int`."""
    origin, args = get_origin(annotation), get_args(annotation)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(m, word)}" for m in metadata for word, sign in signs.items() if getattr(m, word, None) is not None]
    if origin is Annotated:
        named = next((m for m in args[1:] if isinstance(m, _Registered)), None)
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
        words = {type(None): "null", Any: "any", Path: "path", bool: "true | false"}
        name = words.get(annotation, getattr(annotation, "__name__", "any"))
    return " ".join([name, " and ".join(limits)]).strip()
