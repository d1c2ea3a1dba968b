"""YAML recipes -> frozen, typed configs. Unknown keys are never ignored: they name their nearest neighbour."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError, core_schema

from worldmodel import registry
from worldmodel.errors import ConfigError, did_you_mean


class _RaisesConfigError(type(pydantic.BaseModel)):
    """Direct construction reports like a file does: a ConfigError with the key."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise config_error(error) from None


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
        unknown = [name for name in data if name not in cls.model_fields]
        if unknown:
            hints = {name: did_you_mean(str(name), cls.model_fields) for name in unknown}
            raise _errors(cls.__name__, {n: f"is not an option of {cls.__name__}.{hint}" for n, hint in hints.items()}, data)
        return {name: _fit(cls.model_fields[name], value) for name, value in data.items()}

    @classmethod
    def parse(cls, data: Any) -> Any:
        """The config that a mapping describes; ConfigError with the full dotted key."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error) from None


def _errors(title: str, messages: dict[str, str], data: Mapping) -> ValidationError:
    details = [
        InitErrorDetails(type=PydanticCustomError("plain", "{text}", {"text": text}), loc=(name,), input=data.get(name))
        for name, text in messages.items()
    ]
    return ValidationError.from_exception_data(title, details)


def config_error(error: ValidationError) -> ConfigError:
    """The same findings, one a line, each with its dotted key."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(step) for step in item["loc"])
        if item["type"] == "plain":
            lines.append(f"configs: '{key}' {item['msg']}")
        else:
            said = item["msg"].replace("Input should", "should").removeprefix("Value error, ")
            lines.append(f"configs: '{key}' {said}; got {item['input']!r}.")
    return ConfigError("\n".join(lines))


def _fit(field: pydantic.fields.FieldInfo, value: Any) -> Any:
    """A file's value in the field's own types, merged over its default where both are mappings."""
    if isinstance(value, str) and any(isinstance(m, _Named) for m in field.metadata):
        value = {"kind": value}
    if isinstance(value, Mapping):
        default = field.get_default(call_default_factory=True)
        return merge(default.model_dump() if isinstance(default, Frozen) else default, value)
    return _as_annotated(field.annotation, value)


def _as_annotated(annotation: Any, value: Any) -> Any:
    """Lists as tuples and strings as paths where the annotation asks for them: YAML has neither."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for option in args:
            fitted = _as_annotated(option, value)
            if fitted is not value:
                return fitted
    elif origin is Annotated:
        return _as_annotated(args[0], value)
    elif isinstance(value, list) and (annotation is tuple or origin is tuple):
        inner = args[:1] * len(value) if len(args) == 2 and args[1] is ... else args
        inner = inner if len(inner) == len(value) else (Any,) * len(value)
        return tuple(_as_annotated(a, v) for a, v in zip(inner, value, strict=True))
    elif isinstance(value, str) and annotation is Path:
        return Path(value)
    return value


class _Named:
    """Annotation: the value's class is named by the registry, under `role` and the value's own `kind`."""

    def __init__(self, role: str) -> None:
        self.role = role

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump())
        )

    def validate(self, value: Any) -> Frozen:
        if isinstance(value, str):
            value = {"kind": value}
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        if not isinstance(kind, str):
            raise ValueError(f"should be a mapping with a 'kind', one of: {', '.join(registry.kinds(self.role))}")
        try:
            config = registry.config_class(self.role, kind)
        except ConfigError as error:
            raise _errors(self.role, {"kind": f"= '{kind}': {error}"}, {"kind": kind}) from None
        return config.model_validate(value)


class Part:
    """`Part["encoder"]`: a field that holds the config of one encoder, chosen by its `kind`.

    A mapping with `kind` is parsed by the class that the registry names; a word alone is the kind; an instance
    of that class passes.
    """

    def __class_getitem__(cls, role: str) -> Any:
        return Annotated[Any, _Named(role)]


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`, mappings deeply; a changed `kind` drops the options of the part below. Shares nothing with either."""
    if not isinstance(above, Mapping):
        return above
    if isinstance(below, str):
        below = {"kind": below}
    if not isinstance(below, Mapping) or ("kind" in above and "kind" in below and above["kind"] != below["kind"]):
        below = {}
    out = {name: merge(None, value) for name, value in below.items()}
    for name, value in above.items():
        out[name] = merge(out.get(name), value)
    return out
