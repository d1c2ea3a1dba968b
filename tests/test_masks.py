"""Action masks: illegal actions are never taken in reality, and seldom in dreams."""

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_runs import merged, small_train
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from worldmodel.agents import Dreamer, Planner, RandomAgent
from worldmodel.agents.actor_critic import ActorCriticConfig, Policy
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.held_out import collect
from worldmodel.agents.planner import PlanConfig, PlanDistribution
from worldmodel.data import Sampling
from worldmodel.envs import EnvConfig, ImaginedVecEnv, MaskedActions, MaskedVecEnv, make_env, make_vec
from worldmodel.errors import ConfigError, EnvError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.specs import ACTION_MASK
from worldmodel.storage.run import Run

ACTIONS = 4


class Turnstiles(gym.Env):
    """A walk through rooms 0 to 3, each of which has one door of four: all other actions raise.

    says    "info", "method" or "observation": how masks are given
    doors   how many doors each room has
    fault   at step 3: "shape", "values", "zero" or "gone"
    multi   the action is a pair of a door and a switch, of which either one is locked
    random  the next room is drawn; else it is the next number
    pays    room 0 has a reward
    fails_at  the step of each episode that raises; None: none
    """

    taken = illegal = 0

    def __init__(self, says="info", doors=1, fault=None, multi=False, random=True, length=7, pays=True, fails_at=None):
        self.random, self.pays, self.fails_at = random, pays, fails_at
        self.says, self.doors, self.fault, self.multi, self.length = says, doors, fault, multi, length
        space = gym.spaces.Box(0, 1, (ACTIONS,), np.float32)
        if says == "observation":
            space = gym.spaces.Dict({"room": space, "action_mask": gym.spaces.MultiBinary(ACTIONS)})
        self.observation_space = space
        self.action_space = gym.spaces.MultiDiscrete([ACTIONS, 2]) if multi else gym.spaces.Discrete(ACTIONS)
        if says == "method":
            self.action_masks = self.mask

    def mask(self):
        doors = np.isin(np.arange(ACTIONS), [(self.room * 3 + 1 + d) % ACTIONS for d in range(self.doors)])
        mask = np.concatenate([doors, np.arange(2) == self.room % 2]) if self.multi else doors
        if self.fault and self.steps == 3:
            return {"shape": mask[1:], "values": mask * 2, "zero": mask & False, "gone": None}[self.fault]
        return mask if self.says == "method" else mask.astype(np.int8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.room, self.steps = int(self.np_random.integers(ACTIONS)), 0
        return self.observe()

    def step(self, action):
        fault, self.fault = self.fault, None
        parts = np.atleast_1d(action) + ([0, ACTIONS] if self.multi else [0])
        legal = self.mask()[parts].all()
        self.fault = fault
        Turnstiles.taken += 1
        if not legal:
            Turnstiles.illegal += 1
            raise RuntimeError(f"action {action} is illegal in room {self.room}")
        if self.steps == self.fails_at:
            raise OSError("a fault of its own")
        self.room = int(self.np_random.integers(ACTIONS)) if self.random else (self.room + 1) % ACTIONS
        self.steps += 1
        obs, info = self.observe()
        return obs, float(self.pays and self.room == 0), self.steps >= self.length, False, info

    def observe(self):
        room, mask = np.eye(ACTIONS, dtype=np.float32)[self.room], self.mask()
        if self.says == "observation":
            return {"room": room, "action_mask": mask}, {}
        return room, {} if self.says == "method" or mask is None else {"action_mask": mask}


gym.register("Turnstiles-v0", entry_point=Turnstiles)
TAXI = max(name for name in gym.registry if name.startswith("Taxi-"))
WAYS = ("info", "method", "observation")
SMALL = {**merged(), "train.ratio": 0.25, "train.prefill": 24}
PLANNER = {"agent.plan.samples": 8, "agent.plan.elites": 3, "agent.plan.proposals": 2, "agent.plan.horizon": 3}


@pytest.fixture(autouse=True)
def _counts():
    Turnstiles.taken = Turnstiles.illegal = 0
    yield
    assert not Turnstiles.illegal


def agent(env="Turnstiles-v0", kind=Dreamer, steps=32, policy="MlpPolicy", **config):
    own = {k: v for k, v in SMALL.items() if kind is not RandomAgent or k[:5] != "agent"}
    model = kind(policy, env, seed=0, config={**own, **config})
    return model.learn(steps) if steps else model


# Reality ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", WAYS)
def test_training_and_evaluation_take_no_illegal_action_however_masks_are_given(says):
    policy = "MultiInputPolicy" if says == "observation" else "MlpPolicy"
    model = agent(policy=policy, **{"env.kwargs": {"says": says}, "env.num_envs": 3})
    returns, _ = evaluate(model, model.config.env, 4)
    evaluate_policy(model, model.get_env(), n_eval_episodes=3, deterministic=False)
    held_out = collect(model, model.config.env, 3, random=0.9)
    assert len(returns) == 4 and Turnstiles.taken > 32 + 4 * 7 + 3 * 7
    taken, masks = held_out.rows.action[0], held_out.rows.obs[ACTION_MASK][0]
    assert bool((taken.sum(-1) <= (taken * masks).sum(-1)).all())


@pytest.mark.parametrize(("method", "doors"), [("random", 1), ("cem", 2), ("icem", 2), ("mppi", 1)])
def test_planning_takes_no_illegal_action(method, doors):
    options = {**PLANNER, "agent.plan.method": method, "agent.plan.keep": 2, "agent.plan.proposals": 2 * (doors - 1)}
    model = agent(kind=Planner, steps=32, **options, **{"env.kwargs": {"doors": doors}})
    planned = Turnstiles.taken
    returns, lengths = evaluate(model, model.config.env, 1)
    assert Turnstiles.taken - planned == lengths[0] == 7 and np.isfinite(returns[0]) and not Turnstiles.illegal


def test_a_random_agent_takes_no_illegal_action_and_all_legal_ones():
    model = agent(kind=RandomAgent, steps=64, **{"env.kwargs": {"doors": 2}, "train.prefill": 8, "train.random_action_repeat": 4})
    taken = model.replay.stream(0).action[0]
    assert bool((taken.sum(0) > 0).all())


def test_the_groups_of_a_multidiscrete_action_have_a_mask_of_their_own_each():
    model = agent(**{"env.kwargs": {"multi": True}})
    evaluate(model, model.config.env, 3)
    assert model.obs_spec.keys[ACTION_MASK].raw_shape == (ACTIONS + 2,)


@pytest.mark.parametrize("says", ["info", "method"])
def test_environments_that_somebody_else_made_are_read_as_well(says):
    venv = DummyVecEnv([lambda: Turnstiles(says)] * 2)
    model = agent(venv, **{"env.action_masks": True} if says == "info" else {})
    assert isinstance(model.get_env(), MaskedVecEnv)
    evaluate_policy(model, model.get_env(), n_eval_episodes=3)
    agent(Turnstiles(says), steps=30, **{"env.action_masks": True})
    rows = model.replay.stream(1)
    firsts = rows.is_first[0].nonzero().flatten()[1:]  # after an end in the same step, the mask is of the new episode
    rooms = rows.obs["obs"][0].argmax(-1)
    assert len(firsts) and bool(rows.obs[ACTION_MASK][0][firsts, (rooms[firsts] * 3 + 1) % ACTIONS].all())


def test_masks_are_stored_with_the_row_at_which_they_hold():
    model = agent()
    rows = model.replay.stream(0)
    rooms, masks = rows.obs["obs"][0].argmax(-1), rows.obs[ACTION_MASK][0]
    assert masks.dtype == torch.bool and torch.equal(masks, torch.nn.functional.one_hot((rooms * 3 + 1) % ACTIONS, ACTIONS).bool())


def test_an_agent_that_was_made_before_masks_were_seen_warns_at_its_first_step():
    with pytest.warns(UserWarning, match=r"env.action_masks': True"):
        agent(Turnstiles(doors=ACTIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = agent(Turnstiles(doors=ACTIONS), **{"env.action_masks": False})
    assert ACTION_MASK not in model.obs_spec.keys


@pytest.mark.parametrize("kind", ("subproc", "gymnasium"))
def test_masks_come_from_environments_in_processes_of_their_own(kind):
    settings = {"env.action_masks": True, "env.num_envs": 2, "env.vectorize": "subproc"}
    env = TAXI if kind == "subproc" else gym.make_vec(TAXI, 2, vectorization_mode="async")
    model = agent(env, policy="MultiInputPolicy", **settings)
    model.env.close()
    rows = model.replay.sample(32, 2, np.random.default_rng(0))
    legal = rows.obs[ACTION_MASK][:, 0][~rows.is_first[:, 1]]
    assert not legal.all() and (legal * rows.prev_action[:, 1][~rows.is_first[:, 1]]).sum(-1).all()


@pytest.mark.parametrize("says", ("info", "method"))
def test_masks_of_an_environment_that_failed_are_those_of_the_one_made_anew(says):
    venv = make_vec(
        EnvConfig(id="Turnstiles-v0", kwargs={"says": says, "fails_at": 3}, restarts=50, num_envs=2, action_masks=True), 2
    )
    model = agent(venv)
    assert model.restarts
    rows = model.replay.sample(8, 4, np.random.default_rng(0))
    assert rows.obs[ACTION_MASK].any(-1).all()


def test_random_episodes_that_look_for_rewards_take_no_illegal_action():
    model = agent("Turnstiles-v0", steps=150, **{"env.kwargs": {"pays": False}, "train.ratio": 0.02})
    assert model.exploration.found_nothing and model.exploration._random.any()


# predict ----------------------------------------------------------------------------------------------------------------


def test_predict_takes_masks_as_sb3_contrib_gives_them():
    maskable = pytest.importorskip("sb3_contrib.common.maskable.evaluation")
    model, env = agent(), Turnstiles("method")
    maskable.evaluate_policy(model, env, n_eval_episodes=3, warn=False)
    obs, state = env.reset(seed=0)[0], None
    for only in range(ACTIONS):
        action, state = model.predict(obs, state, action_masks=np.arange(ACTIONS) == only)
        assert action == only
    batch = np.stack([obs, obs])
    assert model.predict(batch, action_masks=np.eye(ACTIONS)[[2, 1]])[0].tolist() == [2, 1]
    with pytest.raises(EnvError, match="nothing says which actions are legal"):
        model.predict(obs)
    with pytest.raises(EnvError, match="allows no action"):
        model.predict(obs, action_masks=np.zeros(ACTIONS))


def test_a_model_without_masks_acts_by_those_that_predict_is_given():
    model = agent(kind=Planner, steps=0, **PLANNER, **{"env.action_masks": False})
    obs = np.eye(ACTIONS, dtype=np.float32)[0]
    assert [int(model.predict(obs, action_masks=np.arange(ACTIONS) == i)[0]) for i in range(ACTIONS)] == list(range(ACTIONS))


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", ["info", "method"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [("shape", r"shape \(4,\)"), ("values", "0 or 1"), ("zero", "allows no action"), ("gone", "there is no action mask")],
)
def test_what_is_no_mask_is_an_error_with_its_place_and_the_state_is_saved(tmp_path, says, fault, words):
    options = {"env.kwargs": {"says": says, "fault": fault}, "env.action_masks": True}
    with pytest.raises(EnvError, match=f"environment 0, episode 1, step 3: .*{words}"):
        small_train(tmp_path / "run", 40, {"env": {"id": "Turnstiles-v0"}}, options=options)
    assert Run.open(tmp_path / "run").checkpoints
    venv = MaskedVecEnv(DummyVecEnv([lambda: Turnstiles(says, fault=fault)]))
    obs = venv.reset()
    with pytest.raises(EnvError, match=words):
        for _ in range(3):
            obs = venv.step(obs[ACTION_MASK].argmax(-1))[0]


def test_masks_are_for_discrete_actions_that_are_not_repeated():
    with pytest.raises(ConfigError, match="Discrete and MultiDiscrete"):
        MaskedActions(gym.make("Pendulum-v1"))
    with pytest.raises(ConfigError, match="action_repeat"):
        agent(**{"env.action_repeat": 2}, steps=0)


def test_an_episode_may_end_where_nothing_is_legal():
    class Over(Turnstiles):
        def mask(self):
            return super().mask() & (self.steps < self.length)

    env, ended = MaskedActions(Over(length=2)), False
    obs, _ = env.reset(seed=0)
    while not ended:
        obs, _, ended, _, _ = env.step(obs[ACTION_MASK].argmax())
    assert not obs[ACTION_MASK].any()
    agent(Over("method", length=3), steps=30)


# Dreams -----------------------------------------------------------------------------------------------------------------


LEARNS = {"train.prefill": 60, "train.pretrain": 60, "train.ratio": 0.1, "train.lr": 2e-2, "agent.horizon": 3, "agent.starts": 8}


@pytest.mark.parametrize("form", ["anchored", "gaussian", "jepa"])
def test_after_a_short_training_few_actions_in_dreams_are_illegal(form):
    small = {k: v for k, v in SMALL.items() if not k.startswith("model.dynamics")}
    options = {**small, "train.batch_size": 4, "env.kwargs": {"random": False}, "train.ema_decay": 0.9, **LEARNS}
    made = Dreamer(
        "MlpPolicy", "Turnstiles-v0", seed=0, config=[f"model={form}", *(f"{k}={json.dumps(v)}" for k, v in options.items())]
    )
    made.learn(64)
    room, world = torch.arange(4).repeat_interleave(8), made.policy.world
    obs = {"obs": torch.eye(ACTIONS)[room], ACTION_MASK: torch.eye(ACTIONS).bool()[(room * 3 + 1) % ACTIONS]}
    state = world.observe(world.initial(32), obs, torch.zeros(32, ACTIONS), torch.ones(32, dtype=torch.bool), Sampling(mode=True))
    dream = made.behaviour.imagine(state, torch.Generator().manual_seed(0))
    assert torch.equal((dream.action * dream.legal).sum(-1), torch.ones_like(dream.reward))
    really = ((room.unsqueeze(1) + torch.arange(3)) * 3 + 1) % ACTIONS
    assert float((dream.action.argmax(-1) != really).float().mean()) < 0.1  # 0.75 by chance


def test_candidates_of_a_planner_keep_to_what_their_own_roll_outs_expect():
    model = agent(kind=Planner, steps=0, **PLANNER)
    world, count, generator = model.policy.world, 6, torch.Generator().manual_seed(0)
    with torch.no_grad():
        world.heads.legal_net[-1].weight.mul_(50)  # untrained, but sure of something else in every state
    legal = torch.tensor([[False, True, False, True]])
    distribution = PlanDistribution.centered(model.action_spec, torch.full((1, 3, ACTIONS), 0.25), 1.0, legal)
    plans = distribution.sample(torch.randn(1, count, 3, 1, generator=generator))
    state = world.initial(count).map(lambda x: torch.randn(x.shape, generator=generator).to(x))
    dream = model.controller._imagine(world, state, plans, 2, generator, distribution)
    assert bool(legal[0, dream.action[:, 0].argmax(-1)].all())
    expected = torch.stack([world.legal(dream.feature[:, step]) for step in (1, 2)], 1)
    assert not bool((dream.action[:, 1:] * ~expected).any()) and bool((plans[0, :, 1:] * ~expected).any())


def test_imagined_worlds_tell_sb3_contrib_what_is_legal_there():
    model = agent()
    worlds = ImaginedVecEnv(model.policy.world, 3, replay=model.replay, seed=0)
    worlds.reset()
    masks = np.stack(worlds.env_method("action_masks"))
    assert worlds.has_attr("action_masks") and masks.shape == (3, ACTIONS) and masks.any(1).all()


# Mathematics ------------------------------------------------------------------------------------------------------------


SPEC = ActionSpec.from_space(gym.spaces.MultiDiscrete([4, 2]))


def test_what_is_illegal_has_the_probability_0_and_everything_stays_finite():
    legal = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]]).bool()
    logits = (100 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for unimix in (0.0, 0.1):
        policy = Policy(SPEC, logits, ActorCriticConfig(unimix=unimix), legal)
        assert bool((torch.cat(policy._groups, -1).exp()[~legal] < 1e-30).all())
        generator, draws = torch.Generator().manual_seed(1), []
        many = Policy(SPEC, logits.detach().expand(4000, 2, 6), ActorCriticConfig(unimix=unimix), legal.expand(4000, 2, 6))
        draws = many.sample(generator)
        assert not bool((draws * ~legal).any()) and not bool((policy.mode() * ~legal).any())
        (policy.log_prob(draws[0]).sum() + policy.entropy().sum()).backward()
        assert bool(logits.grad.isfinite().all()) and bool(policy.log_prob(draws).isfinite().all())
        assert bool((policy.entropy() >= 0).all())


def test_redrawn_actions_follow_the_share_of_what_is_legal():
    share, generator = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.5]), torch.Generator().manual_seed(0)
    legal = torch.tensor([1, 1, 1, 0, 0, 1]).bool().expand(20_000, 6)
    plans = PlanDistribution(SPEC, share.expand(1, 1, 6), None).sample(torch.randn(1, 20_000, 1, 2, generator=generator))[0, :, 0]
    drawn = SPEC.redraw_illegal(plans, legal, generator, share.expand(20_000, 6))
    assert torch.allclose(drawn.mean(0), torch.tensor([1 / 6, 2 / 6, 3 / 6, 0, 0, 1]), atol=0.015)
    numbers = SPEC.redraw_illegal(plans.numpy(), legal, np.random.default_rng(0))
    assert torch.equal((numbers * legal).sum(-1), torch.full((20_000,), 2.0))


