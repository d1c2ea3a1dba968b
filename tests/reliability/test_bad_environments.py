"""E2: whatever an environment does, the run works or ends with an EnvError that says where, and nothing invalid is stored."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from catalogue import times
from gymnasium import spaces

from worldmodel.errors import ConfigError, EnvError

LENGTH = 6
VECTOR = spaces.Box(-9, 9, (2,), np.float32)
SPACES = {
    "vector": VECTOR,
    "dict": spaces.Dict(arm=spaces.Dict(angle=VECTOR), gear=spaces.Discrete(3)),
    "category": spaces.Discrete(3),
    "pixels": spaces.Box(0, 1, (16, 16, 3), np.float32),
}


def leave() -> None:
    sys.exit(7)


def flood() -> None:
    for _ in range(20):
        print("talk " * 2000)
        os.write(1, b"and below Python " * 500)


NAN, INF = np.float32(np.nan), np.float32(np.inf)
ENDED = (EnvError, "environment 1, episode 3, step 3: ")
WORKS = (None, "")


def step(said: str, of: Any, form: str = "vector") -> tuple:
    """A step whose result `of(obs)` makes: a whole tuple, or an observation."""
    return form, {"step": of}, (ENDED[0], ENDED[1] + said)


def in_reset(said: str) -> tuple:
    return EnvError, f"environment 1, episode 3, step 0: {said}"


def reward(said: str, value: Any) -> tuple:
    return step(said, lambda obs: (obs, value, False, False, {}))


# name: (form of its observations, {what is done wrong: how}, (error, what it says))
BAD: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "raises in step": step("step raised ZeroDivisionError", lambda obs: 1 // 0),
    "raises in reset": ("vector", {"reset": lambda obs: 1 // 0}, in_reset("reset raised")),
    "raises in close": ("vector", {"close": lambda: 1 // 0}, WORKS),
    "sys.exit": step(r"step called sys.exit\(7\)", lambda obs: leave()),
    "sys.exit in close": ("vector", {"close": leave}, WORKS),
    "NaN": step("observation 'obs' holds NaN", lambda obs: obs * NAN),
    "infinity": step("observation 'obs' holds NaN or infinity", lambda obs: obs + INF),
    "NaN under a key": step("observation 'arm.angle' holds NaN", lambda obs: {**obs, "arm": {"angle": VECTOR.low * NAN}}, "dict"),
    "missing key": step(r"observation 'obs' has missing keys \['gear'\]", lambda obs: {"arm": obs["arm"]}, "dict"),
    "extra key": step(r"observation 'obs' has .* extra keys \['leg'\]", lambda obs: {**obs, "leg": 1}, "dict"),
    "no dict": step("observation 'obs' is an array", lambda obs: VECTOR.low, "dict"),
    "shape": step("observation 'obs' is an array of shape", lambda obs: np.zeros(3, np.float32)),
    "wider dtype": ("vector", {"step": lambda obs: obs.astype(np.float64)}, WORKS),
    "narrower dtype": ("vector", {"step": lambda obs: obs.astype(np.float16)}, WORKS),
    "objects": step(r"observation 'obs' is an array of shape \(2,\), dtype object", lambda obs: obs.astype(object)),
    "list": ("vector", {"step": lambda obs: obs.tolist()}, WORKS),
    "nothing seen": step("observation 'obs' is None", lambda obs: (None, 1.0, False, False, {})),
    "no category": step("observation 'obs' is 3; expected a category", lambda obs: 3, "category"),
    "fractional category": step("observation 'obs' is 1.5", lambda obs: 1.5, "category"),
    "too bright": ("pixels", {"step": lambda obs: obs + 7}, (EnvError, "environment 1, episode .* 'obs' holds .*outside")),
    "vector out of bounds": ("vector", {"step": lambda obs: obs + 99}, WORKS),
    "one buffer for all": ("vector", {"buffer": True}, WORKS),
    "space changes": step("observation 'obs' is an array of shape", lambda obs: spaces.Box(-1, 1, (5,)).sample()),
    "reward NaN": reward("the reward is nan", float("nan")),
    "reward infinite": reward("the reward is -inf", -np.inf),
    "reward 1e39": reward("the reward is 1e\\+39", 1e39),
    "reward 1e38": ("vector", {"step": lambda obs: (obs, 1e38, False, False, {})}, WORKS),
    "reward array": ("vector", {"step": lambda obs: (obs, np.ones(1), False, False, {})}, WORKS),
    "reward bool": ("vector", {"step": lambda obs: (obs, True, False, False, {})}, WORKS),
    "reward none": reward("the reward is None", None),
    "old 4-tuple": step("step returned a tuple of 4", lambda obs: (obs, 1.0, False, {})),
    "step gives nothing": step("step returned None", lambda obs: None),
    "info is a list": step("info is a list", lambda obs: (obs, 1.0, False, False, [])),
    "flag is a number": step("'terminated' is 0.5", lambda obs: (obs, 1.0, 0.5, False, {})),
    "reset without info": ("vector", {"reset": lambda obs: obs}, in_reset("reset returned")),
    "reset with a NaN": ("vector", {"reset": lambda obs: (obs * NAN, {})}, in_reset(".* holds NaN")),
    "ends at once": ("vector", {"length": 1}, WORKS),
    "ignores the seed": ("vector", {"deaf": True}, WORKS),
    "floods stdout": ("vector", {"step": lambda obs: flood() or obs}, WORKS),
    "never ends": ("vector", {"length": 10**9}, WORKS),
}  # fmt: skip
DEADLY = {
    "aborts": step(r"its process is gone \(SIGABRT\)", lambda obs: faulthandler.disable() or os.abort()),
    "hangs": step("no answer to 'step' within 1 s", lambda obs: time.sleep(600)),
}
"""Errors that end or block the process."""


class Bad(gym.Env):
    """Episodes of six steps that terminate and are truncated in turn; the reward is a sixth of the step.

    The one whose first seed is 1, so number 1 of a run with seed 0, does what `BAD` says in the third step of its third episode.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, name: str):
        form, self.wrong, _ = {**BAD, **DEADLY}[name]
        self.observation_space = SPACES[form]
        self.length = self.wrong.get("length", LENGTH)
        self.episode, self.first = 0, None
        self.buffer = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=None if "deaf" in self.wrong else seed)
        self.first = seed if self.first is None else self.first
        self.episode, self.steps = self.episode + 1, 0
        if self.first == 1 and self.episode == 3 and "reset" in self.wrong:
            return self.wrong["reset"](self._observe())
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        over, even = self.steps == self.length, self.episode % 2 == 0
        good = self._observe(), self.steps / LENGTH, over and even, over and not even, {}
        if self.first == 1 and (self.episode, self.steps) == (3, 3) and "step" in self.wrong:
            result = self.wrong["step"](good[0])
            whole = result is None or (isinstance(result, tuple) and len(result) > 3)
            return result if whole else (result, *good[1:])
        return good

    def close(self):
        self.wrong.get("close", lambda: None)()

    def _observe(self):
        if "buffer" not in self.wrong:
            self.observation_space.seed(100 * self.episode + self.steps)
            return self.observation_space.sample()
        self.buffer += 0.01
        return self.buffer


