"""Numbers that are not finite, put into batches, gradients and weights: caught where they come in, applied and kept nowhere."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import all_weights
from small_runs import small_train, words

from worldmodel import cli
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.data import Batch
from worldmodel.encoders import VectorScaling
from worldmodel.errors import NumericsError
from worldmodel.spaces import ObsSpec
from worldmodel.storage.run import Run
from worldmodel.storage.weights import optimizer_arrays

AT = 5
"""The update that is spoilt first; one of the world model alone comes before those of actor and critic."""
OPTIONS: dict[str, Any] = {"eval.every": 0, "eval.episodes": 1, "checkpoint.every": 20, "checkpoint.keep": 1000}


class Loud(gym.Env):
    """Pays `pay` and `-pay` in turn and shows numbers up to `see`; episodes end after 7 steps."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, pay: float = 1.0, see: float = 1.0):
        self.pay, self.see, self.steps = pay, see, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), self.pay * (-1) ** self.steps, self.steps >= 7, False, {}

    def _observe(self):
        return (self.see * self.np_random.uniform(-1, 1, 2)).astype(np.float32)


gym.register("Loud-v0", entry_point=Loud)


# Faults -----------------------------------------------------------------------------------------------------------------

Fault = Callable[[WorldModelAlgorithm], AbstractContextManager]
"""A context in which an agent's next update meets the fault."""


def weight(agent: WorldModelAlgorithm, place: str) -> torch.nn.Parameter:
    part, _, name = place.partition(".")
    return dict((agent.world if part == "world" else agent.controller).named_parameters())[name]


def in_batch(field: str, value: float) -> Fault:
    """One number of the batch."""

    @contextmanager
    def spoil(agent: WorldModelAlgorithm) -> Iterator[None]:
        sample = agent.replay.sample

        def sampled(*args: Any, **kwargs: Any) -> Batch:
            batch = sample(*args, **kwargs)
            batch.is_first[1, 2] = False  # the reward of a first row is never read
            (batch.obs["obs"][..., 0] if field == "obs" else batch.reward)[1, 2] = value
            return batch

        agent.replay.sample = sampled
        yield
        del agent.replay.sample

    return spoil


def in_gradient(place: str, factor: float) -> Fault:
    """A whole gradient, which is multiplied."""

    @contextmanager
    def spoil(agent: WorldModelAlgorithm) -> Iterator[None]:
        handle = weight(agent, place).register_hook(lambda gradient: (gradient + 1e-3) * factor)
        yield
        handle.remove()

    return spoil


def in_weight(place: str, value: float) -> Fault:
    """One number of a parameter, which stays."""

    @contextmanager
    def spoil(agent: WorldModelAlgorithm) -> Iterator[None]:
        weight(agent, place).data.view(-1)[0] = value
        yield

    return spoil


TRANSITION, ACTOR, CRITIC = "world.dynamics.transition.net.0.weight", "behaviour.actor.0.weight", "behaviour.critic.0.weight"
PASSING: dict[str, tuple[Fault, str]] = {
    "an observation is NaN": (in_batch("obs", torch.nan), r"observation 'obs', loss/"),
    "an observation is infinite": (in_batch("obs", torch.inf), r"observation 'obs', loss/"),
    "a reward is NaN": (in_batch("reward", torch.nan), r"reward, loss/reward"),
    "a reward is infinite": (in_batch("reward", -torch.inf), r"reward; 3 updates"),
    "a gradient of the world is NaN": (in_gradient(TRANSITION, torch.nan), r"dynamics\.transition\.net\.0\.weight;"),
    "a gradient of the world is infinite": (in_gradient(TRANSITION, torch.inf), r"dynamics\.transition\.net\.0\.weight;"),
    "the norm of finite gradients overflows": (in_gradient(TRANSITION, 1e30), r"gradient_norm;"),
    "a gradient of the actor is NaN": (in_gradient(ACTOR, torch.nan), r"actor\.0\.weight;"),
    "the norm of the actor's gradients overflows": (in_gradient(ACTOR, 1e30), r"actor\.gradient_norm;"),
    "a gradient of the critic is infinite": (in_gradient(CRITIC, torch.inf), r"critic\.0\.weight;"),
}
"""Faults that come and go, and what the message names when they do not go."""
LASTING: dict[str, tuple[Fault, str]] = {
    "a weight of the world is NaN": (in_weight(TRANSITION, torch.nan), r"dynamics\.transition\.net\.0\.weight, loss/dyn"),
    "a weight of the world is infinite": (in_weight(TRANSITION, -torch.inf), r"dynamics\.transition\.net\.0\.weight, loss/dyn"),
    "a weight of the actor is NaN": (in_weight(ACTOR, torch.nan), r"actor\.0\.weight, actor\.loss"),
    "a weight of the critic is infinite": (in_weight(CRITIC, torch.inf), r"actor\.loss, critic\.0\.weight, critic\.loss"),
}
FAULTS = {**PASSING, **LASTING}


