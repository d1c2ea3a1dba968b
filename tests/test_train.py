"""Training from a recipe: what a resume keeps, what ends a run, how it is measured."""

from __future__ import annotations

import dataclasses
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_runs import CHAIN, OPTIONS, Nervous, small_train
from stable_baselines3 import PPO

from worldmodel.agents import evaluation
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.training.callback import env_seed
from worldmodel.agents.training.session import TrainResult, make_agent
from worldmodel.agents.training.signals import Interrupted
from worldmodel.commands.train import train
from worldmodel.errors import ConfigError, EnvError, NumericsError, StorageError
from worldmodel.model import WorldModel
from worldmodel.storage import checkpoint, files
from worldmodel.storage.run import Run

FENCE = {"train.ema_decay": 0.9, "checkpoint.fence": True, "checkpoint.keep": 1, "env.num_envs": 2, "train.ratio": 0.3}
RESULT_KEYS = (
    "env_id recipe seed threads real_steps updates wall_seconds eval_seconds parameters "
    "threshold solved_at final_return evaluations run final_episodes final_step newest_return best"
).split()


@pytest.fixture(autouse=True)
def _calm():
    Nervous.steps = 0


def contents(folder):
    tensors, state, manifest = Run.open(folder).read()
    return tensors, state, {k: v for k, v in manifest["progress"].items() if "seconds" not in k}


def assert_equal_runs(one, two):
    """Weights, optimisers, random states, counters, evaluations and replay, bit for bit."""
    (tensors, state, progress), (other_tensors, other_state, other_progress) = contents(one), contents(two)
    assert state == other_state and progress == other_progress
    for file, arrays in tensors.items():
        assert arrays.keys() == other_tensors[file].keys()
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, other_tensors[file][name], err_msg=f"{file}.{name}")
    rows, others = Run.open(one).replay(), Run.open(two).replay()
    assert rows.added_by_stream == others.added_by_stream and rows.ends == others.ends
    a, b = (r.sample(50, 6, np.random.default_rng(0), terminal_fraction=0.5) for r in (rows, others))
    for name in ("action", "reward", "is_first", "is_last", "is_terminal"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.obs["obs"], b.obs["obs"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    small_train(folder, 80, "Nervous-v0", options=FENCE)
    return folder


@pytest.mark.parametrize("stops", [(30,), (40, 54)])
def test_behind_a_fence_a_resumed_run_equals_an_unbroken_one(unbroken, tmp_path, stops):
    for i, steps in enumerate([*stops, 80]):
        small_train(tmp_path / "run", steps, "Nervous-v0", options=FENCE, resume=i > 0)
    assert_equal_runs(unbroken, tmp_path / "run")


def test_an_evaluation_is_no_fence_and_cuts_no_episode(tmp_path):
    options = {**FENCE, "env.num_envs": 1, "eval.every": 10, "checkpoint.every": 40}
    small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    rows = Run.open(tmp_path / "run").replay().stream(0)
    ends = rows.is_last[0].nonzero().flatten().diff()
    assert set(ends.tolist()) == {8}, ends  # each episode has its 7 steps


def test_behind_a_fence_an_interrupted_run_equals_an_unbroken_one(unbroken, tmp_path):
    trip = {**FENCE, "env.kwargs": {"at": 75, "signals": [int(signal.SIGTERM)]}}
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 80, "Nervous-v0", options=trip)
    assert Run.open(tmp_path / "run").checkpoints == [26, 40, 48]  # best, fence, state at the signal
    with Run.open(tmp_path / "run", write=True) as run:
        agent = make_agent(run.config, 0, "cpu")
        run.resume(agent, keep_newer=False, log=print)
        agent.env.close()
        assert agent.num_timesteps == 40 and run.checkpoints == [26, 40]  # but a resume starts from the fence
    small_train(tmp_path / "run", 80, "Nervous-v0", options=trip, resume=True)
    tensors, other = contents(unbroken)[0], contents(tmp_path / "run")[0]
    assert all(np.array_equal(x, other[file][name]) for file, arrays in tensors.items() for name, x in arrays.items())


def test_without_a_fence_a_resume_closes_the_open_episode_as_a_truncation(tmp_path):
    small_train(tmp_path / "run", 31, "Nervous-v0")
    before = Run.open(tmp_path / "run").replay().added
    small_train(tmp_path / "run", 40, "Nervous-v0", resume=True)
    replay = Run.open(tmp_path / "run").replay()
    rows = replay.sample(1, replay.added, np.random.default_rng(0))
    assert bool(rows.is_first[0, before]) and bool(rows.is_last[0, before - 1]) and not bool(rows.is_terminal[0, before - 1])
    assert replay.added == before + 1 + 9 + int(rows.is_last[0, before + 1 :].sum())


def test_a_resumed_run_starts_its_environments_from_other_seeds():
    assert env_seed(3, 0) == 3
    assert len({env_seed(3, 0), env_seed(3, 20), env_seed(3, 40), env_seed(4, 20)}) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tmp_path, number, code):
    options = {"env.kwargs": {"at": 33, "signals": [int(number)]}, "eval.every": 0}
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stop:
        small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    assert stop.value.exit_code == code and "--resume" in str(stop.value)
    assert Run.open(tmp_path / "run").checkpoints[-1] == 33 and Run.open(tmp_path / "run").result is None
    assert signal.getsignal(number) == handler
    assert small_train(tmp_path / "run", None, "Nervous-v0", options=options, resume=True).real_steps == 40