gym.register("Bad-v0", Bad)
NOTHING_LEARNED = {"train.prefill": 1000, "checkpoint.every": 0, "eval.every": 0, "eval.episodes": 1, "env.num_envs": 2}


def run(folder: Path, name: str, steps: int = 60, resume: bool = False, **options: Any):
    from small_runs import small_train  # here, so that processes of environments need not load what trains

    options = {**NOTHING_LEARNED, "env.kwargs": {"name": name}, **options}
    return small_train(folder, steps, f"{__name__}:Bad-v0", options=options, resume=resume)


def failing(name: str) -> bool:
    """Whether it fails in training, and where it acts."""
    return BAD[name][2][1].startswith("environment 1, episode 3, step")


def invalid_rows(folder: Path) -> int:
    """Stored rows that are not of their space or not finite, that end without an end, or end the world where it did not."""
    from worldmodel.storage.run import Run

    opened = Run.open(folder)
    replay, spec = opened.replay(), opened.agent().obs_spec
    invalid = 0
    for number in range(replay.num_envs):
        rows = replay.stream(number)
        try:
            spec.check({key: x[0].numpy() for key, x in rows.obs.items()})
        except EnvError:
            invalid += 1
        first, last, terminal, rewards = (x[0].numpy() for x in (rows.is_first, rows.is_last, rows.is_terminal, rows.reward))
        invalid += int((~first & ~(rewards > 0)).sum())  # no real step has a reward of 0
        invalid += int((~np.isfinite(rewards)).sum()) + int((first[1:] & ~last[:-1]).sum()) + int((last[:-1] & ~first[1:]).sum())
        invalid += int((terminal & (rewards < 1) & (opened.config.env.kwargs["name"] != "ends at once")).sum())
        if opened.config.env.kwargs["name"] == "one buffer for all":
            invalid += int((np.diff(rows.obs["obs"][0, :, 0].numpy()) < 0.005).sum())  # each observation adds 0.01
    return invalid