def is_of_world(name: str) -> bool:
    return "actor" not in name and "critic" not in name


def state_of(agent: WorldModelAlgorithm, world: bool) -> list[np.ndarray]:
    """All weights and optimiser states of the world model, or of actor and critic."""
    names = ["world"] if world else ["actor", "critic"]
    weights = agent.world.parameters() if world else agent.controller.parameters()
    optimizers = [optimizer_arrays(agent.optimizers_by_name[name]) for name in names]
    return [p.detach().numpy().copy() for p in weights] + [x.copy() for arrays in optimizers for x in arrays.values()]


def spoil_updates(monkeypatch: pytest.MonkeyPatch, schedule: Mapping[int, str]) -> list[bool]:
    """The updates of these numbers meet the faults of these names; whether each left the state as it was, bit for bit."""
    unchanged: list[bool] = []
    count = itertools.count(1)
    update = WorldModelAlgorithm.update

    def spoiled(agent: WorldModelAlgorithm, improve: bool = True) -> dict[str, float]:
        name = schedule.get(next(count))
        if name is None:
            return update(agent, improve)
        with FAULTS[name][0](agent):
            before = state_of(agent, is_of_world(name))
            try:
                return update(agent, improve)
            finally:
                after = state_of(agent, is_of_world(name))
                unchanged.append(all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True)))

    monkeypatch.setattr(WorldModelAlgorithm, "update", spoiled)
    return unchanged


def lasting(name: str) -> dict[int, str]:
    """From update AT on."""
    return dict.fromkeys(range(AT, AT + 9), name)


def ill_checkpoints(folder: Path) -> int:
    """Checkpoints that hold a number that is not finite."""
    run = Run.open(folder)
    stored = [[x for arrays in run.read(step)[0].values() for x in arrays.values()] for step in run.checkpoints]
    return sum(not all(np.isfinite(x).all() for x in arrays) for arrays in stored)


# Runs that meet them ----------------------------------------------------------------------------------------------------


def test_a_fault_that_stays_is_caught_at_its_update_changes_nothing_and_ends_the_run_at_the_third(tmp_path, monkeypatch, figure):
    """Teeth: an actor that steps before the critic's gradient is looked at; a gradient whose norm is not."""
    for i, (name, (_, where)) in enumerate(FAULTS.items()):
        folder = tmp_path / str(i)
        with monkeypatch.context() as patch:
            unchanged = spoil_updates(patch, lasting(name))
            with pytest.raises(NumericsError) as error:
                small_train(folder, 60, options=OPTIONS)
                pytest.fail(name)
        number = f"Update {AT + 2}: " if is_of_world(name) else f"Update {AT + 1} of actor and critic: "
        assert re.match(number + "not finite: " + where, str(error.value)), (name, str(error.value))
        assert unchanged == [True] * 3, name
        assert error.value.exit_code == 5
        assert Run.open(folder).checkpoints == [0, 20] and ill_checkpoints(folder) == 0, name
        assert all_weights(Run.open(folder).agent()).isfinite().all()
    figure("N1", f"{len(FAULTS)} lasting faults: each skips 3 updates and ends in exit code 5, 0 of them in a checkpoint")


