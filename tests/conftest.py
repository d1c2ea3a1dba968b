"""What tests share: one thread, shape annotations that are executed, small worlds and a batch with known flags."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook
from torch import Tensor

torch.set_num_threads(1)
gc.disable()  # while everything is imported and collected: `pytest_collection_finish`

# The rooms whose annotations speak of shapes. The hook must stand before any of them is imported.
TENSOR_ROOMS = "data nn distributions encoders decoders heads diamond dynamics objectives model learner agents".split()
install_import_hook(
    [f"worldmodel.{room}" for room in TENSOR_ROOMS],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float, as everywhere in Python
)

from worldmodel import registry  # noqa: E402
from worldmodel.config import Frozen  # noqa: E402
from worldmodel.data import Batch  # noqa: E402
from worldmodel.distributions import EncoderInterface, Latent, Posterior, PosteriorSource  # noqa: E402
from worldmodel.model import WorldModel  # noqa: E402
from worldmodel.spaces import ActionSpec, ObsSpec  # noqa: E402

VECTOR = spaces.Box(-1, 1, (4,), np.float32)
TWO_ACTIONS = spaces.Discrete(2)

SIZES = {
    "units": 16,
    "layers": 1,
    "depth": 4,
    "deter": 12,
    "code": 3,
    "bins": 21,
    "limit": 3.0,
    "size": 2,
    "variables": 2,
    "classes": 3,
    "free_nats": 0.0,
    "blocks": 1,
    "heads": 2,
    "window": 4,
    "posterior_layers": 1,
    "unimix": 0.01,
    "min_std": 0.01,
    "reads": "feature",
    "sigma": "fitted",
    "min_sigma": 0.05,
    "min_sigma_image": 0.05,
    "weight_sigma_image": 0.5,
    "components": 5,
    "top": 1,
    "transforms": 2,
    "slow": 0,
    "slow_every": 3,
    "frames": 4,
    "refine_depth": 4,
    "refine_units": 16,
}
"""Options by name: a part that has one gets this value. A new part is small without being known here, and no test
depends on a default."""


def small(role: str, kind: str, **options) -> Frozen:
    """The config of a registered part at a size for tests."""
    config = registry.config_class(role, kind)
    sizes = {name: value for name, value in SIZES.items() if name in config.model_fields}
    return config(**{"kind": kind, **sizes, **options})


def small_world(
    observation: spaces.Space = VECTOR,
    action: spaces.Space = TWO_ACTIONS,
    *,
    latent: str = "categorical",
    dynamics: dict | None = None,
    seed: int = 0,
    **parts,
) -> WorldModel:
    """A world model of some thousand parameters; `dynamics` holds options of that part, `parts` whole configs."""
    law, dynamics = (
        small("distribution", small_latent(latent).family.kind),
        {"kind": "rssm", "latent": small("latent", latent), **(dynamics or {})},
    )
    if dynamics["kind"] == "rssm":
        dynamics.setdefault("posterior", "filtering")
    if "latent" not in registry.config_class("dynamics", dynamics["kind"]).model_fields:
        del dynamics["latent"]
    config = {
        "vector_scaling": "standardise",
        "encoder": small("encoder", "standard"),
        "decoder": small("decoder", "standard"),
        "heads": small("heads", "standard"),
        "dynamics": small("dynamics", **dynamics),
        "transition": law,
        "initial": law,
    }
    return WorldModel.from_spaces(observation, action, {**config, **parts}, seed=seed)


def known_batch(observation: spaces.Space = VECTOR, action: spaces.Space = TWO_ACTIONS, rows: int = 3, seed: int = 0) -> Batch:
    """Six random raw steps a row with these flags (F first, T terminal end, L truncated end, . in between):

        row 0   F . T F . .
        row 1   . . . L F .
        others  . . . . . .

    The reward is 7 where it is padding; actions that never happened are 0.
    """
    length, spec, codec, rng = 6, ObsSpec.from_space(observation), ActionSpec.from_space(action), np.random.default_rng(seed)
    obs = {}
    for name, key in spec.keys.items():
        space = key.space
        space.seed(seed)
        samples = np.stack([space.sample() for _ in range(rows * length)])
        obs[name] = torch.from_numpy(samples.reshape(rows, length, *key.raw_shape).astype(key.raw_dtype))
    first, last, terminal = (torch.zeros(rows, length, dtype=torch.bool) for _ in range(3))
    first[0, [0, 3]] = last[0, 2] = terminal[0, 2] = True
    if rows > 1:
        first[1, 4] = last[1, 3] = True
    actions = torch.from_numpy(codec.sample(rows * (length + 1), rng)).view(rows, length + 1, codec.dim)
    taken, previous = actions[:, 1:].clone(), actions[:, :-1].clone()
    taken[last], previous[first] = 0, 0
    reward = torch.from_numpy(rng.normal(size=(rows, length)).astype(np.float32))
    return Batch(obs, taken, previous, reward.masked_fill(first, 7.0), first, last, terminal)


def flagged(is_first: Tensor) -> Batch:
    """Rows of which nothing is told but where episodes open: what a dynamics needs for its losses."""
    none, no = torch.zeros(*is_first.shape, 1), torch.zeros_like(is_first)
    return Batch({}, none, none, none[..., 0], is_first, no, no)


def generator(seed: int = 0) -> torch.Generator:
    """A generator with a known seed."""
    return torch.Generator().manual_seed(seed)


def small_latent(kind: str, **options) -> Latent:
    """A kind of code at a size for tests."""
    return registry.build("latent", small("latent", kind, **options))


class SmallEyes(torch.nn.Module):
    """An encoder of two keys, a vector and an image, and a posterior over its embeddings, always with the same weights."""

    SHAPES = {"vector": (3,), "image": (1, 2, 2)}
    SIZE = 6

    def __init__(self, latent: Latent, h_dim: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.see, self.judge = torch.nn.Linear(7, self.SIZE), torch.nn.Linear(self.SIZE, latent.parameters)
            self.carry = torch.nn.Linear(h_dim, latent.parameters, bias=False) if h_dim else None
            for layer in (self.see, self.judge):
                torch.nn.init.orthogonal_(layer.weight, 1.5)
        self.latent = latent

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        return self.see(torch.cat([obs[name].flatten(1) for name in self.SHAPES], -1))

    def posterior(self, embed: Tensor, carry: Tensor) -> Posterior:
        raw = self.judge(embed)
        return self.latent.distribution(raw if self.carry is None else raw + 0.3 * self.carry(carry))


def small_source(latent: Latent, h_dim: int = 0) -> PosteriorSource:
    """What laws made of posteriors are built with; its module is `source.posterior.__self__`."""
    eyes = SmallEyes(latent, h_dim)
    return PosteriorSource(EncoderInterface(SmallEyes.SHAPES, SmallEyes.SIZE, eyes.encode), h_dim, eyes.posterior)


def descend(loss, parameters, lr: float, steps: int) -> None:
    """Adam on `loss(step)`."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def assert_near(estimate: Tensor, truth: Tensor, draws: int, spread: Tensor) -> None:
    """Within five standard errors of a Monte Carlo mean."""
    torch.testing.assert_close(estimate, truth, rtol=0, atol=float(5 * spread.detach().max() / math.sqrt(draws)) + 2e-3)


