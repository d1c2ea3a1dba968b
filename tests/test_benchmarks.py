"""Rows say which code made them, stale ones are marked and measured again, and the newest one counts rather than the best."""

from __future__ import annotations

import json
from pathlib import Path

import baselines
import control
import environments
import numpy as np
import plug_in
import pytest
import readme
import rows
import scoreboard
from compared import _kept
from stable_baselines3.common.callbacks import BaseCallback

from worldmodel.agents.comparison.plan import Plan
from worldmodel.agents.comparison.table import Comparison
from worldmodel.config import Config
from worldmodel.storage import rows as storage


def written(folder: Path, *measured: tuple[int, str | None]) -> None:
    """Rows of one key: (what was measured, its code; "now": of this tree)."""
    lines = [{"key": {"seed": 0}, "x": x, "where": {"code": rows.code() if of == "now" else of}} for x, of in measured]
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_carries_a_hash_that_any_change_of_the_code_changes(tmp_path):
    parts = {folder: tmp_path / folder for folder in rows.CODE}
    for folder in rows.CODE:
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "file.py").write_text("x = 1\n")
    seen = [storage._hash(parts)]
    for folder in rows.CODE:
        (tmp_path / folder / "deep" / "file.py").write_text("x = 2\n")
        seen.append(storage._hash(parts))
    (tmp_path / "envs/deep/file.py").rename(tmp_path / "envs/deep/other.py")
    seen.append(storage._hash(parts))
    assert len(set(seen)) == len(seen)
    (tmp_path / "envs/__pycache__").mkdir()
    (tmp_path / "envs/__pycache__/other.pyc").write_bytes(b"x")
    (tmp_path / "agents/deep/file.py").write_text('"""What it is."""\n\nx = 2  # two\n\n"""And what for."""\n')
    assert storage._hash(parts) == seen[-1]  # caches and what only people read change no figure
    (tmp_path / "agents/deep/file.py").write_text('x = 2\ny = """no docstring"""\n')
    assert storage._hash(parts) != seen[-1]


def test_rows_that_are_missing_are_measured_and_those_that_fail_are_counted(tmp_path):
    def work(key):
        if key["seed"] == 2:
            raise rows.Failed("no result")
        return {"x": 10 * key["seed"]}

    for at_once in (1, 2):
        found = rows.Rows("some", tmp_path)
        assert found.measure([{"seed": seed} for seed in range(3)], work, summary=str, at_once=at_once) == 1
        assert [row["x"] for row in rows.Rows("some", tmp_path)] == [0, 10]
        assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 2  # nothing is measured twice


def test_a_row_of_other_code_is_marked_and_measured_again(tmp_path):
    for of, is_stale in (("now", False), ("0123456789abcdef", True), (None, True)):
        written(tmp_path, (1, of))
        found = rows.Rows("some", tmp_path)
        assert found.has({"seed": 0}) is not is_stale
        text = rows.table(["x"], [[rows.marked(row["x"], [row])] for row in found])
        assert (rows.STALE in text) is (rows.LEGEND in text) is is_stale


def test_of_equal_keys_the_newest_of_this_code_counts_and_never_the_better_one(tmp_path):
    for measured, counts in (
        ([(500, None), (1250, "now"), (1000, "old")], 1250),
        ([(500, "old"), (2000, None)], 2000),
        ([(500, "now"), (1250, "now")], 1250),
    ):
        written(tmp_path, *measured)
        assert [row["x"] for row in rows.Rows("some", tmp_path)] == [counts]


def test_a_row_that_the_code_changed_under_is_stale_at_once(tmp_path, monkeypatch):
    found = rows.Rows("some", tmp_path)
    assert not rows.stale(found.add({"seed": 0}, {"x": 1}, threads=1))
    monkeypatch.setattr(storage, "_hash", lambda: "changed")
    assert rows.stale(found.add({"seed": 1}, {"x": 1}, threads=1))