def test_faults_that_pass_cost_their_updates_and_no_more(tmp_path, monkeypatch, figure):
    """One run that meets all of them, with a good update, or none, between two."""
    schedule = {AT + 3 * (i // 2) + i % 2: name for i, name in enumerate(PASSING)}
    small_train(tmp_path / "whole", 100, options=OPTIONS)
    unchanged = spoil_updates(monkeypatch, schedule)
    small_train(tmp_path / "run", 100, options=OPTIONS)
    assert unchanged == [True] * len(PASSING)
    agent, whole = Run.open(tmp_path / "run").agent(), Run.open(tmp_path / "whole").agent()
    assert agent.learner.skipped == sum(map(is_of_world, PASSING)) == whole.learner.updates - agent.learner.updates
    assert agent.behaviour.updates == whole.behaviour.updates
    assert Run.open(tmp_path / "run").checkpoints == [0, 20, 40, 60, 80, 100] and ill_checkpoints(tmp_path / "run") == 0
    figure(
        "N1",
        f"{len(PASSING)} passing faults in one run, which goes on: {sum(unchanged)} updates skipped, 0 of them in a checkpoint",
    )


@pytest.mark.parametrize("name", list(LASTING)[::2])
def test_a_checkpoint_that_is_due_before_the_third_update_is_refused(tmp_path, monkeypatch, name):
    """Teeth: `checkpoint._array` that does not look."""
    folder = tmp_path / "run"
    spoil_updates(monkeypatch, lasting(name))
    with pytest.raises(NumericsError, match=r"weight holds a value that is not finite. The checkpoint is not written") as error:
        small_train(folder, 60, options={**OPTIONS, "checkpoint.every": 1})
    assert error.value.exit_code == 5
    assert len(Run.open(folder).checkpoints) > 20 and ill_checkpoints(folder) == 0


def test_what_was_learned_before_a_fault_is_gone_on_from(tmp_path, monkeypatch):
    name = "a weight of the world is NaN"
    with monkeypatch.context() as patch:
        spoil_updates(patch, lasting(name))
        with pytest.raises(NumericsError):
            small_train(tmp_path / "run", 60, options=OPTIONS)
    assert small_train(tmp_path / "run", 60, options=OPTIONS, resume=True).real_steps == 60
    assert ill_checkpoints(tmp_path / "run") == 0


# Numbers that are only large --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replayed", [0.0, 1.0])
def test_rewards_of_1e30_and_the_largest_there_are_teach_without_a_number_that_is_not_finite(
    tmp_path, monkeypatch, figure, replayed
):
    metrics: list[float] = []
    update = WorldModelAlgorithm.update
    monkeypatch.setattr(WorldModelAlgorithm, "update", lambda *args, **kwargs: metrics.extend(update(*args, **kwargs).values()))
    for i, pay in enumerate((1e30, 3e38)):
        options = {**OPTIONS, "env.kwargs": {"pay": pay}, "agent.replay_value": replayed}
        small_train(tmp_path / str(i), 40, "Loud-v0", options=options)
        assert ill_checkpoints(tmp_path / str(i)) == 0
    assert np.isfinite(metrics).all() and len(metrics) > 100
    figure("N1", f"rewards of 1e30 and 3e38 (agent.replay_value={replayed:g}): {len(metrics)} metrics, all finite")


def test_observations_too_large_to_be_squared_end_the_command_with_its_code(tmp_path, monkeypatch, capfd):
    options = {**OPTIONS, "env.kwargs": {"see": 1e25}, "model.vector_scaling": "raw"}
    command = ["train", "Loud-v0", *words(options), "--steps", "60", "--run", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["worldmodel", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 5
    assert re.search(r"not finite: .*loss/observation", capfd.readouterr().err)
    assert ill_checkpoints(tmp_path / "run") == 0
    small_train(tmp_path / "standardised", 40, "Loud-v0", options={**options, "model.vector_scaling": "standardise"})
    assert ill_checkpoints(tmp_path / "standardised") == 0


# Statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_statistics_take_in_no_number_that_would_never_leave_them(bad):
    """Teeth: an InputScaling that does not look."""
    space = gym.spaces.Dict({name: gym.spaces.Box(-9, 9, (2,), np.float32) for name in ("one", "other")})
    scaling = VectorScaling("standardise", ObsSpec.from_space(space))
    scaling.update({name: torch.rand(8, 2) for name in ("one", "other")})
    before = {name: x.clone() for name, x in scaling.state_dict().items()}
    with pytest.raises(NumericsError, match="Observation 'other' is not finite"):
        scaling.update({"one": torch.rand(8, 2), "other": torch.tensor([[0.0, bad]])})
    assert all(torch.equal(x, before[name]) for name, x in scaling.state_dict().items())


def test_statistics_of_the_largest_numbers_there_are_stay_finite():
    scaling = VectorScaling("standardise", ObsSpec.from_space(Loud.observation_space))
    for sign in (1, -1, 1):
        rows = {"obs": sign * torch.full((100, 2), 3e38)}
        scaling.update(rows)
        assert scaling(rows)["obs"].isfinite().all()
    assert all(x.isfinite().all() for x in scaling.state_dict().values())


def test_an_observation_that_slips_through_the_checks_ends_the_run(tmp_path, monkeypatch):
    rows = WorldModelAlgorithm._rows

    def spoiled(agent: WorldModelAlgorithm, obs: Any) -> dict[str, np.ndarray]:
        return {name: x + (np.float32("nan") if agent.num_timesteps >= 30 else 0) for name, x in rows(agent, obs).items()}

    monkeypatch.setattr(WorldModelAlgorithm, "_rows", spoiled)
    with pytest.raises(NumericsError, match="Observation 'obs' is not finite"):
        small_train(tmp_path / "run", 60, "Loud-v0", options=OPTIONS)
    assert ill_checkpoints(tmp_path / "run") == 0
