"""Memory and disk: a long run does not grow, a resumed one takes no more, and a replay may be larger than the memory."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from catalogue import times
from children import in_child, memory
from small_runs import CHAIN, small_train
from stable_baselines3.common.callbacks import BaseCallback

from worldmodel.agents.training.session import make_agent
from worldmodel.config import Config
from worldmodel.storage import segments
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

KIB, MIB = 1024, 1 << 20
SAMPLES = 40
"""Samples of the memory of a process, while it grows."""


class Wide(gym.Env):
    """Pictures of noise (192 KiB each) in episodes of 50 steps."""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(0, 255, (256, 256, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.picture = 0, self.np_random.integers(0, 256, (256, 256, 3), np.uint8)
        return self.picture, {}

    def step(self, action):
        self.steps += 1
        return self.picture, 0.0, False, self.steps >= 50, {}


gym.register("Wide-v0", entry_point="test_memory:Wide")


# M1: growth -------------------------------------------------------------------------------------------------------------


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """The median of the slopes between all pairs of points: no outlier moves it."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def growth(steps: list[int], kib: list[int]) -> tuple[float, float]:
    """(KiB a step, MiB in all) over the samples behind the first quarter, in which caches fill."""
    x, y = (np.array(values[len(values) // 4 :], float) for values in (steps, kib))
    slope = theil_sen(x, y)
    return slope, slope * (x[-1] - x[0]) / KIB


def is_steady(slope: float, whole: float) -> bool:
    return slope <= 0.5 and whole <= 16


class MemorySamples(BaseCallback):
    """Memory, file descriptors and threads every so many steps."""

    def __init__(self, every: int):
        super().__init__()
        self.every, self.seen = every, []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.seen.append({"step": self.num_timesteps, **memory()})
        return True


def grow(job: dict[str, Any]) -> dict[str, Any]:
    """Trains a small Dreamer whose replay is full after a tenth of its steps."""
    agent = make_agent(small_config({"train.capacity": max(100, job["steps"] // 10), "train.ratio": 0.1}), 0, "cpu")
    samples = MemorySamples(job["steps"] // SAMPLES)
    agent.learn(job["steps"], samples, log_interval=4)
    agent.env.close()
    return {"seen": samples.seen, "updates": agent.learner.updates, "full": len(agent.replay) == agent.replay.capacity}


def small_config(options: dict[str, Any]) -> Config:
    from small_runs import merged

    return Config.from_recipe(CHAIN, merged(options))


def test_a_long_run_does_not_grow(figure):
    """Teeth: traces that are kept, here as a leak of 1 KiB a step on top of what was measured."""
    steps = times(2_400, 20_000)
    found = in_child(__file__, {"what": "grow", "steps": steps}, MALLOC_ARENA_MAX="2")
    at, resident = ([sample[name] for sample in found["seen"]] for name in ("step", "VmRSS"))
    slope, whole = growth(at, resident)
    settled = found["seen"][len(at) // 4 :]
    assert found["full"] and found["updates"] > steps / 11 and len(at) >= SAMPLES
    assert is_steady(slope, whole), list(zip(at, resident))
    assert not is_steady(*growth(at, [kib + step for step, kib in zip(at, resident)]))
    assert len({(sample["fds"], sample["threads"]) for sample in settled}) == 1
    figure(
        "M1",
        f"{steps:,} steps, {found['updates']:,} updates: {slope:.3f} KiB a step, {whole:.1f} MiB in all; files, threads constant",
    )


def cycle(job: dict[str, Any]) -> dict[str, Any]:
    """Builds, trains and closes an agent with its environments, again and again."""
    seen = []
    for seed in range(job["agents"]):
        agent = make_agent(small_config({"env.num_envs": 2, "env.vectorize": job["vectorize"]}), seed, "cpu")
        agent.learn(60)
        agent.env.close()
        del agent
        gc.collect()
        seen.append(memory())
    return {"seen": seen}


@pytest.mark.parametrize("vectorize", ["dummy", "subproc"][: times(1, 2)])
def test_agents_that_are_closed_leave_nothing_behind(vectorize, figure):
    """Teeth: a list that keeps all agents."""
    agents = times(6, 10)
    seen = in_child(__file__, {"what": "cycle", "vectorize": vectorize, "agents": agents}, MALLOC_ARENA_MAX="2")["seen"]
    assert len({(sample["fds"], sample["threads"]) for sample in seen[1:]}) == 1
    more = max(sample["VmRSS"] for sample in seen[2:]) / seen[1]["VmRSS"] - 1
    assert more <= 0.05
    figure("M1", f"{agents} agents built and closed ({vectorize}): {100 * more:+.1f} % of memory after the second")


# M2: resume -------------------------------------------------------------------------------------------------------------

PICTURES = {"agent": "random", "train.capacity": 1_050, "train.prefill": 10_000, "checkpoint.every": 250, "checkpoint.flush": 0}
PICTURES |= {"eval.every": 0, "eval.episodes": 1, "model.encoder.depth": 2, "model.decoder.depth": 2}
"""Nothing is learned, so that the replay is most of the memory."""


def pictures(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on pictures, or goes on with it; the largest memory."""
    small_train(Path(job["folder"]), job["steps"], "test_memory:Wide-v0", options=PICTURES, resume=job["resume"])
    return memory()


def test_a_resumed_run_takes_no_more_memory_than_an_unbroken_one(tmp_path, figure):
    """Teeth: a `Replay.load` that reads all segments before it puts their rows into the replay."""
    job = {"what": "pictures", "folder": str(tmp_path / "run")}
    whole = in_child(__file__, {**job, "steps": 1_075, "resume": False})["VmHWM"]
    resumed = in_child(__file__, {**job, "steps": 1_100, "resume": True})["VmHWM"]
    replay = Run.open(tmp_path / "run").replay()
    assert len(replay) == replay.capacity and replay.nbytes > 200e6
    peaks = f"peak {resumed / KIB:.0f} MiB resumed, {whole / KIB:.0f} MiB unbroken, x {resumed / whole:.2f}"
    figure("M2", f"replay of {replay.nbytes / MIB:.0f} MiB: {peaks}")
    assert resumed <= 1.1 * whole


# M3: a replay larger than the memory ------------------------------------------------------------------------------------

PICTURE = {"obs": ((64, 64, 3), np.uint8)}
STREAMS = 8


def larger(job: dict[str, Any]) -> dict[str, Any]:
    """Writes and samples a store on the disk with little memory; whether it would have fitted there, too."""
    resource.setrlimit(resource.RLIMIT_DATA, (job["limit"], job["limit"]))
    rows = job["store"] // (64 * 64 * 3) // STREAMS
    try:
        np.empty(job["store"], np.uint8)
        fits = True
    except MemoryError:
        fits = False
    replay, rng = Replay(rows * STREAMS, PICTURE, 2, STREAMS, Path(job["folder"])), np.random.default_rng(0)
    yes, no = np.ones(STREAMS, bool), np.zeros(STREAMS, bool)
    number, largest = np.zeros((STREAMS, 64, 64, 3), np.uint8), 0
    for row in range(rows):
        number[:, :2, 0] = [[row % 256] * 3, [row // 256] * 3]
        last = row % 50 == 49
        replay.add(
            {"obs": number}, np.zeros((STREAMS, 2)), np.zeros(STREAMS), yes if row % 50 == 0 else no, yes if last else no, no
        )
    milliseconds = []
    for _ in range(job["batches"]):
        since = time.perf_counter()
        batch = replay.sample(16, 32, rng, terminal_fraction=0.25)
        milliseconds.append(1000 * (time.perf_counter() - since))
        largest = max(largest, memory()["RssAnon"])
        seen = batch.obs["obs"].numpy()
        np.testing.assert_array_equal(seen[..., 0, 0, 0] + 256 * seen[..., 1, 0, 0].astype(int), batch.row.numpy() // STREAMS)
    return {"fits": fits, "anonymous": largest, "ms": milliseconds, "held": len(replay), **memory()}


def test_a_store_larger_than_the_memory_is_written_and_sampled(tmp_path, figure):
    """Teeth: the same store in memory, or a buffer that keeps what it has written."""
    store, limit = (times(300, 1536) * MIB, times(512 - 100, 512) * MIB)
    job = {"what": "larger", "store": store, "limit": limit, "batches": times(200, 2_000), "folder": str(tmp_path)}
    found = in_child(__file__, job, MALLOC_ARENA_MAX="2")
    held = found["held"] * 64 * 64 * 3
    assert not found["fits"] and held > 0.99 * store
    assert found["anonymous"] <= 400 * KIB
    middle, late = statistics.median(found["ms"]), float(np.percentile(found["ms"], 99))
    figure(
        "M3",
        f"store of {store // MIB} MiB, {limit // MIB} MiB of data: {len(found['ms']):,} batches, anonymous memory "
        f"{found['anonymous'] / KIB:.0f} MiB, median {middle:.1f} ms, p99 {late:.1f} ms a batch",
    )


# M4: the disk -----------------------------------------------------------------------------------------------------------


class Long(gym.Env):
    """A kilobyte of noise at each of 25 steps."""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(-9, 9, (256,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(256, np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.random(256, np.float32), 0.0, False, self.steps >= 25, {}


gym.register("Long-v0", entry_point=Long)


def most_bytes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[int]:
    """Bytes of the replay on the disk behind each file that is written: only then they grow."""
    found, write = [], segments.write

    def counted(*args: Any) -> int:
        seal = write(*args)
        found.append(sum(file.stat().st_size for file in (folder / "replay").iterdir()))
        return seal

    monkeypatch.setattr(segments, "write", counted)
    return found


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_many_times_the_capacity_take_little_more_of_the_disk_than_one(tmp_path, monkeypatch, figure, place):
    """Checkpoints at a tenth, experience at a twentieth of the capacity. Teeth: snapshots that go on naming evicted segments."""
    capacity, row, filled = 400, 256 * 4 + 2 * 4 + 4 + 1, times(4, 10)
    monkeypatch.setattr(segments, "MAX_BYTES", capacity * row // 20)
    monkeypatch.setattr("os.fsync", lambda handle: None)  # what is tested is how much is there, not when it is safe
    options = {"agent": "random", "train.replay": place, "train.capacity": capacity, "train.prefill": 10**5, "eval.every": 0}
    options |= {"eval.episodes": 1, "checkpoint.every": capacity // 10, "checkpoint.flush": capacity // 20}
    found = most_bytes(monkeypatch, tmp_path / "run")
    small_train(tmp_path / "run", filled * capacity, f"{__name__}:Long-v0", options=options)
    assert Run.open(tmp_path / "run").replay().added > filled * capacity
    assert len(found) > 15 * filled
    limit = 1.2 * capacity * row + 2 * segments.MAX_BYTES
    most = max(found) / (capacity * row)
    figure("M4", f"{filled} x the capacity, replay in {place}: at most {most:.2f} of its bytes on the disk")
    assert max(found) <= limit


WORK: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "grow": grow,
    "cycle": cycle,
    "pictures": pictures,
    "larger": larger,
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(WORK[job["what"]](job)))
