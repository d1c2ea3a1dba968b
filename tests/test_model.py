"""The world model: what happens on arrival belongs to the arrival, proved on a chain whose answers are known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TWO_ACTIONS, VECTOR, generator, known_batch, small, small_world, unchecked
from gymnasium import spaces

from worldmodel import registry
from worldmodel.config import Config
from worldmodel.data import Batch, Dream, Sampling
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError, UnsupportedSpaceError
from worldmodel.learner import Learner, ScaleConfig, TrainConfig
from worldmodel.model import ModelConfig, WorldModel
from worldmodel.storage.replay import Replay

MODE = Sampling(mode=True)
LEFT, RIGHT = 0, 1
REWARD = [-0.4, -0.3, -0.2, -0.1, 1.0]
"""Of the cell arrived in; arriving in the last one ends the world (see Chain's docstring)."""


def arrival(cell: int, action: int) -> int:
    return max(cell - 1, 0) if action == LEFT else cell + 1


def one_hot(action: int) -> np.ndarray:
    return np.eye(2, dtype=np.float32)[action]


def chain_replay(steps: int = 1500, limit: int = 7) -> Replay:
    """Episodes of a fixed policy, two thirds to the right; the short limit truncates episodes in every cell."""
    env, rng = Chain(limit=limit), np.random.default_rng(0)
    replay = Replay(4 * steps, {"obs": ((5,), np.float32)}, 2, 1)

    def add(obs, action, reward, first, last, terminal):
        flags = (np.array([flag]) for flag in (first, last, terminal))
        replay.add({"obs": obs[None]}, action[None], np.array([reward], np.float32), *flags)

    ended = True
    for _ in range(steps):
        if ended:
            add(env.reset(seed=0)[0], np.zeros(2, np.float32), 0.0, True, False, False)
        action = int(rng.random() < 0.67)
        obs, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        add(obs, one_hot(action), reward, False, ended, terminated)
    return replay


@pytest.fixture(scope="module", params=["categorical", "gaussian"])
def trained(request) -> tuple[WorldModel, Replay]:
    """A small world model after a few hundred updates on the chain."""
    replay, rng, g = chain_replay(), np.random.default_rng(0), generator()
    latent = small("latent", request.param, **{"gaussian": {"size": 4}, "categorical": {"variables": 3}}[request.param])
    world = small_world(Chain().observation_space, latent=request.param, dynamics={"latent": latent, "deter": 24})
    world.scaling.update(world.obs.canonical({"obs": replay.sample(64, 10, rng).obs["obs"].flatten(0, 1)}))
    scales = dict.fromkeys(ScaleConfig.model_fields, 1.0)
    learner = Learner(world, TrainConfig(lr=8e-3, eps=1e-8, clip=100.0, burn_in=0, warmup=0, scales=scales))
    with unchecked():
        for _ in range(300):
            learner.update(learner.prepare(replay.sample(8, 10, rng, terminal_fraction=0.25)), g)
    return world.eval(), replay


def walked_to(world: WorldModel, cell: int):
    """The state after walking right from the start to a cell."""
    state = world.initial(1)
    for at in range(cell + 1):
        obs = torch.eye(5)[at : at + 1]
        action = torch.from_numpy(one_hot(RIGHT))[None]
        state = world.observe(state, {"obs": obs}, action, torch.tensor([at == 0]), MODE)
    return state


@torch.no_grad()
def imagined(world: WorldModel, state, *actions: int) -> Dream:
    return world.imagine(state, lambda feature, step: torch.from_numpy(one_hot(actions[step]))[None], len(actions), MODE)


@pytest.mark.parametrize("action", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("cell", range(4))
def test_one_step_ahead_reward_end_and_observation_are_those_of_the_arrival(trained, cell, action):
    world, _ = trained
    there = arrival(cell, action)
    dream = imagined(world, walked_to(world, cell), action)
    assert float(dream.reward[0, 0]) == pytest.approx(REWARD[there], abs=0.05)
    assert float(dream.cont[0, 0]) == pytest.approx(float(there != 4), abs=0.05)
    assert int(world.decode(dream.feature[:, 1])["obs"].argmax()) == there
    assert int(world.decode(dream.feature[:, 0])["obs"].argmax()) == cell


def test_imagination_with_logged_actions_reproduces_what_was_seen(trained):
    world, _ = trained
    actions = [RIGHT, RIGHT, LEFT, RIGHT, RIGHT, RIGHT]
    cells = [0]
    for action in actions:
        cells.append(arrival(cells[-1], action))
    dream = imagined(world, walked_to(world, 0), *actions)
    assert world.decode(dream.feature[0])["obs"].argmax(-1).tolist() == cells
    np.testing.assert_allclose(dream.reward[0], [REWARD[cell] for cell in cells[1:]], atol=0.05)
    np.testing.assert_allclose(dream.cont[0], [1, 1, 1, 1, 1, 0], atol=0.05)


def test_a_truncated_row_goes_on_and_a_terminal_one_does_not(trained):
    world, replay = trained
    batch = replay.sample(64, 10, np.random.default_rng(1), terminal_fraction=1.0)
    with torch.no_grad():
        trace = world.trace(batch.with_obs(world.preprocess(batch.obs)), None, MODE)
        cont = world.heads.cont(trace.feature)
    seen = torch.arange(10) >= 1  # a window may open in the middle of an episode
    truncated, terminal = batch.is_last & ~batch.is_terminal & seen, batch.is_terminal & seen
    assert min(truncated.sum(), terminal.sum()) > 10
    assert float(cont[truncated].mean()) > 0.95 and float(cont[terminal].mean()) < 0.05


def test_a_posterior_from_one_observation_is_that_of_an_episodes_first_step(trained):
    world, _ = trained
    obs = np.eye(5, dtype=np.float32)
    posterior = world.encode(obs)
    first = torch.ones(5, dtype=torch.bool)
    state = world.observe(world.initial(5), {"obs": torch.from_numpy(obs)}, torch.zeros(5, 2), first, MODE)
    torch.testing.assert_close(posterior.mode, state["z"])


def test_a_posterior_from_one_observation_draws_nothing_from_the_transition(trained, monkeypatch):
    world, _ = trained
    monkeypatch.setattr(type(world.dynamics.transition), "sample", None)
    assert world.encode(np.eye(5, dtype=np.float32)).mode.shape[0] == 5


# Targets and masks -----------------------------------------------------------------------------------------------------


def traced(world: WorldModel, batch: Batch):
    prepared = batch.with_obs(world.preprocess(batch.obs))
    return world.trace(prepared, None, Sampling(generator=generator())), prepared


def test_the_targets_of_reward_and_continue_are_those_of_their_own_row_and_first_rows_do_not_count():
    world = small_world()
    trace, batch = traced(world, known_batch())
    terms = world.loss(trace, batch)
    counted = ~batch.is_first
    torch.testing.assert_close(terms["reward"].value, world.heads.reward_loss(trace.feature, batch.reward))
    alive = 1 - batch.is_terminal.float()
    torch.testing.assert_close(terms["continue"].value, world.heads.cont_loss(trace.feature, alive))
    assert alive[1, 3] == 1 and batch.is_last[1, 3]  # truncation goes on
    for name in ("reward", "continue"):
        assert torch.equal(terms[name].mask, counted)
        torch.testing.assert_close(terms[name].mean(), terms[name].value[counted].sum() / counted.numel())
    assert all(term.mask is None for name, term in terms.items() if name not in ("reward", "continue"))


def test_every_loss_but_the_heads_is_in_nats_and_their_sum_bounds_the_evidence():
    world = small_world()
    trace, batch = traced(world, known_batch())
    terms = world.loss(trace, batch)
    assert set(terms) == {"dyn", "rep", "observation", "reward", "continue"}
    assert all(term.unit == "nats" and term.value.shape == batch.shape for term in terms.values())
    assert torch.equal(terms["dyn"].value, terms["rep"].value)
    one = {name: x[1, 2].unsqueeze(0) for name, x in batch.obs.items()}
    alone = world.eval().decoder.loss(trace.feature[1, 2].unsqueeze(0), one)["observation"].value[0]
    torch.testing.assert_close(world.loss(trace, batch)["observation"].value[1, 2], alone)


def test_a_marginal_adds_its_rate_and_trains_the_encoder():
    world = small_world(latent="gaussian", marginal=small("distribution", "gaussian", standard=True))
    trace, batch = traced(world, known_batch())
    term = world.loss(trace, batch)["marginal"]
    posterior = trace.posterior
    torch.testing.assert_close(term.value, 0.5 * (posterior.std**2 + posterior.mean**2 - 1 - 2 * posterior.std.log()).sum(-1))
    term.mean().backward()
    assert all(p.grad is not None for p in world.encoder.parameters())


# Verbs -----------------------------------------------------------------------------------------------------------------


def test_a_dream_says_what_was_done_and_where_it_led():
    world = small_world().eval()
    state = world.initial(3).map(lambda x: torch.randn(x.shape, generator=generator()))
    calls = []

    def policy(feature, step):
        calls.append((feature, step))
        return torch.eye(2)[[step % 2] * 3]

    dream = world.imagine(state, policy, 4, Sampling(generator=generator()))
    assert [step for _, step in calls] == [0, 1, 2, 3]
    assert all(torch.equal(feature, dream.feature[:, step]) for feature, step in calls)
    assert torch.equal(dream.feature[:, 0], world.dynamics.feature(state))
    assert torch.equal(dream.feature[:, -1], world.dynamics.feature(dream.last))
    assert dream.action[:, :, 1].tolist() == [[0, 1, 0, 1]] * 3
    torch.testing.assert_close(dream.reward, world.heads.reward(dream.feature[:, 1:]))
    torch.testing.assert_close(dream.cont, world.heads.cont(dream.feature[:, 1:]))
    assert torch.equal(dream.uncertainty, torch.zeros(3, 4))


def test_actions_beyond_the_range_are_kept_in_the_dream_and_clamped_for_the_dynamics():
    world = small_world(action=spaces.Box(-2, 2, (1,), np.float32)).eval()
    state = world.initial(1).map(lambda x: torch.randn(x.shape, generator=generator()))
    far, edge = (world.imagine(state, lambda f, t, a=a: torch.full((1, 1), a), 2, MODE) for a in (5.0, 1.0))
    assert far.action.flatten().tolist() == [5.0, 5.0]
    assert torch.equal(far.feature, edge.feature)


def test_observing_an_episodes_first_step_ignores_the_state_and_the_action_before():
    world, obs = small_world().eval(), {"obs": torch.rand(2, 4, generator=generator())}
    first = torch.tensor([True, False])
    old = world.initial(2).map(lambda x: torch.randn(x.shape, generator=generator(1)))
    one = world.observe(world.initial(2), obs, torch.zeros(2, 2), first, MODE)
    other = world.observe(old, obs, torch.ones(2, 2), first, MODE)
    assert torch.equal(one["h"][0], other["h"][0]) and not torch.allclose(one["h"][1], other["h"][1])
    assert not any(x.requires_grad for x in other.values())


def test_observing_step_by_step_is_the_trace():
    world, batch = small_world().eval(), known_batch()
    with torch.no_grad():
        trace = world.trace(batch.with_obs(world.preprocess(batch.obs)), None, MODE)
    state = world.initial(3)
    for t in range(6):
        rows = {name: x[:, t] for name, x in batch.obs.items()}
        state = world.observe(state, rows, batch.prev_action[:, t], batch.is_first[:, t], MODE)
        torch.testing.assert_close(world.dynamics.feature(state), trace.feature[:, t], rtol=0, atol=1e-5)


def test_raw_pictures_and_numbers_reach_the_encoder_on_their_inner_scale_and_come_back():
    space = spaces.Dict({"camera": spaces.Box(0, 255, (16, 16, 3), np.uint8), "speed": spaces.Box(-900, 900, (2,), np.float32)})
    world = small_world(space)
    rows = {name: torch.from_numpy(np.stack([space[name].sample() for _ in range(40)])) for name in space}
    world.scaling.update(world.obs.canonical(rows))
    inner = world.preprocess(rows)
    assert inner["camera"].shape == (40, 3, 16, 16) and 0 <= inner["camera"].min() and inner["camera"].max() <= 1
    torch.testing.assert_close(inner["speed"].std(0, unbiased=False), torch.ones(2))
    feature = torch.randn(4, world.feature_dim, generator=generator())
    out = world.decode(feature)
    assert out["camera"].shape == (4, 3, 16, 16) and out["speed"].shape == (4, 2)
    mean, std = world.scaling.statistics(0, out["speed"])
    with torch.no_grad():
        torch.testing.assert_close(out["speed"], world.decoder.mean(feature)["speed"] * std + mean)


def test_a_feature_of_the_wrong_width_is_refused():
    world = small_world()
    with pytest.raises(ValueError, match=f"{world.feature_dim}.*not 3"):
        world.decode(torch.zeros(1, 3))
    alone = small_world(decoder=small("decoder", "standard", reads="latent"))
    assert alone.decode(torch.zeros(2, alone.dynamics.latent.size))["obs"].shape == (2, 4)


def test_units_that_say_the_same_about_every_row_are_not_active():
    for latent in registry.kinds("latent"):
        world = small_world(latent=latent)
        trace, _ = traced(world, known_batch(rows=40))
        assert world.active_units(trace) > 0
        for name, p in world.dynamics.named_parameters():
            if name.startswith(("posterior_out", "embed_out")):
                p.data.zero_()
        assert world.active_units(traced(world, known_batch(rows=40))[0]) == 0


# Building --------------------------------------------------------------------------------------------------------------


def test_a_world_comes_from_its_spaces_by_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (WorldModel.from_spaces(VECTOR, TWO_ACTIONS, {"encoder": {"units": 8}}, seed=seed) for seed in (3, 3, 4))
    weights = [torch.cat([p.detach().flatten() for p in world.parameters()]) for world in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.encoder.out_features == 8 + 4 and torch.equal(torch.get_rng_state(), before)


def test_an_option_that_does_not_exist_and_a_space_without_layout_are_refused():
    with pytest.raises(ConfigError, match=r"dynamics.detr.*deter"):
        WorldModel.from_spaces(VECTOR, TWO_ACTIONS, {"dynamics": {"detr": 3}})
    with pytest.raises(UnsupportedSpaceError):
        WorldModel.from_spaces(spaces.Text(5), TWO_ACTIONS)


def test_a_saved_world_is_the_same_world():
    one, other = small_world(seed=0), small_world(seed=1)
    one.scaling.update({"obs": 3 + 5 * torch.randn(20, 4, generator=generator())})
    other.load_state_dict(one.state_dict())
    batch = known_batch()
    features = [traced(world.eval(), batch)[0].feature for world in (one, other)]
    assert torch.equal(*features)


@pytest.mark.parametrize("part", ["encoder", "decoder", "objective", "heads"])
def test_every_registered_part_builds_into_a_world(part):
    for kind in registry.kinds(part):
        config = small(part, kind)
        latent = {"latent": "point", "dynamics": {"posterior": "observation"}} if getattr(config, "points", False) else {}
        world = small_world(**{part: config}, **latent)
        trace, batch = traced(world, known_batch())
        assert all(term.value.isfinite().all() for term in world.loss(trace, batch).values())
    assert ModelConfig.model_fields[part]


@pytest.mark.parametrize("kind", registry.kinds("decoder"))
def test_rollouts_of_observations_are_refused_where_each_pixel_would_be_drawn_on_its_own(kind):
    decoder = small("decoder", kind)
    both = spaces.Dict({"arm": VECTOR, "eye": spaces.Box(0, 255, (16, 16, 1), np.uint8)})
    if kind != "standard":
        world = small_world(both, latent="gaussian", rollouts="observation", decoder=decoder).eval()
        dream = world.imagine(world.initial(2), lambda f, t: torch.zeros(2, 2), 2, Sampling(generator=generator()))
        assert dream.feature.isfinite().all()
        return
    with pytest.raises(ConfigError, match=r"each pixel of 'eye' on its own.*model\.decoder\.kind=diffusion"):
        small_world(both, latent="gaussian", rollouts="observation", decoder=decoder)


def test_rollouts_of_observations_look_at_what_each_step_decodes_to():
    world = small_world(latent="gaussian", rollouts="observation").eval()
    start, action = world.sample_initial(3, MODE), torch.zeros(3, 2)
    dream = world.imagine(start, lambda feature, step: action, 1, MODE)
    blind = world.dynamics.imagine(start, world.action.project(action), MODE)
    corrected = world.dynamics.correct(blind, world.encoder(world.decoder.mean(world.dynamics.feature(blind))), MODE)
    torch.testing.assert_close(dream.feature[:, 1], world.dynamics.feature(corrected))
    assert not torch.allclose(dream.feature[:, 1], world.dynamics.feature(blind))


@pytest.mark.parametrize(
    ("latent", "model", "said"),
    [
        ("gaussian", {"transition": {"kind": "hierarchical", "top": 99}}, r"model\.transition\.top=99.*at most 2"),
        (
            "gaussian",
            {"initial": {"kind": "hierarchical", "top": 1, "upper": "categorical"}},
            r"model\.initial\.upper\.kind=categorical.*latent\.kind=gaussian",
        ),
        (
            "gaussian",
            {"transition": {"kind": "hierarchical", "top": 1, "lower": "vamp"}},
            r"model\.transition\.lower\.kind=vamp .*mixture",
        ),
        (
            "gaussian",
            {"transition": {"kind": "hierarchical", "top": 1, "lower": {"kind": "hierarchical", "top": 2}}},
            r"model\.transition\.lower\.top=2 .*at most 1",
        ),
        (
            "categorical",
            {"transition": {"kind": "hierarchical", "top": 1, "upper": "diffusion"}},
            r"upper\.kind=diffusion has no exact",
        ),
        ("gaussian", {"transition": {"kind": "energy", "trainer": "pcd"}}, r"model\.transition\.trainer=pcd.*trainer=nce"),
        (
            "gaussian",
            {"marginal": {"kind": "energy", "base": {"kind": "hierarchical", "top": 3}}},
            r"model\.marginal\.base\.top=3 .*at most 2",
        ),
        ("point", {"transition": {"kind": "energy", "base": "vamp"}}, "base=vamp is made of the encoder's posteriors"),
        ("point", {"objective": {"kind": "jepa", "probe": False}, "rollouts": "observation"}, r"model\.objective\.probe=true"),
    ],
)
def test_a_part_that_cannot_work_is_refused_when_the_config_is_read_and_named_by_its_key(latent, model, said):
    size = {"variables": 3} if latent == "categorical" else {"size": 3}
    with pytest.raises(ConfigError, match=said):
        Config.from_recipe({"model": {"dynamics": {"latent": {"kind": latent, **size}, "posterior": "observation"}, **model}})


def test_distributions_within_distributions_are_accepted_where_they_work():
    within = {"kind": "hierarchical", "top": 2, "upper": {"kind": "hierarchical", "top": 1, "lower": "flow"}}
    model = {"transition": {"kind": "diffusion"}, "initial": within, "marginal": {"kind": "energy", "base": within}}
    assert ModelConfig.parse({"dynamics": {"latent": {"kind": "gaussian", "size": 3}}, **model}).initial.upper.top == 1


# Windows that are drawn more often -------------------------------------------------------------------------------------


def test_dreams_end_and_pay_as_often_as_the_world_where_both_are_random():
    """Ends that nothing predicts, at 0.0058 a step, each with a reward of 10; a quarter of the windows is drawn for them."""
    rows, rng, g, pay = 20_000, np.random.default_rng(0), generator(), 10.0
    last = rng.random(rows) < 0.0058
    first = np.concatenate([[True], last[:-1]])
    last &= ~first
    actions = np.eye(2, dtype=np.float32)[rng.integers(2, size=rows)]
    replay = Replay(rows, {"obs": ((2,), np.float32)}, 2, 1)
    replay.extend({"obs": rng.normal(size=(rows, 2)).astype(np.float32)}, actions, pay * last, first, last, last)
    heads = small("heads", "standard", bins=41, limit=6.0)
    world = small_world(spaces.Box(-9, 9, (2,), np.float32), latent="gaussian", heads=heads)
    learner = Learner(world, TrainConfig(lr=3e-3, ema_decay=0.98))
    with unchecked():
        for _ in range(400):
            learner.update(learner.prepare(replay.sample(16, 16, rng, terminal_fraction=0.25)), g)
    world, batch = learner.ema.eval(), learner.prepare(replay.sample(128, 16, rng))
    with torch.no_grad():
        starts = world.trace(batch, None, Sampling(generator=g)).states.index(~batch.is_terminal)
        turns = torch.eye(2)
        dream = world.imagine(starts, lambda feature, step: turns[[step % 2]].expand(len(feature), -1), 8, Sampling(generator=g))
    rate = replay.ends / (~first).sum()
    assert float((1 - dream.cont).mean()) == pytest.approx(rate, rel=0.2)
    assert float(dream.reward.mean()) == pytest.approx(pay * rate, rel=0.2)


def test_a_priors_own_loss_is_averaged_over_all_rows_as_every_other_is():
    world = small_world(latent="gaussian", transition=small("distribution", "energy"), initial=small("distribution", "energy"))
    trace, batch = traced(world, known_batch())
    terms = world.dynamics.losses(trace, batch, Sampling(generator=generator()))
    fits = {name: term for name, term in terms.items() if name.startswith("prior/")}
    assert {name.split("/")[1] for name in fits} == {"transition", "initial"}
    for name, term in fits.items():
        counted = batch.is_first if "initial" in name else ~batch.is_first
        assert torch.equal(term.mask, counted)
        torch.testing.assert_close(term.mean(), term.value[counted].sum() / counted.numel())