def cut_rows(folder: Path) -> tuple[int, int]:
    """(episodes of environment 1 that were cut before their sixth step, those of them that are terminal), the open one left out."""
    from worldmodel.storage.run import Run

    rows = Run.open(folder).replay().stream(1)
    cut = (rows.is_last & (rows.reward < 1))[0, :-1]
    return int(cut.sum()), int((cut & rows.is_terminal[0, :-1]).sum())


def test_bad_environments_work_or_are_named_and_store_no_invalid_row(tmp_path, figure, capfd, monkeypatch):
    """Teeth: without CheckedEnv most of them are not named, and NaN and 1e39 reach the replay; without its copies the last
    observation of "one buffer for all" is the next episode's first."""
    monkeypatch.setattr("worldmodel.agents.evaluation.DEFAULT_MAX_STEPS", 100)
    unnamed, invalid, resumed, again = [], 0, 0, 0
    for i, (name, (_, _, (error, said))) in enumerate(BAD.items()):
        folder = tmp_path / str(i)
        if error is None:
            assert run(folder, name).real_steps == 60
        else:
            with pytest.raises(error) as caught:
                run(folder, name)
            unnamed += [] if re.match(said, str(caught.value)) else [f"{name}: {caught.value}"]
            invalid += invalid_rows(folder)
            if failing(name) and i % times(3, 1) == 0:
                resumed, again = resumed + 1, again + (run(folder, name, resume=True).real_steps == 60)
        invalid += invalid_rows(folder)
    rows = f"{invalid} ill rows stored"
    figure("E2", f"{len(BAD)} bad environments: {rows}, {len(unnamed)} unnamed errors, {again} of {resumed} resumed")
    assert (invalid, unnamed, again) == (0, [], resumed)


def test_with_restarts_a_failure_is_a_truncation_and_is_counted(tmp_path, figure, capfd, caplog):
    """Teeth: a `cut` that does not name the stream closes the sibling's episode too; a step stored in spite of its mark is a
    row whose reward is 0."""
    from worldmodel.storage.run import Run

    failed = [name for name in BAD if failing(name)][:: times(3, 1)]
    counted = terminal = invalid = 0
    for i, name in enumerate(failed):
        folder, said = tmp_path / str(i), BAD[name][2][1]
        caplog.clear()
        assert run(folder, name, **{"env.restarts": 1, "env.restart_window": 30.0}).real_steps == 60
        assert any(re.match(said, record.getMessage()) for record in caplog.records), name
        opened = Run.open(folder)
        counted += opened.read(opened.checkpoints[-1])[1]["counters"]["restarts"]
        cut, ended = cut_rows(folder)
        assert cut == (0 if "reset" in name else 1), name
        assert opened.replay().stream(0).is_last.sum() == 5, name
        terminal, invalid = terminal + ended, invalid + invalid_rows(folder)
    rows = f"{terminal} of the cuts terminal, {invalid} ill rows stored"
    figure("E2", f"{len(failed)} failed and were made anew: {counted} counted, {rows}")
    assert (counted, terminal, invalid) == (len(failed), 0, 0)


@pytest.mark.parametrize("name", list(DEADLY)[: times(1, 2)])
def test_a_process_that_fails_in_a_run_is_replaced(tmp_path, name, caplog):
    """Teeth: without the timeout "hangs" takes ten minutes; an abort in this process would end the tests."""
    from worldmodel.storage.run import Run

    options = {"env.vectorize": "subproc", "env.timeout": 1.0, "env.restarts": 1}
    assert run(tmp_path / "run", name, **options).real_steps == 60
    assert any(re.match(DEADLY[name][2][1], record.getMessage()) for record in caplog.records)
    assert cut_rows(tmp_path / "run") == (1, 0) and invalid_rows(tmp_path / "run") == 0
    assert Run.open(tmp_path / "run").replay().stream(0).is_last.sum() == 5


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_none_is_refused(tmp_path, limit):
    with pytest.raises(ConfigError, match=r"env\.max_episode_steps"):
        run(tmp_path / "run", "never ends", **{"env.max_episode_steps": limit})


def test_what_never_ends_works_with_a_limit(tmp_path):
    run(tmp_path / "run", "never ends", **{"env.max_episode_steps": LENGTH})
    assert invalid_rows(tmp_path / "run") == 0
