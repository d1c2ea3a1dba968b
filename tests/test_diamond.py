"""DIAMOND: what a state holds, what each loss trains, and that it predicts the next picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TWO_ACTIONS, VECTOR, generator, known_batch, reached, small
from gymnasium import spaces
from torch import Tensor

from worldmodel.config import Config
from worldmodel.data import Batch, Sampling, State, Trace
from worldmodel.diamond import picture_to_latent
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import ModelConfig, WorldModel
from worldmodel.nn.diffusion import noisy_std

SIDE, PAST, B, T = 16, 3, 3, 6
PICTURE = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
MODE = Sampling(mode=True)
DIAMOND = {"dynamics": {"kind": "diamond"}}


def diamond(seed: int = 0, shaken: bool = True, rollouts: str = "latent", **options) -> WorldModel:
    """The model in eval mode, with weights so large that everything has an effect."""
    parts = {"encoder": small("encoder", "standard"), "heads": small("heads", "standard")}
    dynamics = small("dynamics", "diamond", **{"past": PAST, **options})
    world = WorldModel.from_spaces(PICTURE, TWO_ACTIONS, {**parts, "dynamics": dynamics, "rollouts": rollouts}, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for p in world.parameters() if shaken else ():
            p.data += 0.1 * torch.randn(p.shape)
    return world.eval()


def inputs(world: WorldModel, seed: int = 0) -> Batch:
    batch = known_batch(PICTURE, seed=seed)
    return batch.with_obs(world.preprocess(batch.obs))


def before(world: WorldModel, seed: int = 7) -> State:
    return traced(world, inputs(world, seed)).last


def traced(world: WorldModel, batch: Batch, state: State | None = None) -> Trace:
    with torch.no_grad():
        return world.trace(batch, state, MODE)


def after(world: WorldModel, trace: Trace, action: Tensor) -> dict[str, Tensor]:
    """The step that each row of a trace would dream, [B, T, ...]."""
    rows = trace.states.map(lambda x: x.flatten(0, 1))
    dreamt = world.dynamics.imagine(rows, action.flatten(0, 1), MODE)
    return {name: dreamt[name].detach().unflatten(0, action.shape[:2]) for name in ("h", "summary", "z")}


def test_a_feature_ends_in_the_observed_picture():
    world = diamond()
    batch = inputs(world)
    trace = traced(world, batch)
    size = SIDE * SIDE
    assert trace.z.shape == (B, T, size) and trace.feature.shape == (B, T, world.feature_dim) == (B, T, 12 + 16 + size)
    assert torch.equal(world.dynamics.z_of(trace.feature), trace.z) and torch.equal(trace.z, picture_to_latent(batch.obs["obs"]))
    assert not world.dynamics.losses(trace, batch, MODE) and trace.z.norm(dim=-1).max() <= 1
    assert {name: x.shape for name, x in trace.last.items()} == {name: x.shape for name, x in world.initial(B).items()}
    assert torch.equal(world.dynamics.feature(trace.last), trace.feature[:, -1])
    for rows in (trace.feature, trace.z):
        torch.testing.assert_close(world.decode(rows.flatten(0, 1))["obs"], batch.obs["obs"].flatten(0, 1))


def test_filter_equals_sequence():
    world = diamond()
    batch, start = inputs(world), before(world)
    whole, state, steps = traced(world, batch, start), start, []
    for t in range(T):
        trace = traced(world, batch.window(t, t + 1), state)
        state = trace.last
        steps.append(trace)
    together = {"feature": whole.feature, "h": whole.h, **whole.states}
    for name, x in together.items():
        apart = torch.cat([step.states[name] if name in step.states else step.feature for step in steps], 1)
        torch.testing.assert_close(apart, x, msg=lambda text, name=name: f"{name}: {text}")


def test_a_reset_drops_the_past():
    world = diamond()
    one, other = inputs(world, 0), inputs(world, 1)
    past = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)  # before the last reset
    mixed = one.with_obs({"obs": torch.where(past.view(B, T, 1, 1, 1), other.obs["obs"], one.obs["obs"])})
    found = []
    for seed, batch in ((7, one), (8, mixed)):
        trace = traced(world, batch, before(world, seed))
        found.append({"feature": trace.feature, **after(world, trace, one.action)})
    for name in found[0]:
        assert torch.equal(found[0][name][:2][~past[:2]], found[1][name][:2][~past[:2]]), name
    assert (found[0]["z"][2, 0] - found[1]["z"][2, 0]).abs().max() > 1e-3  # without a reset the state has an effect
    assert torch.equal(found[0]["z"][2, PAST - 1 :], found[1]["z"][2, PAST - 1 :])  # for L pictures
    assert (found[0]["h"][2] - found[1]["h"][2]).abs().amax(-1).min() > 1e-4  # and h for longer


def test_a_blank_picture_differs_from_an_observed_grey_one():
    """Blank pictures are grey too: only the flags differ."""
    world = diamond()
    grey = world.initial(1).map(torch.clone)
    aged = State({**grey, "age": torch.full((1,), float(PAST))})
    action = torch.zeros(1, 2)
    assert not torch.equal(world.dynamics.imagine(grey, action, MODE)["z"], world.dynamics.imagine(aged, action, MODE)["z"])


def test_the_u_net_is_given_each_of_the_last_pictures_and_actions():
    world = diamond()
    state, action = before(world), torch.eye(2)[[0, 1, 0]]
    dreamt = world.dynamics.imagine(state, action, MODE)["z"]
    for name in ("pictures", "actions"):
        for i in range(PAST - 1):
            other = state[name].clone()
            other[2, i] = other[2, i].flip(-1) + (name == "actions")
            moved = world.dynamics.imagine(State({**state, name: other}), action, MODE)["z"]
            assert torch.equal(moved[:2], dreamt[:2]) and not torch.equal(moved[2], dreamt[2]), (name, i)
    assert not torch.equal(world.dynamics.imagine(state, action.flip(-1), MODE)["z"], dreamt)


def test_dreams_take_the_same_steps_as_the_filter():
    """Where the observed picture is the imagined one, nothing differs."""
    world = diamond()
    state, action = before(world), torch.eye(2)[[0, 1, 0]]
    dreamt = world.dynamics.imagine(state, action, MODE)
    observed = world.dynamics.observe(
        state,
        torch.cat([dreamt["summary"], dreamt["z"]], -1).unsqueeze(1),
        action.unsqueeze(1),
        torch.zeros(B, 1, dtype=torch.bool),
        MODE,
    )[0]
    for name in state:
        torch.testing.assert_close(observed[name], dreamt[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rollouts", ["latent", "observation"])
def test_a_dream_ends_each_feature_in_the_picture_that_it_decodes_to(rollouts):
    """To encode what was drawn changes nothing: it is the picture itself."""
    world = diamond(rollouts=rollouts)
    dream = world.imagine(before(world), lambda feature, step: torch.eye(2)[[0, 1, 0]], 3, Sampling(generator=generator()))
    again = diamond().imagine(before(world), lambda feature, step: torch.eye(2)[[0, 1, 0]], 3, Sampling(generator=generator()))
    assert dream.feature.shape == (B, 4, world.feature_dim) and dream.reward.shape == (B, 3)
    torch.testing.assert_close(dream.feature, again.feature)
    assert world.decode(dream.feature[:, 1])["obs"].shape == (B, 1, SIDE, SIDE)
    picture = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), np.uint8)
    assert torch.equal(world.encode(picture).mean, picture_to_latent(torch.from_numpy(picture).permute(0, 3, 1, 2) / 255))


def test_drawn_pictures_have_the_levels_of_a_byte_and_come_from_the_generator():
    world = diamond()
    state, action = before(world), torch.zeros(B, 2)
    draws = [world.dynamics.imagine(state, action, Sampling(generator=generator(seed)))["z"] for seed in (0, 0, 1)]
    picture = world.decode(draws[0])["obs"] * 255
    torch.testing.assert_close(picture, picture.round(), rtol=0, atol=1e-3)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not draws[0].requires_grad
    once = world.dynamics.imagine(state, action, Sampling(generator=generator(0), steps=1))["z"]
    assert not torch.equal(once, draws[0])


def test_pictures_train_the_u_net_and_rewards_the_gru():
    world = diamond().train()
    batch = inputs(world)
    trace = world.trace(batch, None, Sampling(generator=generator()))
    terms = world.loss(trace, batch, Sampling(generator=generator()))
    assert not trace.z.requires_grad and not trace.states["pictures"].requires_grad
    assert set(terms) == {"prior/transition/denoise", "reward", "continue"}
    parts = {name: p for name, p in world.named_parameters() if not name.startswith("heads")}
    unet = {name for name in parts if name.startswith("dynamics.unet")}
    assert reached(terms["prior/transition/denoise"].mean(), **parts) == unet
    assert reached(terms["reward"].mean(), **parts) == set(parts) - unet


@pytest.mark.parametrize("frames", [1, 5, 64])
def test_the_loss_of_some_pictures_stands_for_all_rows_but_an_episodes_first(frames):
    world = diamond(frames=frames)
    batch = inputs(world)
    trace = world.trace(batch, None, Sampling(generator=generator()))
    term = world.dynamics.predict(trace, batch, trace.z, Sampling(generator=generator()))["denoise"]
    later = int((~batch.is_first).sum())
    assert (term.value > 0).sum() == min(frames, later) and not term.value[batch.is_first].any()
    assert term.unit == "score" and torch.equal(term.mask, ~batch.is_first)


def test_training_adds_noise_that_is_the_same_for_a_whole_channel():
    world, shown = diamond(frames=64, log_sigma_mean=-4.6, log_sigma_std=1e-3), []
    world.dynamics.unet.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    batch = inputs(world)
    trace = traced(world, batch)
    world.dynamics.predict(trace, batch, torch.zeros_like(trace.z), Sampling())  # grey pictures: the input is noise alone
    noise = shown[0] * float(noisy_std(torch.tensor(0.3)))
    assert abs(float(noise.mean((1, 2, 3)).std()) - 0.3) < 0.15
    assert 0.008 < float(noise.std((1, 2, 3)).mean()) < 0.012


def test_the_u_net_is_trained_on_the_inputs_that_it_has_in_dreams():
    """Pictures and actions beside a row in training are those of a dream from the row before."""
    world, inputs_of = diamond(frames=64), []
    world.dynamics.unet.register_forward_pre_hook(lambda module, args: inputs_of.append(args[2:]))
    batch = inputs(world)
    trace = traced(world, batch, before(world))
    inputs_of.clear()
    world.dynamics.predict(trace, batch, trace.z, Sampling())
    rows = trace.states.map(lambda x: x[:, :-1].flatten(0, 1))
    world.dynamics.imagine(rows, batch.prev_action[:, 1:].flatten(0, 1), Sampling(mode=True, steps=1))
    trained, dreamt = [torch.cat([x.flatten(1) for x in pair], 1) for pair in inputs_of]
    within = ~batch.is_first[:, 1:].flatten()
    missing = torch.cdist(dreamt[within], trained).amin(1)
    assert len(missing) > 5 and missing.max() < 1e-3


def test_the_states_of_a_trace_are_views():
    world = diamond(past=4)
    trace = traced(world, inputs(world))
    kept = trace.states["pictures"]
    assert kept.shape == (B, T, 3, SIDE * SIDE)
    assert kept.untyped_storage().nbytes() == B * (3 + T) * SIDE * SIDE * 4


def dots(rows: int, length: int, seed: int) -> Batch:
    """A dot of 4x4 pixels that goes 4 pixels a step to the right or left, as the action says, around a picture's rim."""
    g = generator(seed)
    batch = known_batch(PICTURE, rows=rows, seed=seed)
    action = torch.randint(2, (rows, length), generator=g)
    moved = torch.where(torch.arange(length) > 0, 2 * action - 1, 0).cumsum(1)
    column = (torch.randint(4, (rows, 1), generator=g) + moved) % 4
    line = torch.randint(4, (rows, 1), generator=g).expand(rows, length)
    cells = torch.zeros(rows, length, 4, 4)
    cells[torch.arange(rows).unsqueeze(1), torch.arange(length), line, column] = 1.0
    picture = cells.repeat_interleave(4, -1).repeat_interleave(4, -2).unsqueeze(-1) * 255
    none = torch.zeros(rows, length, dtype=torch.bool)
    previous = torch.nn.functional.one_hot(action, 2).float()
    return Batch({"obs": picture.byte()}, previous, previous, torch.zeros(rows, length), none, none, none, batch.row)