def reached(outputs: Tensor, **inputs: Tensor) -> set[str]:
    """The names of the inputs that the sum of `outputs` has a gradient for."""
    if not outputs.requires_grad:
        return set()
    gradients = torch.autograd.grad(outputs.sum(), list(inputs.values()), allow_unused=True, retain_graph=True)
    return {name for name, g in zip(inputs, gradients) if g is not None and g.abs().sum() > 0}


# Agents ----------------------------------------------------------------------------------------------------------------

CHAIN = "worldmodel.envs:Chain-v0"
IMAGE = spaces.Box(0, 255, (16, 16, 3), np.uint8)
SMALL_WORLD = {
    **{f"model.{part}.units": 8 for part in ("encoder", "decoder", "heads", "dynamics")},
    **{f"model.{part}.layers": 1 for part in ("encoder", "decoder", "heads")},
    **{f"model.{part}.depth": 2 for part in ("encoder", "decoder")},
    "model.vector_scaling": "standardise",
    "model.heads.bins": 21,
    "model.dynamics.kind": "rssm",
    "model.dynamics.deter": 8,
    "model.dynamics.latent": {"kind": "categorical", "variables": 2, "classes": 3},
    "train.burn_in": 0,
    "train.random_action_repeat": 1.0,
    "train.batch_size": 3,
    "train.batch_length": 6,
    "train.prefill": 20,
    "train.pretrain": 2,
    "train.ratio": 0.2,
}
"""Dotted keys of an agent that learns in a second."""
SMALL_BEHAVIOUR = {"agent.units": 8, "agent.layers": 1, "agent.bins": 21, "agent.horizon": 2, "agent.starts": 6}
SMALL_BEHAVIOUR |= {"agent.gradient": "reinforce", "agent.lr": 1e-3}


def small_dreamer(env=CHAIN, policy: str = "MlpPolicy", seed: int = 0, tensorboard_log: str | None = None, **config):
    """A Dreamer of a thousand parameters; `config` holds dotted keys."""
    from worldmodel.agents.dreamer import Dreamer  # here, so that tests of lower rooms need no Stable-Baselines3

    config = {**SMALL_WORLD, **SMALL_BEHAVIOUR, **config}
    return Dreamer(policy, env, config=config, seed=seed, device="cpu", tensorboard_log=tensorboard_log)


