"""What the numbers of an observation are called: as the user says, as in environments that everybody knows, or by their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from worldmodel.errors import ConfigError, did_you_mean
from worldmodel.spaces.keys import KeySpec
from worldmodel.spaces.specs import ObsSpec

Names = Sequence[str] | Mapping[str, Sequence[str]]

_CARTPOLE = ("cart position [m]", "cart velocity [m/s]", "pole angle [rad]", "pole angular velocity [rad/s]")
KNOWN = {
    "CartPole-v0": _CARTPOLE,
    "CartPole-v1": _CARTPOLE,
    "Pendulum-v1": ("cos(angle)", "sin(angle)", "angular velocity [rad/s]"),
    "Acrobot-v1": (
        *("cos(angle 1)", "sin(angle 1)", "cos(angle 2)", "sin(angle 2)"),
        *("angular velocity 1 [rad/s]", "angular velocity 2 [rad/s]"),
    ),
}
"""Names, with units, of the D numbers of a vector observation, by the id of its environment."""


def known_names(env_id: str) -> tuple[str, ...] | None:
    """The names of a registered id, with or without a "module:" in front; None where nobody has named them."""
    return KNOWN.get(env_id.rpartition(":")[2])


def signal_names(spec: ObsSpec, given: Names | None = None, env_id: str = "") -> dict[str, tuple[str, ...]]:
    """{key: names of its D canonical numbers}, for all keys but images.

    given   `env.names`: a name for each number of an observation that is no Dict, or {key: such names}; a category is `name=2`
    env_id  whose names are taken where none are given

    Without either they are `obs[0]`, `obs[1]`, ... of a vector, `obs=2` of a category, `obs[1]=2` of the second category of
    several. Raises ConfigError where names do not fit the space, or one occurs twice.
    """
    chosen, known = {} if given is None else _by_key(spec, given), known_names(env_id)
    names = {}
    for name, key in spec.keys.items():
        if key.kind == "image":
            continue
        if name in chosen:
            places = tuple(chosen[name])
        elif known is not None and key.kind == "vector" and key.shape == (len(known),):
            places = known
        else:
            places = tuple(f"{name}[{','.join(map(str, index))}]" if index else name for index in np.ndindex(key.raw_shape))
        names[name] = _of_canonical(key, places)
    every = [name for group in names.values() for name in group]
    if repeated := sorted({name for name in every if every.count(name) > 1}) if chosen else []:
        raise ConfigError(f"env.names: {repeated} would name two numbers. Expected a name of its own for each.")
    return names


def _by_key(spec: ObsSpec, given: Names) -> Mapping[str, Sequence[str]]:
    """{key: names} of `env.names`; ConfigError where these do not fit the space."""
    if not isinstance(given, Mapping):
        if not spec.single:
            raise ConfigError(
                f"env.names is a list, and the observation has the keys {sorted(spec.keys)}. Expected {{key: [names]}}, for some "
                "of them or for all."
            )
        given = {"obs": given}
    for name, names in given.items():
        if name not in spec.keys:
            raise ConfigError(f"env.names: the observation has no key '{name}'.{did_you_mean(name, spec.keys)}")
        key, where = spec.keys[name], "env.names" if spec.single else f"env.names.{name}"
        if key.kind == "image":
            raise ConfigError(f"{where}: '{name}' is a picture ({key.space}), whose pixels have no names. Leave it out.")
        count = int(np.prod(key.raw_shape))
        if len(names) != count:
            raise ConfigError(f"{where} has {len(names)} names; expected {count}, one for each number of {key.space}.")
        if not all(isinstance(word, str) and word.strip() for word in names):
            raise ConfigError(f"{where} is {list(names)}; expected a word for each number.")
    return given


def _of_canonical(key: KeySpec, places: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a key's raw numbers -> those of its canonical ones: of each category in place of the categorical number."""
    if key.kind != "categorical":
        return places
    groups = zip(places, key.start, key.sizes)
    return tuple(f"{place}={value}" for place, start, size in groups for value in range(start, start + size))