def test_a_second_signal_aborts_at_once_and_leaves_what_was_saved(tmp_path):
    options = {"env.kwargs": {"at": 33, "signals": [int(signal.SIGTERM)] * 2}, "eval.every": 0}
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    assert Run.open(tmp_path / "run").checkpoints == [0, 20]


def test_a_signal_in_an_evaluation_gives_it_up_and_a_resume_makes_up_for_it(tmp_path):
    options = {"env.kwargs": {"at": 27, "signals": [int(signal.SIGTERM)]}, "checkpoint.every": 0}
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    assert Run.open(tmp_path / "run").checkpoints == [0, 25]
    result = small_train(tmp_path / "run", 40, "Nervous-v0", options=options, resume=True)
    assert [row["real_steps"] for row in result.evaluations] == [25]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from worldmodel.agents.training.signals import Signals

        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert not signals
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failing_environment_keeps_what_was_good(tmp_path):
    options = {"env.kwargs": {"at": 33, "raises": True}, "eval.every": 0}
    with pytest.raises(EnvError, match="the simulator fell over"):
        small_train(tmp_path / "run", 40, "Nervous-v0", options=options)
    assert Run.open(tmp_path / "run").checkpoints[-1] == 32
    assert small_train(tmp_path / "run", 40, "Nervous-v0", options=options, resume=True).real_steps == 40


def test_numbers_that_are_not_finite_end_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    calls, loss = [], WorldModel.loss

    def ill(self, *args):
        calls.append(None)
        terms = loss(self, *args)
        return terms if len(calls) < 5 else {name: dataclasses.replace(term, value=term.value / 0) for name, term in terms.items()}

    monkeypatch.setattr(WorldModel, "loss", ill)
    with pytest.raises(NumericsError, match=r"train\.lr"):
        small_train(tmp_path / "run", 60)
    assert len(calls) == 7 and Run.open(tmp_path / "run").checkpoints == [20, 25]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    from worldmodel.agents.dreamer import Dreamer

    monkeypatch.setattr(Dreamer, "_behaviour_state", lambda self: {"return_low": float("nan") if self.num_timesteps else 0.0})
    with pytest.raises(NumericsError, match="return_low"):
        small_train(tmp_path / "run", 20)
    assert Run.open(tmp_path / "run").checkpoints == [0]