def test_a_comparison_takes_the_best_of_any_result_file_and_says_where_ranges_overlap(tmp_path):
    def put(file, solved, **key):
        for seed, at in enumerate(solved):
            row = {"solved_at": at, "threshold": 0.9, "where": {"code": rows.code()}}
            row["key"] = {**key, "seed": seed} if "row" in key else {"overrides": [], "max_steps": None, **key, "seed": seed}
            with (tmp_path / f"{file}.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def said():
        return control.comparisons(control.grouped(rows.Rows("control", tmp_path)), tmp_path)

    put("control", [None, None, None], task="catch", algorithm="random")
    put("control", [6000, 8500], task="catch", algorithm="worldmodel")
    assert said() == ["catch: 7,250 real steps, random (control) -, 3 seeds"]
    put("plug_in", [3000, 4000, 4000], row="catch-encoder", side="naturecnn")
    put("plug_in", [100], row="catch-encoder", side="encoder")  # not one without a world model
    assert said() == ["catch: 1.81 x the real steps of dqn on 2 frames (plug_in), 3 seeds"]
    put("control", [900, 800], task="pendulum", algorithm="worldmodel")
    put("plug_in", [3000, 2000], task="sac-pendulum", algorithm="sac")
    put("plug_in", [700, 1300], task="dyna-pendulum", algorithm="sac, 10 updates/step")
    put("plug_in", [500], task="dyna-pendulum", algorithm=control.DYNA_ROW)
    best = "sac, 10 updates/step (plug_in, dyna-pendulum), 2 seeds"
    assert said()[0] == f"pendulum: 0.85 x the real steps of {best}; their ranges overlap"


def test_a_comparison_says_how_many_fresh_seeds_returned_what_was_promised():
    def found(returns):
        made = [{"key": {"form": "vae", "seed": seed}, "figures": {"return": x}} for seed, x in returns.items()]
        return Comparison(Plan("pendulum"), "Pendulum-v1", tuple(returns), tuple(made))

    (said,) = _kept(found({0: -200.0, 1: -210.0, 2: -190.0}), found({4: -500.0, 3: -205.0}))
    assert said.startswith(
        "Trained afterwards on seeds 3, 4, `model=vae` has return -205, -500: 1 of 2 within the -250 to -150 that 3 seeds"
    )


class Seen(BaseCallback):
    """The observation space that a baseline learns from."""

    def _on_step(self) -> bool:
        self.shape = self.model.observation_space.shape
        return True


def test_baselines_of_a_task_that_one_frame_does_not_tell_see_stacked_frames_and_update_as_often_as_ours():
    config = Config.from_recipe("catch", ["eval.episodes=2", "eval.every=8"])
    learned = [name for name in control.TASKS["catch"].baselines if name != "random"]
    assert learned
    for name in learned:
        variants = control.variants(config, name, config.train.ratio)
        assert [control.updates_per_step(variant) for variant in variants] == [None, config.train.ratio]
        seen = Seen()
        result = baselines.run(config, name, 0, config.train.ratio, 16, 60, [seen], {"learning_starts": 4, "buffer_size": 50})
        assert sorted(seen.shape) == [6, 64, 64]
        assert [row["real_steps"] for row in result["evaluations"]] == [8, 16] and result["updates"] == 5


def test_the_scoreboard_compares_with_the_best_rival_and_counts_who_never_arrives():
    def row(env, algorithm, seed, solved, *returns):
        evaluations = [{"real_steps": step, "mean_return": x} for step, x in returns]
        made = {"solved_at": solved, "evaluations": evaluations, "final_return": returns[-1][1], "threshold": 100.0}
        return {
            **made,
            "key": {"env": env, "algorithm": algorithm, "seed": seed, "max_steps": None},
            "where": {"code": rows.code()},
        }

    made = [row("CartPole-v1", "random", 0, None, (0, 0.0))]
    made += [row("CartPole-v1", scoreboard.OURS, seed, 400 + 100 * seed, (400 + 100 * seed, 100.0)) for seed in range(3)]
    made += [row("CartPole-v1", "ppo", seed, 5000, (2000, 50.0), (2500, 90.0)) for seed in range(3)]
    made += [row("CartPole-v1", "dqn", seed, None, (2000, 80.0), (2500, 20.0)) for seed in range(3)]
    made += [row("Acrobot-v1", "random", 0, None, (0, 0.0)), row("Acrobot-v1", scoreboard.OURS, 0, None, (5000, 50.0))]
    made += [row("Acrobot-v1", "ppo", 0, 9000, (9000, 100.0)), row("Acrobot-v1", "dqn", 0, 8000, (8000, 100.0))]
    groups = scoreboard.by_run(made)
    assert scoreboard.beside_rivals(groups) == {"CartPole-v1": ("ppo", 0.1), "Acrobot-v1": ("dqn", float("inf"))}
    assert scoreboard.return_at(made[4], 2499) == 50.0 and scoreboard.return_at(made[4], 2500) == 90.0
    assert scoreboard.return_at(made[1], 2000) == 100.0  # where it ended
    ours, theirs = scoreboard.scores(groups, scoreboard.OURS), scoreboard.scores(groups, "rival")
    assert [x.tolist() for x in ours] == [[1.0, 1.0, 1.0], [0.5]] and [x.tolist() for x in theirs] == [[0.5, 0.5, 0.5], [1.0]]
    assert scoreboard.verdict(groups)[:3] == [
        "CartPole-v1: 0.10 x the real steps of ppo",
        "Acrobot-v1: dqn wins, we never reach the threshold",
        "Fewer real steps in 1 of 2 environments; median ratio -.",
    ]
    only = scoreboard.by_run([*made[:4], *made[7:10]])
    assert scoreboard.verdict(only)[0] == "CartPole-v1: only we reach the threshold, dqn never does"


def test_the_interval_of_an_interquartile_mean_is_a_point_where_seeds_agree_and_holds_it_where_they_do_not():
    assert scoreboard.interquartile([np.ones(3), np.ones(2)]) == (1.0, 1.0, 1.0)
    mean, low, high = scoreboard.interquartile([np.array([0.0, 0.2, 0.4, 1.0]), np.array([0.5, 0.7])])
    assert mean == pytest.approx((0.2 + 0.4 + 0.5 + 0.7) / 4) and low < mean < high


def test_the_scoreboard_trains_without_the_recipe_that_an_id_has():
    job = {"env": "CartPole-v1", "algorithm": scoreboard.OURS, "seed": 0, "max_steps": 40, "max_minutes": 1, "verbose": False}
    result = scoreboard.work(job)
    assert result["real_steps"] == 40 and result["updates"] == 0  # recipe `cartpole` begins after 100 steps, the default after 500
    assert set(scoreboard.algorithms("Pendulum-v1")) >= {scoreboard.OURS, "random", "sac", "crossq", "tqc"}


def test_a_baseline_that_normalises_acts_on_normalised_observations(monkeypatch):
    config = Config.from_recipe({"env": {"id": "CartPole-v1"}}, ["eval.episodes=1", "eval.every=64"])
    shown = []
    made = baselines.Baseline(baselines.PPO, 64, {"n_steps": 32, "batch_size": 32, "n_epochs": 1}, num_envs=2, normalises=True)
    monkeypatch.setitem(baselines.BASELINES, ("CartPole-v1", "ppo"), made)
    predict = baselines.PPO.predict
    monkeypatch.setattr(baselines.PPO, "predict", lambda self, obs, *rest: shown.append(obs) or predict(self, obs, *rest))
    baselines.run(config, "ppo", 0, None, None, 60)
    assert np.abs(np.concatenate(shown)).max() > 1  # CartPole's first observations are within 0.05


def test_an_algorithm_beats_random_where_it_does_by_the_stated_margin_in_every_seed_it_was_tried():
    def row(algorithm, seed, real, same=True, **more):
        key = {"row": "algorithms", "recipe": "cartpole", "algorithm": algorithm, "seed": seed, **more}
        return {"key": key, "real_return": real, "loaded acts the same": same, "where": {"code": rows.code()}}

    made = [row("random", seed, 20.0 + seed) for seed in range(3)]
    made += [row("ppo", seed, real, imagined=100) for seed, real in enumerate((71.0, 500.0, 70.9))]
    made += [row("dqn", 0, 9.0, same=False, imagined=100)]
    assert [(group["algorithm"], group["said"]) for group in plug_in.judged(made)] == [
        ("random", ""),
        ("ppo", "runs, saves and loads; beats random by 50 in 2 of 3 seeds"),
        ("dqn", "a loaded one DIFFERS; beats random by 50 in 0 of 1 seeds"),
    ]
    assert [group["said"] for group in plug_in.judged(made[3:5])] == ["runs, saves and loads"]


def test_tables_in_readme_and_docs_say_what_the_rows_say():
    assert readme.differing(readme.declared()) == []
    text = "".join((readme.ROOT / name).read_text() for name in readme.FILES)
    assert sorted(found[2] for found in readme.BLOCK.finditer(text)) == sorted(
        [*readme.BLOCKS, "made", "made", "truth"]
    )  # these on two pages


def test_the_check_fails_where_readme_differs_from_rows_or_quotes_a_stale_one_unmarked(tmp_path, monkeypatch):
    def row(code, solved):
        key = {"task": "pendulum", "algorithm": "worldmodel", "seed": 0, "overrides": [], "max_steps": None}
        made = {"code": code, "when": "2026-01-02T00:00:00+00:00"}
        return {"key": key, "solved_at": solved, "wall_seconds": 9, "threshold": -200, "final_return": -150, "where": made}

    def look(of):
        return [line.partition(":")[0] for line in readme.differing(of, tmp_path, tmp_path)]

    def write(of):
        for file, (_, text) in readme.written(of, tmp_path, tmp_path).items():
            file.write_text(text)
        return (tmp_path / "README.md").read_text()

    monkeypatch.setattr(readme, "FILES", ("README.md",))
    (tmp_path / "README.md").write_text("".join(f"<!-- figures: {name} -->\n<!-- /figures -->\n" for name in ("made", "control")))
    made = tmp_path / "control.jsonl"
    now, later = "a" * 16, "b" * 16
    made.write_text(json.dumps(row(now, 750)) + "\n")
    assert look(now) == ["README.md, made", "README.md, control"]
    text = write(now)
    assert readme.declared(tmp_path) == now and "| `pendulum` | 1/1 | 750 | 9.0 |" in text and look(now) == []
    (tmp_path / "README.md").write_text(text.replace("750", "500"))
    assert look(now) == ["README.md, control"]
    (tmp_path / "README.md").write_text(text)
    assert look(later) == ["README.md, made", "README.md, control"]  # stale, and not marked
    marked = write(later)
    assert "| `pendulum` † |" in marked and "other code" in marked and look(later) == []
    assert readme.declared(tmp_path) == readme.NONE and look(readme.NONE) == []  # whatever the tree's code is
    with made.open("a") as file:
        file.write(json.dumps(row(later, 2000)) + "\n")
    assert look(later) == ["README.md, made", "README.md, control"]  # the newest counts, better or not
    assert "| `pendulum` | 1/1 | 2,000 |" in write(later)


def test_rivals_see_an_environment_by_their_own_wrapper_where_one_is_named():
    entry = scoreboard.BOARD["MiniGrid-DoorKey-5x5-v0"]
    ours, theirs = entry.overrides(scoreboard.OURS), entry.overrides("ppo")
    assert "env.ignore=[mission,direction]" in ours and f"env.wrappers=[{scoreboard.FLAT}]" not in ours
    assert f"env.wrappers=[{scoreboard.FLAT}]" in theirs and set(ours) - {"env.ignore=[mission,direction]"} < set(theirs)
    lake = scoreboard.BOARD["FrozenLake-v1"]
    assert lake.overrides("dqn") == lake.overrides(scoreboard.OURS)


def test_the_command_of_every_environment_by_name_is_understood_and_its_row_says_what_was_typed(tmp_path):
    assert len(environments.OPTIONS) >= 30
    for name, given in environments.OPTIONS.items():
        config = Config.from_recipe({"env": {"id": name}}, given)
        assert config.env.id == name
        words = environments.line(name)
        assert words[:2] == ["train", name] and words[-2:] == ["--steps", "500"]
    row = {"key": {"env": "MiniGrid-MemoryS7-v0", "seed": 0}, "return": -0.25, "steps": 500, "updates": 75, "seconds": 61.4}
    options = "`'env.ignore=[mission,direction]' model=dreamer`"
    assert environments.cells(row) == ["MiniGrid, BabyAI", "MiniGrid-MemoryS7-v0", options, "-0.25", "500", "75", "61"]
    gone = {**row, "key": {"env": "Gone-v0", "seed": 0}}
    first = {**row, "key": {"env": "CartPole-v1", "seed": 0}}
    assert environments.in_order([row, gone, first]) == [first, row]
