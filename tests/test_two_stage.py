"""Another form of the prior, fitted to a finished run: a run like any other, and the old one untouched."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import generator
from small_runs import CHAIN, OPTIONS, small_train
from typer.testing import CliRunner

from worldmodel import ConfigError, Run, fit_prior
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.two_stage import _rows_for_slot, clustered_mean, posterior_samples
from worldmodel.cli import app
from worldmodel.commands.dream import dream
from worldmodel.commands.train import train

GAUSSIAN = {name: value for name, value in OPTIONS.items() if not name.startswith("model.dynamics.latent")}
GAUSSIAN |= {"model.dynamics.latent.kind": "gaussian", "model.dynamics.latent.size": 3, "train.ema_decay": 0.9}
GAUSSIAN |= {"train.lr": 1e-2, "train.ratio": 1.0}  # so that codes are far from normal after 80 steps


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "old"
    train(CHAIN, steps=80, run_dir=folder, overrides=GAUSSIAN, device="cpu")
    return Run.open(folder)


def content(run: Run) -> dict[str, str]:
    return {str(p.relative_to(run.path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in run.path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("kind", "slot"), [("gaussian", "initial"), ("gaussian", "marginal"), ("energy", "transition")])
def test_the_new_run_opens_dreams_evaluates_and_learns_on_and_the_old_one_is_untouched(run, kind, slot, tmp_path):
    before = content(run)
    result = fit_prior(run, kind, slot, steps=20, out=tmp_path / "new")
    assert content(run) == before
    new = Run.open(tmp_path / "new")
    assert getattr(new.config.model, slot).kind == kind and new.checkpoints == run.checkpoints[-1:]
    assert math.isfinite(result["gain"]) and result["standard_error"] > 0
    assert dream(new, context=2, horizon=3, episodes=2)["horizons"] == [1, 2, 3]
    assert len(evaluate(new.agent(), new.config.env, 1, 0)[0]) == 1
    assert len(new.replay()) == len(run.replay())
    assert train(None, steps=90, run_dir=new.path, resume=True, device="cpu").real_steps == 90


def test_all_that_is_not_the_new_prior_is_as_it_was_optimiser_included(run, tmp_path):
    fit_prior(run, "energy", "initial", options={"units": 8}, steps=5, out=tmp_path / "new")
    old, new = run.read()[0], Run.open(tmp_path / "new").read()[0]
    kept = [name for name in old["world"] if "initial_prior" not in name]
    assert all(np.array_equal(old["world"][name], new["world"][name]) for name in kept) and len(kept) > 20
    assert all(np.array_equal(old["agent"][name], new["agent"][name]) for name in old["agent"])
    agents = run.agent("newest"), Run.open(tmp_path / "new").agent()
    assert Run.open(tmp_path / "new").best is None  # the best one has the old prior
    for name, p in agents[0].world.named_parameters():
        if "initial_prior" not in name:
            q = dict(agents[1].world.named_parameters())[name]
            states = [a.learner.optimizer.state[x]["exp_avg"] for a, x in zip(agents, (p, q))]
            assert torch.equal(p, q) and torch.equal(*states)
    prior = agents[1].world.dynamics.initial_prior.state_dict()
    assert all(torch.equal(x, agents[1].policy.world.dynamics.initial_prior.state_dict()[name]) for name, x in prior.items())


def test_a_prior_that_fits_gains_nats_over_a_standard_normal(run, tmp_path):
    result = fit_prior(run, "gaussian", "marginal", steps=400, out=tmp_path / "new")
    assert result["before"] is None and result["density"] == "exact"
    assert result["gain"] == pytest.approx(result["nats"] - result["nats_before"], abs=1e-4)
    assert result["gain"] > 2 * result["standard_error"]
    world, latents = Run.open(tmp_path / "new").world_model(), posterior_samples(run.world_model(), run.replay(), generator()).z
    below = float((world.marginal.log_prob(latents, None) < world.marginal_low).float().mean())
    assert below == pytest.approx(0.05, abs=0.04)  # so that agent.typicality_penalty can be used in it at once


def test_codes_are_the_filters_draws_and_first_rows_come_many_times(run):
    world, replay = run.world_model(), run.replay()
    latents = posterior_samples(world, replay, generator())
    batch = replay.stream(0)
    firsts = int(batch.is_first.sum())
    assert int(latents.first.sum()) == 16 * firsts and int((~latents.first).sum()) == batch.is_first.numel() - firsts
    assert len(latents.episode.unique()) == firsts
    assert len(latents.z[latents.first].unique(dim=0)) == 16 * firsts


def test_only_the_prior_of_first_rows_is_shown_them_many_times(run):
    latents, rows = posterior_samples(run.world_model(), run.replay(), generator()), run.replay().stream(0)
    held, firsts = rows.is_first.numel(), int(rows.is_first.sum())
    counts = {
        slot: len(_rows_for_slot(latents, *slot).row)
        for slot in (("marginal", "start"), ("initial", "anywhere"), ("initial", "start"))
    }
    assert counts == {("marginal", "start"): held, ("initial", "anywhere"): held, ("initial", "start"): 16 * firsts}
    assert sorted(_rows_for_slot(latents, "marginal", "start").row.tolist()) == rows.row[0].tolist()
    assert len(_rows_for_slot(latents, "transition", "start").row) == held - firsts


@pytest.mark.parametrize("inputs", ["observation", "feature", "exemplar"])
def test_pseudo_inputs_begin_at_rows_of_the_replay(run, inputs, tmp_path):
    options = {"pseudo_inputs": inputs, "components": 4}
    result = fit_prior(run, "vamp", "marginal", options=options, steps=1, lr=1e-9, out=tmp_path / "new")
    world, rows = Run.open(tmp_path / "new").world_model(), run.replay().stream(0)
    assert math.isfinite(result["gain"])
    embeddings = world.encoder(world.preprocess(rows.obs | {"obs": rows.obs["obs"][0]}))
    assert torch.cdist(world.marginal.embeddings(), embeddings).amin(1).max() < 1e-3
    if inputs == "exemplar":
        at = torch.searchsorted(rows.row[0], world.marginal.row)
        torch.testing.assert_close(world.marginal.embeddings(), embeddings[at])


def test_more_pseudo_inputs_than_rows_are_refused_with_how_many_there_are(run, tmp_path):
    with pytest.raises(ConfigError, match=r"components=\d+, or train"):
        fit_prior(run, "vamp", options={"pseudo_inputs": "exemplar", "components": 500}, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("slot", ["initial", "transition"])
def test_a_run_with_a_slow_encoder_gets_another_prior_too(slot, tmp_path):
    options = {k: v for k, v in OPTIONS.items() if ".latent" not in k}
    options |= {"model": "jepa", "model.dynamics.latent.size": 3, "model.objective.ema_decay": 0.9}
    train(CHAIN, steps=60, run_dir=tmp_path / "old", overrides=options, device="cpu")
    fit_prior(tmp_path / "old", "mixture", slot, options={"components": 2}, steps=5, out=tmp_path / "new")
    assert getattr(Run.open(tmp_path / "new").config.model, slot).kind == "mixture"
    assert train(None, steps=70, run_dir=tmp_path / "new", resume=True, device="cpu").real_steps == 70


def test_the_error_of_a_gain_is_that_of_episodes_and_not_of_rows():
    rng = torch.Generator().manual_seed(0)
    each = torch.randn(200, generator=rng).double()
    mean, error = clustered_mean(each.repeat_interleave(50), torch.arange(200).repeat_interleave(50))
    assert mean == pytest.approx(float(each.mean())) and error == pytest.approx(float(each.std()) / 200**0.5, rel=1e-6)


def test_a_prior_of_other_latents_is_refused_before_anything_is_written(tmp_path):
    small_train(tmp_path / "old", steps=40)
    with pytest.raises(ConfigError, match=r"model\.initial.*gaussian latents.*categorical"):
        fit_prior(tmp_path / "old", "energy")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_what_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="holds a run already"):
        fit_prior(run, "gaussian", out=run.path)
    with pytest.raises(ConfigError, match="expected one of initial"):
        fit_prior(run, "gaussian", "decoder", out=tmp_path / "new")
    with pytest.raises(ConfigError, match="initial slot only"):
        fit_prior(run, "gaussian", "marginal", where="anywhere", out=tmp_path / "new")
    with pytest.raises(ConfigError, match="nits"):
        fit_prior(run, "energy", options=["nits=3"], out=tmp_path / "new")


def test_the_command_prints_one_object(run, tmp_path):
    words = [
        "fit-prior",
        str(run.path),
        "--kind",
        "energy",
        "--set",
        "units=8",
        "--steps",
        "5",
        "--out",
        str(tmp_path / "n"),
        "--json",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    result_json = json.loads(result.stdout)
    assert result_json["kind"] == "energy" and result_json["effective"] > 0
    assert Run.open(result_json["out"]).config.model.initial.units == 8