def test_a_moving_dot_is_predicted_better_than_by_persistence():
    world = diamond(shaken=False, depth=8, frames=64)
    learner = Learner(world, TrainConfig(lr=3e-3))
    for seed in range(100):
        learner.update(learner.prepare(dots(16, 6, seed)), generator(seed))
    world.eval()
    held_out = dots(32, 6, 1000)
    held_out = held_out.with_obs(world.preprocess(held_out.obs))
    trace, truth = traced(world, held_out.window(0, 5)), held_out.obs["obs"][:, 5]
    with torch.no_grad():
        dreamt = world.dynamics.imagine(trace.last, held_out.prev_action[:, 5], Sampling(generator=generator()))
    error = (world.decode(dreamt["z"])["obs"] - truth).square().mean()
    persistence = (held_out.obs["obs"][:, 4] - truth).square().mean()
    assert error < 0.5 * persistence


def test_what_it_cannot_predict_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"one picture.*'obs' \(vector\)"):
        WorldModel.from_spaces(VECTOR, TWO_ACTIONS, DIAMOND)
    with pytest.raises(ConfigError, match="one picture"):
        WorldModel.from_spaces(spaces.Dict(a=PICTURE, b=PICTURE), TWO_ACTIONS, DIAMOND)
    with pytest.raises(ConfigError, match="latent"):
        ModelConfig.parse({"dynamics": {"kind": "diamond", "latent": {"kind": "gaussian"}}})
    with pytest.raises(ConfigError, match="no initial distribution"):
        diamond().sample_initial(2)


