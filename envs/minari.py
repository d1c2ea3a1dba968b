"""Reads and writes Minari's data sets (https://minari.farama.org) on this machine; nothing is downloaded.

Nested spaces become one flat Dict, as those of an environment do, so that a model of the data fits the environment. Only Minari's
metadata and arrays are read: no environment is made.
"""

from __future__ import annotations

import inspect
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from worldmodel.envs.extras import absent, install
from worldmodel.envs.wrappers import Flattener
from worldmodel.errors import ConfigError, CorruptError, MissingExtraError, StorageError, UnsupportedSpaceError, did_you_mean
from worldmodel.spaces.layouts import Layout
from worldmodel.storage.files import storage_errors
from worldmodel.storage.recording import Recording

PREFIX = "minari:"
Declared = Callable[[gym.Space], Mapping[str, Any]]


def read(dataset_id: str, layout: Layout | Mapping[str, Layout] | None = None, declared: Declared | None = None) -> Recording:
    """The episodes of a local Minari data set. Raises ConfigError (with near names), CorruptError, MissingExtraError.

    declared  `EnvConfig.declared`: the keys that are left out and the integers that are categories, for the data set's space
    """
    minari = _minari()
    name = f"{PREFIX}{dataset_id}"
    folder = _folder(_well_formed(dataset_id))
    if not (folder / "data").is_dir():
        raise _absent(minari, dataset_id)
    try:
        metadata = minari.dataset.minari_storage.MinariStorage.read_raw_metadata(folder / "data")
        if not {"observation_space", "action_space"} <= metadata.keys():
            raise ConfigError(f"{name} says nothing of its spaces. Expected a data set that Minari 0.5 or later wrote.")
        dataset = minari.load_dataset(dataset_id)
        flatten = Flattener(dataset.observation_space, **({} if declared is None else declared(dataset.observation_space)))
        return Recording.from_episodes(
            flatten.space,
            dataset.action_space,
            _episodes(dataset, flatten),
            layout=layout,
            env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
            origin=name,
        )
    except (ConfigError, UnsupportedSpaceError, MissingExtraError):
        raise
    except ImportError as error:
        raise _missing(error) from error
    except MemoryError as error:
        raise StorageError(f"{name} does not fit into memory: {error}. Split it with minari.split_dataset.") from error
    except Exception as error:  # any error of Minari or HDF5 in a damaged file
        raise CorruptError(
            f"{name} in {folder} cannot be read: {type(error).__name__}: {error}. Restore it from a copy, or fetch it again."
        ) from error


def _episodes(dataset: Any, flatten: Flattener) -> Iterator[dict[str, Any]]:
    for episode in dataset.iterate_episodes():
        rest = {name: getattr(episode, name) for name in ("actions", "rewards", "terminations", "truncations")}
        yield {"observations": flatten(episode.observations), **rest}


def check_free(dataset_id: str) -> Path:
    """The folder for a new data set. Raises ConfigError where the id is malformed or taken, MissingExtraError."""
    folder = _folder(_well_formed(dataset_id))
    if folder.exists():
        raise ConfigError(
            f"The Minari data set '{dataset_id}' is there already, and is not overwritten. Choose another id, or delete it with "
            f"`minari delete {dataset_id}`."
        )
    return folder


def write(dataset_id: str, recording: Recording) -> Path:
    """Writes a new local Minari data set of these episodes, whole or not at all; gives its folder. Pictures are stored exactly.

    Raises ConfigError where the id is malformed or taken or HDF5 has no name for a key, StorageError, MissingExtraError.
    """
    folder, minari = check_free(dataset_id), _minari()
    for name in recording.obs:
        if not re.fullmatch("[^/\0\ud800-\udfff]+", name) or name == ".":
            raise ConfigError(
                f"The observation key {name!r} cannot name an array of HDF5, where '/' makes groups. Expected no '/', NUL or half "
                "a character, and not '.' alone: rename it with a wrapper, or export to an .npz file."
            )
    from minari.data_collector.episode_buffer import EpisodeBuffer

    # Made from whole arrays: Minari's way to build them step by step needs jax.
    buffers = [EpisodeBuffer(**recording.episode(number)) for number in range(recording.episodes)]
    exact = {"jpeg_encoding": False} if "jpeg_encoding" in inspect.signature(minari.create_dataset_from_buffers).parameters else {}
    try:
        with storage_errors("write", folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing author
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                observation_space=recording.obs_spec.space,
                action_space=recording.action_spec.space,
                description=recording.origin,
                **exact,
            )
            spec = _env_spec(recording)
            if spec is not None:  # as an argument above it would make the environment
                dataset.storage.update_metadata({"env_spec": spec.to_json()})
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ImportError):
            raise _missing(error) from error
        raise
    return folder


def _env_spec(recording: Recording) -> EnvSpec | None:
    """The spec of the environment; None where it is unknown, or had wrappers that a spec cannot name.

    The registered spec under the id with its module; of an id that is not registered here, the bare id.
    """
    env_id, options = recording.env_id, recording.env_options
    if env_id is None or options is None or options.keys() - {"kwargs", "max_episode_steps"}:
        return None
    known = gym.registry.get(env_id.rpartition(":")[2])
    if known is None or not isinstance(known.entry_point, str):
        return EnvSpec(id=env_id, kwargs=options.get("kwargs", {}), max_episode_steps=options.get("max_episode_steps"))
    limit = options.get("max_episode_steps", known.max_episode_steps)
    kwargs = {**known.kwargs, **options.get("kwargs", {})}
    return EnvSpec(id=env_id, entry_point=known.entry_point, max_episode_steps=limit, kwargs=kwargs)


def _absent(minari: Any, dataset_id: str) -> ConfigError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other data sets that are damaged
        known = list(minari.list_local_datasets())
    hint = did_you_mean(dataset_id, known)
    if not known:
        hint = " There is none."
    elif not hint.startswith(" Did"):
        hint = f" There are {len(known)}: {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."
    return ConfigError(
        f"'{PREFIX}{dataset_id}' is not among the Minari data sets in {_folder('')}.{hint} Fetch it with `minari download "
        f"{dataset_id}`, or say where it lies in the environment variable MINARI_DATASETS_PATH."
    )


def _well_formed(dataset_id: str) -> str:
    """The id, checked to be one of Minari: another one may lead out of Minari's folder."""
    try:
        _minari().dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # a TypeError where the version is missing
        raise ConfigError(f"'{dataset_id}' is no id of Minari: {error}. Expected words like 'rail/random-v0'.") from error
    return dataset_id


def _folder(dataset_id: str) -> Path:
    from minari.storage.datasets_root_dir import get_dataset_path

    with storage_errors("create", Path("~/.minari")):
        return Path(get_dataset_path(dataset_id))


def _minari() -> Any:
    try:
        import h5py  # noqa: F401 (Minari imports it only when it opens a file)
        import minari
        import minari.dataset.minari_storage
    except ImportError as error:
        raise _missing(error) from error
    return minari


def _missing(error: ImportError) -> MissingExtraError:
    names = absent(error)
    if not names:
        return MissingExtraError(f"Minari is installed and does not work: {error}. {install('data')}")
    known = {"minari", "h5py"}.intersection(names)
    remedy = install("data") if known else f"Install it with: pip install {names[0]}"
    return MissingExtraError(f"Minari's data sets need the package '{min(known or names)}', which is not installed. {remedy}")