def test_evaluations_leave_no_trace_in_the_training(tmp_path):
    for name, every in (("often", 7), ("never", 0)):
        small_train(tmp_path / name, 40, options={"agent": "random", "eval.every": every, "checkpoint.every": 0})
    often, never = contents(tmp_path / "often")[0], contents(tmp_path / "never")[0]
    assert len(Run.open(tmp_path / "often").result["evaluations"]) == 5
    assert all(np.array_equal(x, never[file][name]) for file, arrays in often.items() for name, x in arrays.items())


class SeedReward(gym.Env):
    """Its first reward is its seed and ends after 1 + seed % 3 steps."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seed_given, self.steps = (-999 if seed is None else seed), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = float(self.seed_given) if self.steps == 1 else 0.0
        return np.zeros(1, np.float32), reward, self.steps > self.seed_given % 3, False, {}


gym.register("SeedReward-v0", entry_point=SeedReward)


class Lefty:
    """Always action 0; remembers what it was asked."""

    def __init__(self):
        self.starts = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert deterministic
        self.starts.append(None if state is None else episode_start.tolist())
        return np.zeros(len(observation), int), (np.zeros(len(observation)),)


def test_an_evaluation_is_the_first_episode_of_each_seed():
    model = Lefty()
    returns, lengths = evaluate(model, "SeedReward-v0", episodes=4, seed=100)
    assert returns == [100.0, 101.0, 102.0, 103.0] and lengths == [2, 3, 1, 2]
    assert model.starts == [None, [False, False, True, False], [True, False, True, True]]


def test_an_evaluation_works_for_any_sb3_algorithm():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu")
    env = gym.make("CartPole-v1")
    expected = []
    for seed in (10_000, 10_001):
        obs, total, done = env.reset(seed=seed)[0], 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(int(model.predict(obs, deterministic=True)[0]))
            total, done = total + reward, terminated or truncated
        expected.append(total)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert evaluate(model, "CartPole-v1", episodes=2) == (expected, [int(r) for r in expected])
    assert torch.equal(before, torch.get_rng_state())


def test_solved_is_the_first_confirmed_evaluation_and_may_end_the_run(tmp_path, monkeypatch):
    by_seed = {10_000: [5.0, 7.0], 20_000: [5.9, 5.9], 30_000: [1.0, 2.0]}
    asked = []

    def scripted(model, env, episodes, seed, **_):
        asked.append((model.num_timesteps, seed))
        if model.num_timesteps == 50 and seed == 20_000:
            return [6.0, 6.0], [1, 1]
        return by_seed[seed], [1, 1]

    monkeypatch.setattr("worldmodel.agents.training.callback.evaluate", scripted)
    result = small_train(tmp_path / "run", 100, options={"eval.threshold": 6.0, "eval.stop_when_solved": True})
    assert (result.solved_at, result.real_steps, result.final_return, result.threshold) == (50, 50, 1.5, 6.0)
    assert asked == [(25, 10_000), (25, 20_000), (50, 10_000), (50, 20_000), (50, 30_000)]
    assert result.evaluations[0] == {"real_steps": 25, "mean_return": 6.0, "std_return": 1.0, "episodes": 2}
    assert small_train(tmp_path / "run", 200, options={"eval.threshold": 6.0, "eval.stop_when_solved": True}, resume=True) == result


def test_the_time_of_evaluations_is_kept_apart(tmp_path, monkeypatch):
    def slow(*_, **__):
        time.sleep(0.5)
        return [0.0], [1]

    monkeypatch.setattr("worldmodel.agents.training.callback.evaluate", slow)
    started = time.perf_counter()
    first = small_train(tmp_path / "run", 25)
    second = small_train(tmp_path / "run", 30, resume=True)
    elapsed = time.perf_counter() - started
    assert 1.5 <= first.eval_seconds < 1.8 and 2.5 <= second.eval_seconds < 2.8  # the best and the newest agent at the end
    assert 0 < first.wall_seconds < second.wall_seconds < elapsed - 2.5


def test_the_result_has_the_documented_fields_and_is_kept_in_the_run(tmp_path):
    result = small_train(tmp_path / "run", 30)
    assert [f.name for f in dataclasses.fields(TrainResult)] == RESULT_KEYS
    assert Run.open(tmp_path / "run").result == result.to_json()
    assert (result.env_id, result.recipe, result.seed, result.real_steps, result.threads) == (CHAIN, None, 0, 30, 1)
    world, agent = Run.open(tmp_path / "run").world_model(), Run.open(tmp_path / "run").agent()
    actor = sum(p.numel() for net in (agent.controller.actor, agent.controller.critic) for p in net.parameters())
    assert result.parameters == actor + sum(p.numel() for p in world.parameters())
    assert result.threshold == 0.39  # the environment's own


def test_on_resume_only_steps_may_grow_and_other_differences_are_listed(tmp_path):
    small_train(tmp_path / "run", 30, options={"train.burn_in": 1})
    changed = {"train.ratio": 0.5, "model.dynamics.deter": 12}
    with pytest.raises(ConfigError) as refusal:
        small_train(tmp_path / "run", 20, options=changed, resume=True, seed=4)
    for part in ("train.ratio: 0.25 -> 0.5", "model.dynamics.deter: 8 -> 12", "seed: 0 -> 4", "train.steps: 30 -> 20"):
        assert part in str(refusal.value)
    with pytest.raises(ConfigError, match=r"env.id: .*Chain-v0 -> Nervous-v0"):
        small_train(tmp_path / "run", 40, "Nervous-v0", resume=True)
    # What is left out stays as it was: neither burn_in nor the small sizes are given again.
    result = train(CHAIN, steps=40, run_dir=tmp_path / "run", resume=True, device="cpu")
    assert result.real_steps == 40 and Run.open(tmp_path / "run").config.train.burn_in == 1
    assert Run.open(tmp_path / "run").config.train.steps == 40


def test_a_finished_run_gives_its_result_back(tmp_path, monkeypatch):
    result = small_train(tmp_path / "run", 30)
    monkeypatch.setattr("worldmodel.agents.training.session.make_agent", None)
    assert small_train(tmp_path / "run", None, resume=True) == result


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    small_train(tmp_path / "run", 20)
    (tmp_path / "run" / "result.json").unlink()
    for step in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        files.discard(tmp_path / "run" / "checkpoints" / f"step-{step:012d}")
    assert small_train(tmp_path / "run", 20, resume=True).real_steps == 20


def test_resume_needs_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run folder"):
        small_train(tmp_path / "nowhere", resume=True)
    with pytest.raises(ConfigError, match="--run"):
        small_train(None, resume=True)


def test_resume_without_a_folder_takes_the_last_default_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [small_train(None, 20).run for _ in range(2)] == ["runs/chain-v0-s0", "runs/chain-v0-s0-2"]
    assert small_train(None, 30, resume=True).run == "runs/chain-v0-s0-2"


@pytest.mark.parametrize("keep", [False, True])
def test_experience_newer_than_the_checkpoint_is_dropped_unless_it_is_to_be_kept(tmp_path, keep):
    small_train(tmp_path / "run", 40)
    newest = tmp_path / "run" / "checkpoints" / "step-000000000040" / "world.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    logged = []
    small_train(tmp_path / "run", 41, resume=True, keep_newer=keep, log=logged.append)
    assert any("step 40 is skipped" in line for line in logged)
    assert any(("are kept" if keep else "are dropped") in line for line in logged)
    replay = Run.open(tmp_path / "run").replay()
    rows = replay.sample(1, replay.added, np.random.default_rng(0))
    steps = replay.added - int(rows.is_first.sum())
    assert steps == (40 + 41 - 25 if keep else 41)  # from the checkpoint of the evaluation at 25
    run = Run.open(tmp_path / "run")
    named = {number for step in run.checkpoints for number, _ in run.read(step)[2]["replay"]["segments"]}
    assert {int(p.stem.rpartition("-")[2]) for p in (run.path / "replay").iterdir()} == named  # nothing dropped stays on the disk


def test_a_replay_that_never_holds_a_sequence_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"keeps 5 steps .* needs 6.*train.capacity \(now 10\).*train.batch_length \(now 6\)"):
        small_train(tmp_path / "run", options={"train.capacity": 10, "env.num_envs": 2})
    assert not (tmp_path / "run").exists()


def test_what_cannot_start_leaves_no_folder(tmp_path):
    for options in ({"env.id": "Chian-v0"}, {"env.kwargs": {"length": 1}}):
        with pytest.raises((ConfigError, EnvError)):
            small_train(tmp_path / "run", options=options)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cpu"):
            train(CHAIN, run_dir=tmp_path / "run", overrides=OPTIONS, device="cuda")
    with pytest.raises(ConfigError, match="seed"):
        small_train(tmp_path / "run", seed=-1)
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        small_train(tmp_path / "file" / "run")


def test_the_thread_count_is_the_recipe_s_while_training_and_the_process_s_afterwards(tmp_path, monkeypatch):
    counts = []

    def watched(*_, **__):
        counts.append(torch.get_num_threads())
        return [0.0], [1]

    monkeypatch.setattr("worldmodel.agents.training.callback.evaluate", watched)
    small_train(tmp_path / "run", 10, options={"train.threads": 2, "train.prefill": 50})
    assert counts == [2] and torch.get_num_threads() == 1


def test_scalars_go_into_the_run_folder_and_a_resume_repeats_none(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"log.tensorboard": True, "log.every": 1}
    small_train(tmp_path / "run", 60, options=options)
    newest = tmp_path / "run" / "checkpoints" / "step-000000000060" / "world.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "run" / "result.json").unlink()
    small_train(tmp_path / "run", 80, options=options, resume=True)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    expected = {"eval/mean_reward", "rollout/ep_rew_mean", "world/loss/reward", "world/rate", "time/fps"}
    assert expected <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("eval/mean_reward")] == [25, 50, 75]
    steps = [e.step for e in events.Scalars("world/loss/reward")]
    assert steps == sorted(set(steps)) and max(steps) > 60


def test_a_task_that_never_ends_is_reported_at_the_start_and_evaluated_to_the_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "DEFAULT_MAX_STEPS", 30)
    logged = []
    result = small_train(tmp_path / "run", 60, "CliffWalking-v1", log=logged.append)
    assert any("eval.max_steps" in line and "30 steps" in line for line in logged)
    assert len(result.evaluations) == 2 and result.final_return <= -30
    options = {"eval.max_steps": 9}
    longer = small_train(tmp_path / "run", 75, "CliffWalking-v1", options=options, resume=True)
    assert -9 * 100 <= longer.final_return <= -9 and longer.evaluations[-1]["mean_return"] >= -9 * 100
    assert evaluate(Lefty(), CHAIN, episodes=2, max_steps=3)[1] == [3, 3]


def test_tiny_rewards_are_evaluated_as_they_are():
    gym.register("Tiny-v0", lambda: gym.wrappers.TransformReward(Nervous(), lambda reward: 1e-9), max_episode_steps=9)
    found = evaluate(Lefty(), "Tiny-v0", episodes=2)[0]
    assert found == pytest.approx([7e-9, 7e-9])


def test_a_run_too_short_for_one_sequence_is_refused_before_it_leaves_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"one sequence needs 32.*Raise --steps \(now 20\)"):
        train("cartpole", steps=20, run_dir=tmp_path / "run", overrides=["train.batch_length=32"])
    assert not (tmp_path / "run").exists()