@pytest.mark.parametrize(
    ("part", "kind"),
    [(slot, "gaussian") for slot in ("transition", "initial", "marginal")] + [("objective", "hybrid")],
)
def test_parts_that_it_has_no_place_for_are_refused(part, kind):
    with pytest.raises(ConfigError, match=f"model.{part}.kind={kind}.*model.dynamics.kind=diamond"):
        ModelConfig.parse({**DIAMOND, part: {"kind": kind}})


@pytest.mark.parametrize("part", ["encoder", "dynamics", "objective"])
def test_the_kinds_of_release_0_1_are_refused_by_the_new_name_and_read_in_what_it_saved(part):
    with pytest.raises(ConfigError, match=f"'model.{part}.kind'.*model.dynamics.kind=diamond now"):
        Config.parse({"env": {"id": "A-v0"}, "model": {**DIAMOND, part: {"kind": "pixels"}}})
    saved = "env: {id: A-v0}\nmodel: {encoder: {kind: pixels, depth: 3}, dynamics: {kind: pixels, least: 0.1}, objective: pixels}"
    config = Config.from_saved(saved)
    assert (config.model.encoder.depth, config.model.dynamics.kind, config.model.dynamics.sigma_min) == (3, "diamond", 0.1)
    given = {"model.objective.kind": "pixels", "model.encoder": "pixels", "model.dynamics": {"kind": "pixels"}}
    todays = {"model.objective.kind": "reconstruction", "model.encoder": "standard", "model.dynamics": {"kind": "diamond"}}
    assert config.in_new_names(given) == todays


@pytest.mark.parametrize("option", ["units", "layers", "depth"])
def test_the_encoders_options_are_those_of_the_summary(option):
    plain = dict(diamond().encoder.named_parameters())
    config = {"kind": "standard", "units": 16, "layers": 1, "depth": 4}
    config = {**DIAMOND, "encoder": {**config, option: config[option] + 1}}
    other = dict(WorldModel.from_spaces(PICTURE, TWO_ACTIONS, config).encoder.named_parameters())
    assert {name: x.shape for name, x in plain.items()} != {name: x.shape for name, x in other.items()}
