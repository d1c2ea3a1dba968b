"""A trained encoder inside SB3's policies gives what the world model gives, and keeps what it learned."""

from __future__ import annotations

import copy
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAIN, IMAGE, TWO_ACTIONS, VECTOR, Toy, small_world, stored
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from worldmodel.agents import JointWorldModel, LatentExtractor, latent_policy_kwargs
from worldmodel.config import Config
from worldmodel.envs.make import make_vec
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel, tensors

PUSH = spaces.Box(-2, 2, (1,), np.float32)
OF_0_1 = Path(__file__).parent / "runs_of_0_1" / "sb3"
OBSERVING = {"posterior": "observation"}
TINY = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
OFF = {"learning_starts": 4, "batch_size": 4, "buffer_size": 100}

SPACES = {
    "vector": VECTOR,
    "matrix": spaces.Box(-3, 3, (2, 3), np.float64),
    "integers": spaces.Box(0, 9, (4,), np.int64),
    "bits of a Box": spaces.Box(0, 1, (3,), bool),
    "hwc": IMAGE,
    "chw": spaces.Box(0, 255, (3, 16, 16), np.uint8),
    "grey": spaces.Box(0, 255, (16, 16), np.uint8),
    "one channel": spaces.Box(0, 255, (16, 16, 1), np.uint8),
    "float hwc": spaces.Box(0, 1, (16, 16, 3), np.float32),
    "float chw to 255": spaces.Box(0, 255, (3, 16, 16), np.float32),
    "dark bytes": spaces.Box(0, 1, (16, 16, 3), np.uint8),
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(4),
    "Dict": spaces.Dict({"eye": IMAGE, "arm": VECTOR, "lamp": spaces.Discrete(3), "keys": spaces.MultiDiscrete([2, 4])}),
}


def world_of(space=VECTOR, action=TWO_ACTIONS, latent="gaussian", seed=1, **options):
    """A world model with weights and statistics of its own; its posterior sees the observation alone."""
    world = small_world(space, action, latent=latent, dynamics={**OBSERVING, **options}, seed=seed)
    rows = samples(world, 50)
    world.scaling.update(world.obs.canonical(tensors(rows)))
    return world.eval()


def samples(world, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    space = world.obs.space
    space.seed(seed)
    found = [space.sample() for _ in range(count)]
    batch = np.stack(found) if world.obs.single else {name: np.stack([o[name] for o in found]) for name in world.obs.keys}
    return world.obs.to_raw(batch)


def latent_of(world, rows) -> torch.Tensor:
    embed = world.encoder(world.preprocess(tensors(rows)))
    return world.dynamics.posterior(embed, world.initial(len(embed))["h"]).mean


def toys(space=VECTOR, action=TWO_ACTIONS, count: int = 1) -> DummyVecEnv:
    return DummyVecEnv([lambda: Toy(space, action) for _ in range(count)])


def make(algorithm, env, kwargs, **options):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    options = {**(TINY if algorithm is PPO else {"n_steps": 8} if algorithm is A2C else OFF), **options}
    return algorithm(policy, env, policy_kwargs={"net_arch": [8], **kwargs}, seed=0, device="cpu", **options)


def extractors(model) -> dict[str, LatentExtractor]:
    return {name: part for name, part in model.policy.named_modules() if isinstance(part, LatentExtractor)}


def weights(extractor) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in extractor.parameters()]).clone()


# What it gives ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["latent", "embedding"])
@pytest.mark.parametrize("name", SPACES)
def test_it_gives_what_the_world_model_gives_for_the_raw_observation(name, output):
    world = world_of(SPACES[name])
    env = A2C._wrap_env(toys(SPACES[name]), monitor_wrapper=False)
    extractor = make(A2C, env, latent_policy_kwargs(world, output=output)).policy.features_extractor
    rows = samples(world, 6)
    raw = world.obs.to_env(rows)
    expected = latent_of(world, rows) if output == "latent" else world.encoder(world.preprocess(tensors(rows)))
    transposed = VecTransposeImage(toys(SPACES[name])) if isinstance(env, VecTransposeImage) else None
    given = transposed.transpose_observations(raw) if transposed is not None else raw
    as_tensors = {k: torch.as_tensor(x) for k, x in given.items()} if isinstance(given, dict) else torch.as_tensor(given)
    got = extractor(preprocess_obs(as_tensors, env.observation_space))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert got.shape == (6, extractor.features_dim)


