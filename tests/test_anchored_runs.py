"""Anchored models in runs, agents and environments: saved, resumed, searched in, fitted with other priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CHAIN, SMALL_BEHAVIOUR, SMALL_WORLD, all_weights
from small_runs import OPTIONS, Nervous
from test_train import FENCE, assert_equal_runs

from worldmodel import Run, fit_prior
from worldmodel.agents import Dreamer, Planner
from worldmodel.agents.evaluation import evaluate
from worldmodel.commands.dream import dream
from worldmodel.commands.train import train
from worldmodel.envs import ImaginedVecEnv
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError
from worldmodel.model import ModelConfig

ANCHORED = {
    **{"model": "anchored", "model.dynamics.deter": 8, "model.dynamics.units": 8},
    **{f"model.transition.{name}": 8 for name in ("units", "spread_units")},
    "model.transition.kind": "ensemble",
    "model.transition.members": 3,
}


def options(of: dict, **others) -> dict:
    """Options of small models, with anchored dynamics in the place of theirs; another transition has other options."""
    own = {name: x for name, x in ANCHORED.items() if "model.transition" not in others or "transition" not in name}
    return {**{name: x for name, x in of.items() if not name.startswith("model.dynamics")}, **own, **others}


def run_of(folder, steps: int, env: str = CHAIN, resume: bool = False, **others):
    """A run on the CPU."""
    train(env, steps=steps, run_dir=folder, overrides=options(OPTIONS, **others), resume=resume, device="cpu")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run.open(run_of(tmp_path_factory.mktemp("runs") / "old", 80))


def made(kind: type, **others):
    """An agent of either kind that learns in a second."""
    return kind("MlpPolicy", CHAIN, config=options({**SMALL_WORLD, **SMALL_BEHAVIOUR}, **others), seed=0, device="cpu")


# Saved and resumed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [30, 50])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(stop, tmp_path):
    Nervous.steps = 0
    run_of(tmp_path / "unbroken", 70, "Nervous-v0", **FENCE)
    Nervous.steps = 0
    for steps in (stop, 70):
        run_of(tmp_path / "run", steps, "Nervous-v0", resume=steps == 70, **FENCE)
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "run")
    form = Run.open(tmp_path / "run").world_model().dynamics.transition.form
    assert float(form.calibration.count) > 0, "what is calibrated is a part of what was compared"


def test_a_saved_agent_predicts_and_learns_on_as_the_one_that_was_saved(tmp_path):
    agent = made(Dreamer)
    agent.learn(40)
    agent.save(tmp_path / "agent")
    loaded, *twins = [Dreamer.load(tmp_path / "agent", env=Chain()) for _ in range(3)]
    assert torch.equal(all_weights(loaded), all_weights(agent))
    obs = agent.env.reset()
    ours, theirs = (model.predict(np.repeat(obs, 9, 0), deterministic=False) for model in (agent, loaded))
    assert np.array_equal(ours[0], theirs[0]) and all(np.array_equal(a, b) for a, b in zip(ours[1], theirs[1]))
    for twin in twins:
        twin.learn(20, reset_num_timesteps=False)
    assert torch.equal(*map(all_weights, twins)) and not torch.equal(all_weights(twins[0]), all_weights(agent))


# Acting and imagining ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["uncertainty_penalty", "bonus"])
def test_a_search_reads_the_disagreement_of_the_members(option, tmp_path):
    plan = {"samples": 16, "iterations": 2, "horizon": 3, "elites": 4, "proposals": 2}
    plan = {f"agent.plan.{name}": x for name, x in plan.items()}
    agent = made(Planner, **plan, **{f"agent.plan.{option}": 2.0})
    agent.learn(30)
    agent.save(tmp_path / "planner")
    loaded, obs = Planner.load(tmp_path / "planner"), agent.env.reset()
    for model in (agent, loaded):
        model.policy.generator.manual_seed(7)
    one, other = (model.predict(obs, None, np.ones(1, bool), deterministic=True)[0] for model in (agent, loaded))
    assert np.array_equal(one, other)
    with pytest.raises(ConfigError, match="needs uncertainty"):
        made(Planner, **plan, **{f"agent.plan.{option}": 2.0, "model.transition": {"kind": "gaussian"}}).learn(30)


def test_a_dream_ends_where_the_members_disagree_too_much_and_pays_for_it(run):
    def play(**kwargs):
        env = ImaginedVecEnv(run, 16, horizon=6, seed=0, **kwargs)
        env.reset()
        _, reward, done, infos = env.step(np.zeros(16, np.int64))
        return reward, done, infos

    reward, done, _ = play()
    _, cut, infos = play(max_uncertainty=1e-9)
    _, loose, _ = play(max_uncertainty=1e9)
    assert cut.all() and all("terminal_observation" in info for info in infos) and np.array_equal(loose, done)
    less, _, _ = play(uncertainty_penalty=0.5)
    assert (less < reward).all()


def test_open_loop_dreams_and_evaluations_of_a_run_are_finite(run):
    found = dream(run, context=2, horizon=3, episodes=2)
    assert found["horizons"] == [1, 2, 3] and math.isfinite(evaluate(run.agent(), run.config.env, 1, 0)[0][0])
    what_if = run.what_if(np.eye(5, dtype=np.float32)[[0, 1]], [1], np.ones((3,), np.int64), samples=4)
    assert what_if.uncertainty.shape == (3,) and (what_if.uncertainty > 0).all()


# Other priors -----------------------------------------------------------------------------------------------------------

SMALL = {"mixture": {"components": 2}, "flow": {"transforms": 1}, "diffusion": {"steps": 2}, "energy": {"units": 8}, "ensemble": {}}


@pytest.mark.parametrize("slot", ["initial", "transition", "marginal"])
@pytest.mark.parametrize("kind", SMALL)
def test_every_form_is_fitted_to_observations_and_their_changes(run, kind, slot, tmp_path):
    result = fit_prior(run, kind, slot, options=SMALL[kind], steps=10, out=tmp_path / "new")
    assert result["before"] == {"initial": "gaussian", "transition": "ensemble", "marginal": None}[slot]
    assert math.isfinite(result["nats"]) and math.isfinite(result["gain"]) and result["held_out_codes"] > 0
    new = Run.open(tmp_path / "new")
    assert getattr(new.config.model, slot).kind == kind
    world = new.world_model()
    assert world.has_uncertainty == (slot != "transition" or kind == "ensemble")
    before = {name: x for name, x in run.world_model().state_dict().items() if name.startswith(("dynamics.memory", "encoder"))}
    assert all(torch.equal(x, world.state_dict()[name]) for name, x in before.items())
    found = dream(new, context=2, horizon=3, episodes=2)
    assert all(math.isfinite(x) for x in found["observation"])
    if kind in ("mixture", "energy"):
        assert train(None, steps=90, run_dir=new.path, resume=True, device="cpu").real_steps == 90


def test_a_prior_of_posteriors_is_refused_where_latents_are_observations():
    with pytest.raises(ConfigError, match="vamp"):
        ModelConfig.parse({"dynamics": {"kind": "anchored"}, "marginal": {"kind": "vamp"}})
