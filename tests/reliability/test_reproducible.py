"""The same seed gives the same run: in another process, in another folder, whoever else draws random numbers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from children import in_child
from small_runs import small_train

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.callback import env_seed
from worldmodel.storage.run import Run

STEPS = 70
OPTIONS = {"train.ratio": 1.0, "train.ema_decay": 0.9, "eval.every": 0, "eval.episodes": 1, "checkpoint.every": 30}
SHOWN = {"log.tensorboard": True, "log.pictures": 35, "log.held_out": 2, "log.every": 1, "eval.every": 30}
WORKERS = {"env.num_envs": 3, "env.vectorize": "subproc", "env.kwargs": {"seconds": 0.02}}


class Dawdling(gym.Env):
    """A walk that is pushed at random; each step takes up to some seconds, so that workers finish in any order."""

    action_space, observation_space = gym.spaces.Discrete(3), gym.spaces.Box(-9, 9, (3,), np.float32)

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.normal(size=3), 0
        return self.at.astype(np.float32), {}

    def step(self, action):
        time.sleep(self.seconds * os.urandom(1)[0] / 255)
        self.at = np.clip(0.9 * self.at + 0.3 * self.np_random.normal(size=3) + np.eye(3)[action] - 0.3, -9, 9)
        self.steps += 1
        return self.at.astype(np.float32), float(self.at[0]), bool(self.at[1] > 2), self.steps >= 15, {}


gym.register("Dawdling-v0", entry_point="test_reproducible:Dawdling")


# In the child -----------------------------------------------------------------------------------------------------------


def global_states() -> str:
    """A hash of the random generators that all code of a process shares."""
    states = random.getstate(), [str(x) for x in np.random.get_state()], torch.get_rng_state().tolist()
    return hashlib.sha256(repr(states).encode()).hexdigest()


def stir(seed: int) -> None:
    """Puts them where no fresh process has them."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    random.random(), np.random.normal(size=3), torch.rand(5)


def hashes(job: dict[str, Any]) -> dict[str, str]:
    """Trains; a hash of each thing that must be the same the next time."""
    metrics: list[dict[str, float]] = []
    update = WorldModelAlgorithm.update

    def told(agent: WorldModelAlgorithm, improve: bool = True) -> dict[str, float]:
        metrics.append(update(agent, improve))
        return metrics[-1]

    WorldModelAlgorithm.update = told
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            result = small_train(
                run, STEPS, "test_reproducible:Dawdling-v0", options={**OPTIONS, **job["options"]}, seed=job["seed"]
            )
            tensors, state, _ = Run.open(run).read()
            found = {name: digest(arrays) for name, arrays in tensors.items()}
            replay = Run.open(run).replay()
            rows = [replay.stream(i) for i in range(replay.num_envs)]
            found["replay"] = digest(
                {f"{i}/{n}": x for i, row in enumerate(rows) for n, x in {**vars(row), **row.obs}.items() if torch.is_tensor(x)}
            )
    finally:
        WorldModelAlgorithm.update = update
    found["state"] = hashlib.sha256(json.dumps({**state, "config": None}, sort_keys=True).encode()).hexdigest()
    said = [sorted(row.items()) for row in metrics], result.evaluations, result.final_return
    found["metrics"] = hashlib.sha256(repr(said).encode()).hexdigest()
    return {**found, "updates": str(len(metrics))}


def digest(arrays: dict[str, Any]) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        whole.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    return whole.hexdigest()


def child(job: dict[str, Any]) -> dict[str, Any]:
    if job["stir"]:
        stir(job["stir"])
    before = global_states()
    found = [hashes(part) for part in job["parts"]]
    return {"found": found, "kept": global_states() == before}


# Tests ------------------------------------------------------------------------------------------------------------------


def test_two_processes_that_differ_in_all_but_the_seed_come_to_the_same_bits(tmp_path, figure):
    """Hash seed, folder, global random states and the order in which workers finish differ; the third run has another seed.

    Teeth: random actions of the prefill that come from `np.random`.
    """
    one, workers = {"seed": 3, "options": SHOWN}, {"seed": 3, "options": WORKERS}
    same_here = {"seed": 3, "options": {"env.num_envs": 3}}
    jobs = [
        {"stir": 0, "parts": [one, workers, {"seed": 4, "options": {}}]},
        {"stir": 77, "parts": [one, same_here]},
    ]
    results = []
    for i, job in enumerate(jobs):
        (folder := tmp_path / str(i)).mkdir()
        results.append(in_child(__file__, job, cwd=folder, PYTHONHASHSEED=str(i)))
    (first, parallel, other), (again, in_turn) = (result["found"] for result in results)
    assert first == again
    assert parallel == in_turn
    for name in ("world", "agent", "optim", "replay", "metrics"):
        assert first[name] != other[name], name
    assert [result["kept"] for result in results] == [True, True]
    updates = f"{first['updates']} and {parallel['updates']} updates"
    figure(
        "D1",
        f"2 processes, 1 and 3 environments, {updates}: weights, optimisers, replay and metrics equal, of another seed not",
    )


def test_a_draw_from_a_global_generator_would_be_seen(monkeypatch):
    before = global_states()
    assert global_states() == before
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        seen = global_states()
        draw()
        assert global_states() != seen


def test_no_environment_of_a_run_gets_a_seed_twice_however_often_it_is_resumed(figure):
    """Teeth: `env_seed` that returns seed + step."""
    envs, resumes = np.arange(64), [*range(0, 500, 50), *range(1_000, 101_000, 5_000)]
    seeds = np.array([[env_seed(seed, step) + envs for step in resumes] for seed in range(100)])
    within = [seeds[0].size - len(np.unique(mine)) for mine in seeds]
    assert within == [0] * 100
    for greatest in (seeds.max(), 2**32 + 62):
        gym.utils.seeding.np_random(int(greatest))
        gym.spaces.Dict({"a": gym.spaces.Discrete(3), "b": gym.spaces.Box(0, 1)}).seed(int(greatest))
    fresh, later = seeds[:, 0], seeds[:, 1:]
    shared, later_shared = fresh.size - len(np.unique(fresh)), later.size - len(np.unique(later))
    figure(
        "D1",
        f"100 seeds x 64 environments x {len(resumes)} starts: 0 environment seeds repeat within a run; across runs {shared:,} of "
        f"{fresh.size:,} do at their first start (environment i gets seed + i), {later_shared} of {later.size:,} behind it",
    )


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