@pytest.mark.parametrize("name", ["Discrete", "Dict", "hwc", "MultiDiscrete"])
def test_it_reads_the_rows_of_sb3s_buffers_as_it_reads_the_environments(name):
    world = world_of(SPACES[name])
    model = make(PPO, toys(SPACES[name], count=2), latent_policy_kwargs(world)).learn(16)
    rollout = next(model.rollout_buffer.get(4))
    assert model.policy.extract_features(rollout.observations).shape == (4, model.policy.features_extractor.features_dim)


def test_unnormalised_images_are_divided_here():
    world = world_of(IMAGE)
    model = make(A2C, toys(IMAGE), latent_policy_kwargs(world, normalize_images=False))
    rows = samples(world, 3)
    got = model.policy.extract_features(model.policy.obs_to_tensor(rows["obs"])[0])
    torch.testing.assert_close(got, latent_of(world, rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["hwc", "vector", "chw"])
def test_each_stacked_frame_is_encoded_and_they_stand_side_by_side_oldest_first(name):
    world = world_of(SPACES[name])
    model = make(A2C, VecFrameStack(toys(SPACES[name]), 3), latent_policy_kwargs(world, frames=3))
    extractor, obs, frames = model.policy.features_extractor, model.env.reset(), []
    for _ in range(4):
        obs = model.env.step([0])[0]
        frames.append(extractor.observations.newest_raw(obs))
    latents = latent_of(world, {"obs": np.concatenate(frames[-3:])})
    got = model.policy.extract_features(torch.as_tensor(obs))
    torch.testing.assert_close(got[0], latents.flatten(), rtol=0, atol=1e-6)
    assert model.policy.features_extractor.features_dim == 3 * latents.shape[1]


@pytest.mark.parametrize(
    ("trained", "space", "says"),
    [
        (VECTOR, spaces.Box(-1, 1, (5,), np.float32), "trained on"),
        (VECTOR, spaces.Box(-2, 2, (4,), np.float32), "trained on"),
        (VECTOR, spaces.Dict({"obs": VECTOR}), "trained on"),
        (IMAGE, spaces.Box(0, 255, (16, 16, 6), np.uint8), "frames=N"),
        (spaces.Discrete(4, start=1), spaces.Discrete(4, start=1), "PlainVecEnv"),
        (spaces.MultiDiscrete([[2, 3]]), spaces.MultiDiscrete([[2, 3]]), "PlainVecEnv"),
    ],
)
def test_a_run_of_another_environment_or_a_space_that_sb3_garbles_is_refused(trained, space, says):
    kwargs = latent_policy_kwargs(world_of(trained))["features_extractor_kwargs"]
    with pytest.raises(ConfigError, match=says):
        LatentExtractor(space, **kwargs)


def test_an_image_that_is_a_vector_for_the_model_is_refused_where_sb3_would_scale_it():
    space = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    config = small_world(VECTOR, dynamics=OBSERVING).config
    world = type(small_world()).from_spaces(space, spaces.Discrete(2), config, layout="vector")
    with pytest.raises(ConfigError, match="reshape the observation"):
        make(A2C, toys(space), latent_policy_kwargs(world))


def test_a_filtering_run_gives_its_embedding_and_says_so():
    world = small_world(VECTOR)
    with pytest.warns(UserWarning, match="LatentVecEnv"):
        kwargs = latent_policy_kwargs(world)
    extractor = make(A2C, toys(), kwargs).policy.features_extractor
    assert extractor.output == "embedding" and extractor.features_dim == world.encoder.out_features
    with pytest.raises(ConfigError, match="model=vae"):
        latent_policy_kwargs(world, output="latent")


MODELS = sorted(file.name.removesuffix(".yaml") for file in (importlib.resources.files("worldmodel.configs") / "model").iterdir())


def world_of_recipe(recipe: str, space, action=TWO_ACTIONS) -> WorldModel:
    config = Config.from_recipe("cartpole", [f"model={recipe}", "size=nano"]).model
    return WorldModel.from_spaces(space, action, config, seed=1).eval()


@pytest.mark.parametrize(
    ("space", "recipe"), [(s, r) for s in ("vector", "hwc") for r in MODELS if (s, r) != ("vector", "diamond")]
)
def test_a_model_of_every_recipe_is_an_extractor_or_the_error_names_the_reason(space, recipe):
    world, env = world_of_recipe(recipe, SPACES[space]), A2C._wrap_env(toys(SPACES[space]), monitor_wrapper=False)
    rows = samples(world, 3)
    embed, has_latent = world.encoder(world.preprocess(tensors(rows))), getattr(world.dynamics, "posterior_net", None) is not None
    given = torch.as_tensor(rows["obs"] if space == "vector" else np.moveaxis(rows["obs"], -1, 1))
    for output in ("embedding", "latent"):
        if output == "latent" and not has_latent:
            with pytest.raises(ConfigError, match="pictures as they are: it has no latent" if recipe == "diamond" else "filters"):
                latent_policy_kwargs(world, output=output)
            continue
        extractor = LatentExtractor(
            env.observation_space, **latent_policy_kwargs(world, output=output)["features_extractor_kwargs"]
        )
        expected = embed if output == "embedding" else latent_of(world, rows)
        torch.testing.assert_close(extractor(preprocess_obs(given, env.observation_space)), expected, rtol=0, atol=1e-6)


def test_a_model_of_pictures_without_a_latent_gives_its_embedding_says_why_and_trains_jointly():
    world = world_of_recipe("diamond", IMAGE)
    with pytest.warns(UserWarning, match="pictures as they are"):
        kwargs = latent_policy_kwargs(world)
    assert make(A2C, toys(IMAGE), kwargs).policy.features_extractor.features_dim == world.encoder.out_features
    with pytest.warns(UserWarning, match="pictures as they are"):
        model, callback = joint(DQN, toys(IMAGE), world)
    encoder = model.policy.q_net.features_extractor
    before = weights(encoder)
    model.learn(24, callback=callback)
    assert callback.agent.learner.updates > 0 and not torch.equal(before, weights(encoder))


@pytest.mark.parametrize("wrong", [{"mode": "frosen"}, {"output": "latents"}, {"frames": 0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        latent_policy_kwargs(world_of(), **wrong)


def test_categorical_latents_are_given_as_probabilities():
    world = world_of(latent="categorical")
    extractor = make(A2C, toys(), latent_policy_kwargs(world)).policy.features_extractor
    got = extractor(torch.zeros(2, 4))
    torch.testing.assert_close(got.view(2, 2, 3).sum(-1), torch.ones(2, 2))


COPIES = {PPO: (2, 1), A2C: (2, 1), DQN: (2, 2), SAC: (3, 2), TD3: (4, 2)}
"""Extractors in a policy where actor and critic have their own, and where they share one; targets included."""


# Its weights ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, SAC, TD3])
def test_the_trained_weights_are_in_every_network_and_stay_there_while_frozen(algorithm, shared):
    action = spaces.Discrete(2) if algorithm in (PPO, A2C, DQN) else PUSH
    world = world_of(action=action)
    kwargs = latent_policy_kwargs(world) | ({} if algorithm is DQN else {"share_features_extractor": shared})
    model = make(algorithm, toys(action=action), kwargs)
    found = extractors(model)
    assert len(found) == COPIES[algorithm][shared]
    rows = samples(world, 3)
    before = latent_of(world, rows)
    heads = [p for name, p in model.policy.named_parameters() if "features" not in name]
    first = [p.detach().clone() for p in heads]
    model.learn(24)
    for part in found.values():
        torch.testing.assert_close(part(torch.as_tensor(rows["obs"])), before, rtol=0, atol=1e-5)
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert any(not torch.equal(p, before) for p, before in zip(heads, first))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_orthogonal_initialisation_reaches_the_rest_of_the_policy_alone(algorithm):
    world = world_of()
    policy = make(algorithm, toys(), {**latent_policy_kwargs(world, "finetune"), "net_arch": [2]}).policy
    rows = policy.mlp_extractor.policy_net[0].weight.detach()
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(2), rtol=0, atol=1e-4)
    own = {**world.encoder.state_dict(), **world.dynamics.posterior_net.state_dict()}
    held = {**policy.features_extractor.encoder.state_dict(), **policy.features_extractor.posterior_net.state_dict()}
    assert own.keys() == held.keys() and all(torch.equal(own[name], held[name]) for name in own)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_fine_tuning_moves_the_encoder_and_nothing_of_the_world_model(algorithm):
    action = PUSH if algorithm is SAC else spaces.Discrete(2)
    world = world_of(action=action)
    own = copy.deepcopy(world.state_dict())
    model = make(algorithm, toys(action=action), latent_policy_kwargs(world, "finetune"))
    before = {name: weights(part) for name, part in extractors(model).items()}
    model.learn(40)
    moved = {name: not torch.equal(before[name], weights(part)) for name, part in extractors(model).items() if "target" not in name}
    assert moved and all(moved.values())
    assert all(torch.equal(x, own[name]) for name, x in world.state_dict().items())


# Joint training ---------------------------------------------------------------------------------------------------------------

JOINT = {"train.batch_size": 3, "train.batch_length": 6, "train.prefill": 10, "train.capacity": 1000}


def joint(algorithm, env, world, *, ratio=0.5, rl_gradients=True, kwargs=None, **options):
    callback = JointWorldModel(world, ratio=ratio, rl_gradients=rl_gradients, config=JOINT)
    model = make(algorithm, env, {**latent_policy_kwargs(world, "joint"), **(kwargs or {})}, **options)
    return model, callback


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, SAC, TD3])
def test_the_world_models_loss_trains_the_critics_encoder_and_the_actors_copy_follows(algorithm):
    action = PUSH if algorithm in (SAC, TD3) else spaces.Discrete(2)
    world = world_of(action=action)
    options = {"kwargs": {"share_features_extractor": False}} if algorithm in (PPO, A2C) else {}
    model, callback = joint(algorithm, toys(action=action), world, rl_gradients=False, **options)
    before = {name: weights(part) for name, part in extractors(model).items()}
    model.learn(40, callback=callback)
    assert callback.agent.learner.updates > 0
    after = {name: weights(part) for name, part in extractors(model).items()}
    critic = {PPO: "vf_features_extractor", A2C: "vf_features_extractor", DQN: "q_net.features_extractor"}.get(
        algorithm, "critic.features_extractor"
    )
    assert callback.leader is dict(model.policy.named_modules())[critic]
    assert not torch.equal(before[critic], after[critic])
    for follower in callback.followers:
        assert torch.equal(weights(follower), weights(callback.leader)) and follower.detached
        assert not any(p.requires_grad for p in follower.parameters())
    assert len(callback.followers) == (0 if algorithm is DQN else 1)


@pytest.mark.parametrize("rl_gradients", [True, False])
def test_the_algorithms_gradients_reach_the_encoder_only_by_wish(rl_gradients):
    world = world_of()
    model, callback = joint(DQN, toys(), world, ratio=0.0, rl_gradients=rl_gradients)
    before = weights(model.policy.q_net.features_extractor)
    model.learn(40, callback=callback)
    assert torch.equal(before, weights(model.policy.q_net.features_extractor)) != rl_gradients


def test_updates_leave_no_gradient_behind_and_come_between_rollouts():
    model, callback = joint(PPO, toys(), world_of(), ratio=1.0)
    recorded = []
    collect = model.collect_rollouts

    def watched(*args, **kwargs):
        goes_on = collect(*args, **kwargs)
        recorded.append((callback.agent.learner.updates, [p.grad for p in callback.leader.parameters()]))
        return goes_on

    model.collect_rollouts = watched
    model.learn(32, callback=callback)
    assert [updates for updates, _ in recorded] == sorted(updates for updates, _ in recorded) and recorded[-1][0] > 0
    fresh = [grads for updates, grads in recorded[:1] if updates == 0]
    assert all(g is None for grads in fresh for g in grads)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_what_is_recorded_is_what_the_environment_did(algorithm):
    """Chain: row t holds the action that led to its cell, and the reward of arriving there."""
    venv = make_vec(CHAIN, 1, 0)
    world = world_of(venv.observation_space)
    model, callback = joint(algorithm, venv, world, **({"learning_starts": 100} if algorithm is DQN else {}))
    model.learn(64, callback=callback)
    rows = stored(callback.agent)
    cell, taken = rows.obs["obs"].argmax(-1), rows.prev_action.argmax(-1)
    assert len(cell) > 60
    for t in range(1, len(cell)):
        if rows.is_first[t]:
            assert cell[t] == 0 and rows.is_last[t - 1] and not rows.prev_action[t].any()
            continue
        assert cell[t] == max(cell[t - 1] + (1 if taken[t] == 1 else -1), 0)
        assert rows.reward[t] == pytest.approx(1.0 if cell[t] == 4 else (int(cell[t]) - 4) / 10, abs=1e-6)
        assert bool(rows.is_terminal[t]) == (cell[t] == 4)
    assert rows.is_terminal.any()


@pytest.mark.parametrize(("algorithm", "squash"), [(PPO, False), (PPO, True), (SAC, True)])
def test_continuous_actions_are_recorded_as_the_environment_got_them(algorithm, squash):
    toy = Toy(VECTOR, PUSH)
    options = {"use_sde": True, "kwargs": {"squash_output": True}} if algorithm is PPO and squash else {}
    model, callback = joint(algorithm, DummyVecEnv([lambda: toy]), world_of(action=PUSH), ratio=0.0, **options)
    model.learn(24, callback=callback)
    rows = stored(callback.agent)
    taken = rows.prev_action[~rows.is_first].flatten().numpy()
    np.testing.assert_allclose(taken, np.array(toy.actions).flatten() / 2, atol=1e-6)


def test_stacked_and_transposed_pictures_are_recorded_as_they_were(monkeypatch):
    recorded = []
    toy = Toy(IMAGE, spoil=lambda obs, reward: (recorded.append(obs) or obs, reward))
    world = world_of(IMAGE)
    callback = JointWorldModel(world, ratio=0.0, config=JOINT)
    env = VecFrameStack(DummyVecEnv([lambda: toy]), 2)
    model = make(DQN, env, latent_policy_kwargs(world, "joint", frames=2))
    model.learn(12, callback=callback)
    rows = stored(callback.agent)
    np.testing.assert_array_equal(rows.obs["obs"][~rows.is_first].numpy(), np.stack(recorded))


def test_joint_training_goes_on_after_load(tmp_path):
    world = world_of(action=PUSH)
    model, callback = joint(SAC, toys(action=PUSH), world)
    model.learn(24, callback=callback)
    model.save(tmp_path / "model")
    loaded = SAC.load(tmp_path / "model", toys(action=PUSH), device="cpu")
    assert torch.equal(weights(loaded.critic.features_extractor), weights(model.critic.features_extractor))
    callback = JointWorldModel(world, ratio=0.5, config=JOINT)
    loaded.learn(24, callback=callback)
    assert callback.agent.learner.updates > 0 and callback.leader is loaded.critic.features_extractor
    loaded.learn(8, callback=callback, reset_num_timesteps=False)
    assert callback.agent.replay.added > 32


def test_the_statistics_of_vectors_go_on_in_all_copies():
    model, callback = joint(SAC, toys(action=PUSH), world_of(action=PUSH))
    before = float(model.critic.features_extractor.scaling.count)
    model.learn(24, callback=callback)
    counts = {float(part.scaling.count) for part in extractors(model).values()}
    assert len(counts) == 1 and counts.pop() > before + 24


@pytest.mark.parametrize(
    ("kwargs", "wrap", "other", "says"),
    [
        ("frozen", None, None, "mode='joint'"),
        ("joint", lambda env: VecNormalize(env), None, "VecNormalize"),
        ("joint", None, spaces.Discrete(3), "actions"),
        ("joint", None, spaces.Box(-1, 1, (3,), np.float32), "observes"),
    ],
)
def test_joint_training_says_what_is_missing(kwargs, wrap, other, says):
    world = world_of()
    env = toys()
    model = make(PPO, wrap(env) if wrap else env, latent_policy_kwargs(world, kwargs))
    source = world
    if other is not None:
        source = world_of(VECTOR, other) if isinstance(other, spaces.Discrete) else world_of(other)
    with pytest.raises(ConfigError, match=says):
        model.learn(8, callback=JointWorldModel(source, config=JOINT))