def test_a_distribution_of_plans_is_fitted_within_the_legal_first_actions():
    legal = torch.tensor([[0, 1, 1, 0, 1, 1]]).bool()
    start = PlanDistribution.centered(SPEC, torch.full((1, 3, 6), 0.25), 1.0, legal)
    elites = torch.nn.functional.one_hot(torch.tensor([0, 0, 0]), 6).float().expand(1, 3, 3, 6)  # an illegal first action
    fitted = start.fitted(elites, torch.full((1, 3), 1 / 3), PlanConfig(), 1.0)
    for found in (start, fitted):
        assert bool((found.center[:, 0][~legal] == 0).all()) and bool(legal[0, found.mode()[0, 0].bool()].all())
        assert torch.allclose(found.center[0, 0, :4].sum(), torch.ones(()))


def test_of_predicted_masks_the_most_probable_action_is_legal_where_none_is_likely():
    probability = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.6, 0.5]])
    assert SPEC.likely_legal(probability).tolist() == [[False, True, False, False, True, True]]


# Runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_finds_masks_keeps_them_and_resumes_with_them(tmp_path):
    recipe = {"env": {"id": "Turnstiles-v0", "num_envs": 2}, "eval": {"every": 0, "episodes": 1}, "log": {"tensorboard": False}}
    whole = small_train(tmp_path / "whole", 44, recipe)
    assert Run.open(tmp_path / "whole").config.env.action_masks is True
    small_train(tmp_path / "part", 32, recipe)
    part = small_train(tmp_path / "part", 44, recipe, resume=True)
    assert part.real_steps == whole.real_steps
    run = Run.open(tmp_path / "part")
    assert ObsSpec.from_json(run.agent().obs_spec.to_json()).keys[ACTION_MASK].kind == "binary"
    evaluate(run.agent(), "Turnstiles-v0", 2)


def test_an_agent_of_a_file_finds_the_masks_of_the_environment_that_it_is_given(tmp_path):
    agent().save(tmp_path / "agent")
    for env in ("Turnstiles-v0", Turnstiles("method"), make_vec("Turnstiles-v0", 2)):
        before = Turnstiles.taken
        again = Dreamer.load(tmp_path / "agent", env=env)
        again.learn(20)
        masks, taken = again.replay.stream(0).obs[ACTION_MASK][0], again.replay.stream(0).action[0]
        assert Turnstiles.taken - before >= 20 and not masks.bool().all()
        assert bool((taken.sum(-1) <= (taken * masks).sum(-1)).all()) and not Turnstiles.illegal


def test_environments_without_masks_are_observed_as_before():
    model = Dreamer("MlpPolicy", "CartPole-v1", seed=0, config=SMALL)
    assert model.config.env.action_masks is None and model.obs_spec.single and model.world.heads.legal_net is None
    assert make_env("Turnstiles-v0").observation_space.shape == (ACTIONS,)
