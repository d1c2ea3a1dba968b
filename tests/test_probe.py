"""A probe reads the environment's numbers off pictures: planted errors are found, in its units; and where numbers come from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, generator, small_world, unchecked
from test_holes import picture
from test_usage import PICTURE, circling, world_of

from worldmodel.agents import diagnosis
from worldmodel.agents.belief import BeliefPolicy
from worldmodel.agents.exploitation import Acting
from worldmodel.agents.held_out import collect
from worldmodel.agents.random import RandomController
from worldmodel.agents.states import states_of
from worldmodel.data import Episodes
from worldmodel.diagnostics import probe
from worldmodel.diagnostics.evidence import Evidence, Section
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.holes import SlotRows
from worldmodel.diagnostics.probe import Probe, States, probed
from worldmodel.diagnostics.rollouts import Rollout
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.envs.tiny import Catch, TwoRooms

METRES = 3.0
"""The planted state's unit: circles of that radius."""


def raw(place: torch.Tensor) -> torch.Tensor:
    return (255 * picture(place)).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def going_round() -> tuple[Evidence, States]:
    """Pictures of a square on a noisy circle; its two coordinates in metres, and a number that no picture shows."""
    world = world_of("pictures")[0]
    world.decoder.mean = lambda feature: {"obs": picture(feature[:, -2:])}
    place = 0.9 * circling(count=12, length=30).rows.obs["obs"][0]
    episodes = Episodes(circling(PICTURE, 12, 30).rows.with_obs({"obs": raw(place).unsqueeze(0)}))
    hidden = torch.randn(len(place), 1, generator=generator())
    seen = filter_episodes(world, episodes)
    states = States(torch.cat([METRES * place, hidden], 1).double(), ("east [m]", "north [m]", "hidden"))
    return Evidence(world, "runs/some", seen, seen, seen, episodes), states