class Toy(gym.Env):
    """Random observations of any space; episodes of 5 steps that end by termination and by truncation in turn.

    `actions` lists what the environment got; `spoil` is called on each (observation, reward).
    """

    def __init__(self, observation: spaces.Space = VECTOR, action: spaces.Space = TWO_ACTIONS, spoil=None):
        self.observation_space, self.action_space, self.spoil = observation, action, spoil
        self.actions: list[np.ndarray] = []
        self.episode = self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        self.steps += 1
        ended, terminal = self.steps == 5, self.episode % 2 == 1
        obs, reward = self.observation_space.sample(), 1.0
        if self.spoil is not None:
            obs, reward = self.spoil(obs, reward)
        return obs, reward, ended and terminal, ended and not terminal, {}


def all_weights(agent) -> Tensor:
    """Every parameter and buffer of an agent's policy, world model included, in one vector."""
    return torch.cat([x.detach().flatten().double() for x in agent.policy.state_dict().values()])


def sequence(batch: Batch, row: int = 0) -> SimpleNamespace:
    """One sequence of a batch: its fields without their first axis."""
    fields = {name: x[row] for name, x in vars(batch).items() if name != "obs" and x is not None}
    return SimpleNamespace(obs={name: x[row] for name, x in batch.obs.items()}, **fields)


def stored(agent) -> SimpleNamespace:
    """All rows that an agent with one environment has stored, in order."""
    return sequence(agent.replay.sample(1, agent.replay.lengths[0], np.random.default_rng(0)))


# Shapes -----------------------------------------------------------------------------------------------------------------

WHOLE_RUNS = """adapter check checkpoint checkpoint_zip cli commands disk_replay docs dyna env_habits exchange house imagined
interrupted isolation life_signs loop offline options recording remedies replay replay_habits restarts reward_scale run
runs_of_0_1 sb3 sb3_habits segments sources tensorboard train two_stage users_space watch""".split()
"""Test modules, and all of tests/reliability, that train in order to look at files, processes, environments or options. Checking
annotations at each call takes two fifths of a training, and the tests of the tensors themselves check them all."""


@contextmanager
def unchecked(off: bool = True) -> Iterator[None]:
    """Annotations are not executed in here; for the hundreds of updates that a test is not about."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", off or before)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module", autouse=True)
def _shapes_are_checked(request):
    """Whether annotations are executed while a module's tests run."""
    path = request.path
    with unchecked(path.parent.name == "reliability" or path.stem.removeprefix("test_") in WHOLE_RUNS):
        yield


# Time -------------------------------------------------------------------------------------------------------------------

DURABLE = "checkpoint pictures replay segments storage_faults".split()
"""Test modules that are about calls of `os.fsync`. No other waits for the disk: a process that is killed loses nothing that it has
written, and power is not cut here."""


@pytest.fixture(scope="module", autouse=True)
def _disk_is_waited_for(request):
    """Whether `os.fsync` waits while a module's tests run. A training saves some forty files, and waits as long as it computes."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem.removeprefix("test_") not in DURABLE:
            patch.setattr(os, "fsync", lambda handle: None)
        yield


LONGEST = """kills storage_faults warm_start brought sb3 memory watch contracts reproducible space_catalogue model cli dynamics
hostile_files bad_environments dead_workers signals actor_critic options house docs offline interrupted loop prior_section
two_sample diagnose exploitation holes compare sweep figures figures_of_versions""".split()
"""Test modules that take longest. They come first: pytest-xdist hands whole files to its workers, and where one of these is the
last, the other workers have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; it takes --no-loadscope-reorder for pytest-xdist not to sort them by the number of their tests."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection need go through it, and forks share its memory."""
    gc.collect()
    gc.freeze()
    gc.enable()


# What was survived ------------------------------------------------------------------------------------------------------


@pytest.fixture
def figure(record_property):
    """`figure("R1", "12 stops, 0 losses differ")` prints a line of the catalogue when all tests are through."""

    def note(identity: str, text: str) -> None:
        record_property(f"figure {identity}", text)

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    """The figures of the reliability tests, and what was left out for want of a tool."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    found = [
        (name.removeprefix("figure "), text) for r in reports for name, text in r.user_properties if name.startswith("figure ")
    ]
    left_out = [r for r in terminalreporter.getreports("skipped") if "left out: " in str(r.longrepr)]
    if found or left_out:
        terminalreporter.section("reliability")
    for identity, text in sorted(found):
        terminalreporter.line(f"{identity:4} {text}")
    for report in left_out:
        terminalreporter.line(f"left out: {report.nodeid}: {str(report.longrepr[2]).partition('left out: ')[2]}")