def found(given: tuple[Evidence, States], monkeypatch, noise: float = 0.0, drawn: float = 1.0, jumps: bool = False) -> Section:
    """Of dreams whose square is `noise` from where it is, each in a direction of its own or all in one, and of draws so wide."""
    evidence, states = given
    place = states.numbers[:, :2].float() / METRES
    columns = Episodes(evidence.episodes.rows.with_obs({"place": place.unsqueeze(0)}))

    def rolled(world, episodes, starts, context, horizon, samples, rng):
        window, inside = episodes.windows(*starts, context + horizon)
        true = columns.windows(*starts, context + horizon)[0].obs["place"]
        shift = torch.randn(len(true), 1, horizon if jumps else 1, 2, generator=generator(1))
        made = true[:, context:].unsqueeze(1) + noise * torch.nn.functional.normalize(shift, dim=-1)
        made, before = made.expand(-1, samples, -1, -1), true[:, :context]
        obs = [picture(x.reshape(-1, 2)).unflatten(0, x.shape[:-1]) for x in (true, before, made)]
        zeros = torch.zeros(made.shape[:3])
        yield Rollout(window, inside, *({"obs": x} for x in obs), zeros, zeros, zeros)

    feature = torch.cat([torch.zeros(len(place), 12), place], 1)
    rows = SlotRows(feature, torch.cat([feature[:, :-2], drawn * place], 1), feature[:, :12], torch.arange(len(place)) // 30)
    monkeypatch.setattr(probe, "rolled", rolled)
    monkeypatch.setattr(probe, "slot_features", lambda *_: rows)
    return probed(evidence, "transition", states)


def test_a_true_model_errs_by_what_the_probe_does_and_what_pictures_do_not_tell_is_left_out(going_round, monkeypatch):
    right = found(going_round, monkeypatch).figures
    assert right["state shown by pictures"].value > 0.97 and right["state numbers shown"].value == 2
    floor = right["state error of real pictures"].value
    assert floor < 0.15
    for name in ("state error of decoded pictures", "state error at 1", "state error at 5", "state error at 15"):
        assert right[name].value < floor + 0.05, name
    assert abs(right["state teleports"].value) < 0.02 and right["transition invalid state"].value == 0
    assert "state 2 error at 15" not in right


def test_planted_errors_are_found_in_the_environments_own_units(going_round, monkeypatch):
    sections = [found(going_round, monkeypatch, noise) for noise in (0.0, 0.15, 0.4)]
    for name in ("state error at 1", "state error at 5", "state error at 15", "state 0 error at 15", "state 1 error at 15"):
        values = [section.figures[name].value for section in sections]
        assert values == sorted(values) and values[2] > 2 * values[0], name
    east = sections[1].figures["state 0 error at 15"]
    assert east.value == pytest.approx(0.15 * METRES / 2**0.5, rel=0.35) and east.unit == "east [m]"
    text = sections[1].sentences[0]
    assert f"pictures imagined 15 steps on are off by: {east.value:.3g} east [m], " in text and "`" not in text


def test_dreams_that_jump_and_are_lost_are_told_to_learn_for_longer(going_round, monkeypatch):
    wrong = found(going_round, monkeypatch, noise=1.0, jumps=True)
    assert wrong.figures["state teleports"].surely_above(0.2)
    assert wrong.figures["state error at 15"].low > probe.LOST and len(wrong.sentences) == 2
    assert all("learn for longer: `worldmodel train runs/some --resume --steps N`" in text for text in wrong.sentences)


def test_draws_that_show_a_state_that_cannot_be_are_counted(going_round, monkeypatch):
    right, wrong = (found(going_round, monkeypatch, drawn=size) for size in (1.0, 0.6))
    assert right.figures["transition invalid state"].value == 0 and len(right.sentences) == 1
    assert wrong.figures["transition invalid state"].surely_above(0.5)
    assert "`worldmodel fit-prior runs/some --slot transition --kind flow`" in wrong.sentences[-1]


def test_worse_pictures_have_a_larger_error_before_any_dream(going_round, monkeypatch):
    evidence, states = going_round
    rng = generator()
    noisy = evidence.episodes.rows.obs["obs"].float() + 200 * torch.rand(evidence.episodes.rows.obs["obs"].shape, generator=rng)
    spoilt = Episodes(evidence.episodes.rows.with_obs({"obs": noisy.clamp(0, 255).to(torch.uint8)}))
    clear = found(going_round, monkeypatch).figures
    dim = found((replace(evidence, episodes=spoilt), states), monkeypatch).figures
    for name in ("state error of real pictures", "state error of decoded pictures"):
        assert dim[name].value > 1.2 * clear[name].value, name
    assert dim["state shown by pictures"].value < clear["state shown by pictures"].value


def test_what_cannot_be_read_is_skipped_with_the_reason(going_round, monkeypatch):
    evidence, states = going_round
    assert "tell" in found((evidence, States(states.numbers[:, 2:].repeat(1, 2), ("a", "b"))), monkeypatch).skipped
    assert "because it does not" in probed(evidence, "transition", "because it does not").skipped
    few = replace(evidence, episodes=circling(PICTURE, 2, 10))
    assert "too few" in probed(few, "transition", States(states.numbers[:20], states.names)).skipped
    vectors = replace(evidence, world=world_of("gaussian")[0])
    assert probed(vectors, "transition", states) == Section()


def test_an_untrained_world_is_measured_too(going_round):
    evidence, states = going_round
    found = probed(replace(evidence, world=world_of("pictures")[0]), "transition", states)
    assert found.skipped is None and found.figures["state error at 15"].value > 0.5 and found.sentences


def test_the_probe_interpolates_and_gives_the_mean_for_what_it_has_never_seen():
    angle = torch.linspace(0, 6.2, 120)
    place = torch.stack([angle.cos(), angle.sin()], 1)
    fitted = Probe(picture(place[::2]).flatten(1), 5 + METRES * place[::2].double())
    read = fitted(picture(place[1::2]).flatten(1)) * fitted.deviation + fitted.mean
    assert (read - 5 - METRES * place[1::2]).square().mean().sqrt() < 0.1
    assert fitted(100 + torch.zeros(1, fitted.pictures.shape[1])).abs().max() < 1e-6


# Where numbers come from ------------------------------------------------------------------------------------------------


def played(env: EnvConfig, seed: int = 7, episodes: int = 3):
    """(a world of its pictures, random play in it)."""
    one = make_env(env)
    world = small_world(one.observation_space, one.action_space).eval()
    policy = BeliefPolicy(one.observation_space, one.action_space, world, RandomController(), 0)
    return world, collect(Acting(policy, world.obs, world.action, world.device), env, episodes, seed, steps=12, random=1.0)


def test_behind_rendered_pictures_is_what_the_environment_observes():
    env = EnvConfig(id=CHAIN, pixels=16)
    world, episodes = played(env)
    states = states_of(env, world, episodes, 7)
    assert states.names == tuple(f"obs[{i}]" for i in range(5))
    cell, first = states.numbers.argmax(1), episodes.rows.is_first[0]
    reward = torch.where(cell == 4, 1.0, (cell - 4) / 10)
    assert torch.allclose(reward[~first], episodes.rows.reward[0, ~first]) and (cell[first] == 0).all() and len(cell.unique()) > 2


def test_other_pictures_have_the_numbers_that_the_environment_gives_at_every_step():
    env = EnvConfig(id="worldmodel.envs:TwoRooms-v0")
    world, episodes = played(env)
    states = states_of(env, world, episodes, 7)
    assert states.names == ("position[0]", "position[1]", "goal[0]", "goal[1]")
    drawn, real = TwoRooms().picture(states.numbers[5, :2].numpy()), episodes.rows.obs["obs"][0, 5].numpy()
    assert abs(drawn.astype(int) - real).max() <= 1
    assert "did not repeat a held-out episode's pictures" in states_of(env, world, episodes, 8)


def test_a_diagnosis_asks_for_numbers_where_it_has_played_pictures_itself():
    env = EnvConfig(id=CHAIN, pixels=16)
    world, episodes = played(env)
    run, evidence = SimpleNamespace(config=SimpleNamespace(env=env)), Evidence(world, "runs/some", None, None, None, episodes)
    of = partial(diagnosis._states, run)
    with unchecked():  # of a run it is asked for the config alone
        assert len(of(evidence, diagnosis.HeldOut(episodes, episodes, seed=7)).numbers) == episodes.rows.shape[1]
        assert "recorded ones" in of(evidence, diagnosis.HeldOut(episodes, episodes))
        assert "no pictures" in of(replace(evidence, world=world_of("gaussian")[0]), diagnosis.HeldOut(episodes, episodes, seed=7))


def test_catch_tells_its_state_and_without_numbers_or_an_environment_there_is_a_reason(monkeypatch):
    catch = EnvConfig(id="worldmodel.envs:Catch-v0")
    world, episodes = played(catch)
    numbers = states_of(catch, world, episodes, 7).numbers
    assert numbers.shape == (episodes.rows.shape[1], 4) and set(numbers[:, 0].tolist()) == set(range(8))
    monkeypatch.delattr(Catch, "state")
    assert "gives no numbers" in states_of(catch, world, episodes, 7)
    assert "did not play" in states_of(EnvConfig(id="Nowhere-v0"), world, episodes, 7)
