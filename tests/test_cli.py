"""The command line: exit codes, one JSON object, messages that say what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CHAIN, Nervous, small_train, words

from worldmodel.cli import app
from worldmodel.storage.run import Run

TRAIN_KEYS = (
    "env_id recipe seed threads real_steps updates wall_seconds eval_seconds parameters "
    "threshold solved_at final_return evaluations run final_episodes final_step newest_return best"
).split()
EVAL_KEYS = "env_id run step episodes seed mean_return std_return returns lengths".split()
INFO_KEYS = "env_id observation_space action_space parts parameters checkpoints".split()


@pytest.fixture
def command(capfd):
    """Runs the command in this process: (exit code, stdout, stderr), file descriptors included."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            app([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture(autouse=True)
def _calm():
    Nervous.steps = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, small_train(folder, 40)


def only_object(out):
    """The one JSON object that stdout holds."""
    assert out.endswith("\n") and out.count("\n") == 1, out
    return json.loads(out)


def test_help_and_import_load_no_torch():
    code = (
        "import sys, worldmodel, worldmodel.agents, worldmodel.cli\n"
        "try: worldmodel.cli.app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'stable_baselines3', 'gymnasium', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in "--run --seed --steps --device --data --resume --keep-newer --json".split():
        assert flag in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--episodes", 1],
        ["dream", "--horizon", 2],
        ["what-if", "--plan", "0x2"],
        ["diagnose", "--slot", "marginal"],  # has none: an error behind the opening, which is as good here and quick
        ["fit-prior", "--kind", "none"],
    ],
    ids=lambda words: words[0],
)
def test_a_run_is_opened_with_as_many_threads_as_it_was_trained_with(trained, command, words):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        name, *options = words
        code, _, err = command(name, trained[0], *options)
        assert torch.get_num_threads() == trained[1].threads == 1 and code == (2 if name in ("diagnose", "fit-prior") else 0), err
    finally:
        torch.set_num_threads(before)


def test_the_public_names_resolve():
    import worldmodel
    import worldmodel.agents

    for package in (worldmodel, worldmodel.agents):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            getattr(package, "nothing")  # noqa: B009 -- not a name of the package
    assert callable(worldmodel.train)


def test_train_prints_one_object_whatever_the_environment_prints(command, tmp_path):
    options = words({"env.kwargs": {"noisy": True}})
    code, out, err = command("train", "Nervous-v0", *options, "--steps", 30, "--run", tmp_path / "run", "--seed", 3, "--json")
    result = only_object(out)
    assert code == 0 and list(result) == TRAIN_KEYS
    assert (result["real_steps"], result["seed"], result["env_id"]) == (30, 3, "Nervous-v0")
    assert list(result["evaluations"][0]) == ["real_steps", "mean_return", "std_return", "episodes"]
    assert "an environment that talks" in err and "one that talks below Python" in err
    assert "step 25/30" in err  # a plain line for each evaluation where there is no terminal


def test_without_json_a_table_shows_the_evaluations_and_the_result(command, tmp_path):
    code, out, _ = command("train", CHAIN, *words(), "--steps", 30, "--run", tmp_path / "run")
    assert code == 0 and "real steps" in out and "final_return" in out and "{" not in out


def test_a_terminal_gets_a_progress_bar(tmp_path):
    ours, theirs = pty.openpty()
    args = [sys.executable, "-m", "worldmodel", "train", CHAIN, *words(), "--steps", "60", "--run", str(tmp_path / "run"), "--json"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:  # the terminal's other end is gone
            pass
        assert only_object(process.stdout.read())["real_steps"] == 60
    os.close(ours)
    assert process.returncode == 0 and b"steps/s" in seen and b"60/60" in seen


def test_a_signal_to_the_process_ends_it_with_its_code_and_resume_goes_on(tmp_path, command):
    args = ["train", CHAIN, *words({"train.ratio": 0.01, "eval.every": 0}), "--run", str(tmp_path / "run"), "--json"]
    full = [sys.executable, "-m", "worldmodel", *args, "--steps", "1000000"]
    with subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("checkpoints/step-*20")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out == "" and "SIGTERM" in err and "--resume" in err and "Traceback" not in err
    reached = Run.open(tmp_path / "run").checkpoints[-1]
    assert f"real step {reached}," in err
    code, _, err = command(*args, "--steps", 999_999, "--resume")
    assert code == 2 and "train.steps: 1000000 -> 999999" in err
    run = Run.open(tmp_path / "run", write=True)
    run.write_config(run.config.override({"train.steps": reached + 5}))
    run.close()
    code, out, err = command(*args, "--resume")
    assert code == 0 and only_object(out)["real_steps"] == reached + 5 and f"goes on at real step {reached}" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_other_signals_have_their_codes(command, tmp_path, number, code):
    options = words({"env.kwargs": {"at": 21, "signals": [int(number)]}})
    got, out, err = command("train", "Nervous-v0", *options, "--run", tmp_path / "run")
    assert got == code and out == "" and "saved in" in err
    assert Run.open(tmp_path / "run").checkpoints[-1] == 21


def test_a_finished_run_prints_its_result_again(command, trained):
    folder, result = trained
    code, out, err = command("train", CHAIN, "--run", folder, "--resume", "--json")
    assert code == 0 and only_object(out) == result.to_json() and "is finished" in err


def test_eval_repeats_the_final_return_and_writes_an_animation(command, trained, tmp_path):
    folder, result = trained
    code, out, _ = command("eval", folder, "--episodes", 2, "--video", tmp_path / "new" / "first.gif", "--json")
    value = only_object(out)
    assert code == 0 and list(value) == EVAL_KEYS
    assert (value["mean_return"], value["step"], value["seed"]) == (result.final_return, result.final_step, 30_000)
    assert value["mean_return"] == np.mean(value["returns"]) and len(value["lengths"]) == 2
    with Image.open(tmp_path / "new" / "first.gif") as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(gif.info["duration"])
        assert gif.size == (280, 22 + 56) and sum(frames) == 250 * value["lengths"][0]
    older = only_object(command("eval", folder, "--episodes", 1, "--step", 25, "--seed", 7, "--json")[1])
    assert (older["step"], older["seed"]) == (25, 7)


def test_eval_refuses_other_videos(command, trained, tmp_path):
    code, _, err = command("eval", trained[0], "--video", tmp_path / "first.webm")
    assert code == 2 and ".gif" in err and not (tmp_path / "first.webm").exists()


def test_a_missing_extra_is_named(command, tmp_path, monkeypatch):
    small_train(tmp_path / "run", 5, "CartPole-v1", options={"eval.every": 0})
    monkeypatch.setitem(sys.modules, "pygame", None)
    code, _, err = command("eval", tmp_path / "run", "--episodes", 1, "--video", tmp_path / "a.gif")
    assert code == 2 and "worldmodel[render]" in err and "Traceback" not in err


def test_info_describes_a_run_and_a_recipe(command, trained):
    of_run = only_object(command("info", trained[0], "--json")[1])
    assert list(of_run) == INFO_KEYS and of_run["checkpoints"] == [25, 40] and of_run["env_id"] == CHAIN
    assert of_run["parameters"] == trained[1].parameters and of_run["parts"]["dynamics"] == "rssm"
    assert of_run["action_space"] == "Discrete(2)"
    of_recipe = only_object(command("info", CHAIN, "--json")[1])
    assert list(of_recipe) == INFO_KEYS and of_recipe["checkpoints"] == [] and of_recipe["parts"]["agent"] == "dreamer"
    code, out, _ = command("info", CHAIN)
    assert code == 0 and "Discrete(2)" in out


def test_recipes_are_listed(command):
    from worldmodel.config import list_recipes

    code, out, _ = command("recipes", "--json")
    assert code == 0 and [(r["name"], r["env_id"], r["description"]) for r in only_object(out)["recipes"]] == list_recipes()
    assert command("recipes")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "words_of_it"),
    [
        (["CartPole-v1", "model.dynamics.detr=8"], 2, ["model.dynamics.detr", "Did you mean 'deter'?"]),
        (["CartPole-v1", "train.batch_size=many"], 2, ["train.batch_size"]),
        (["CartPole-v1", "fast"], 2, ["key=value"]),
        (["CartPoel-v1"], 2, ["CartPole"]),
        (["cartpol"], 2, ["cartpole"]),
        (["Nervous-v0", "agent=dremer"], 2, ["dreamer"]),
        (["Nervous-v0", "train.capacity=5"], 2, ["train.capacity", "train.batch_length"]),
        (["Nervous-v0", "env.kwargs={at: 3, raises: true}"], 3, ["the simulator fell over", "environment 0, episode 1, step 3"]),
        (["Nervous-v0", "--run", "/proc/nothing/here"], 4, ["/proc/nothing"]),
        (["Nervous-v0", "--steps", "0"], 2, ["--steps"]),
        (["Nervous-v0", "--seed", "-1"], 2, ["--seed"]),
        (["Nervous-v0", "--nonsense"], 2, ["--nonsense"]),
        ([], 2, ["RECIPE_OR_GYM_ID"]),
    ],
)
def test_mistakes_have_exit_codes_and_messages(command, tmp_path, args, code, words_of_it):
    where = [] if "--run" in args else ["--run", tmp_path / "run"]
    got, out, err = command("train", *args, *where, "--json")
    assert (got, out) == (code, "") and "Traceback" not in err
    assert all(word in err for word in words_of_it), err


def test_cuda_is_refused_where_there_is_none(command, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = command("train", CHAIN, "--device", "cuda", "--run", tmp_path / "run")
    assert (code, out) == (2, "") and "device=cpu" in err and not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_with_the_flag_to_use(command, trained):
    code, out, err = command("train", CHAIN, *words(), "--run", trained[0], "--json")
    assert (code, out) == (2, "") and "--resume" in err


def test_damage_has_its_code(command, tmp_path):
    small_train(tmp_path / "run", 10)
    for file in (tmp_path / "run").glob("checkpoints/*/state.json"):
        file.write_bytes(b"{}")
    for args in (["eval", tmp_path / "run"], ["train", CHAIN, "--run", tmp_path / "run", "--steps", 20, "--resume"]):
        code, out, err = command(*args)
        assert (code, out) == (4, "") and "verifies" in err


def test_numerics_have_their_code(command, tmp_path, monkeypatch):
    from worldmodel.errors import NumericsError
    from worldmodel.learner import Learner

    def ill(*_):
        raise NumericsError("three updates in a row were skipped")

    monkeypatch.setattr(Learner, "update", ill)
    code, out, err = command("train", CHAIN, *words(), "--run", tmp_path / "run")
    assert (code, out, err.splitlines()[-1]) == (5, "", "error: three updates in a row were skipped")


def test_debug_shows_where_an_error_came_from(command):
    assert "Traceback" in command("train", "CartPoel-v1", "--debug")[2]


def test_what_is_no_run_is_refused(command, tmp_path):
    assert command("eval", tmp_path)[0] == 2
    assert command("info", tmp_path)[0] == 2


# Beside the user --------------------------------------------------------------------------------------------------------

OWN = """
import gymnasium as gym
from worldmodel.envs.tiny import Chain
gym.register("Own-v0", entry_point=Chain, max_episode_steps=9)
"""


SCRIPT = """
import json, os, sys
from worldmodel.cli import main

for words in json.loads(sys.argv[1]):
    sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    sys.modules.pop("own", None)
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        print(end.code or 0, flush=True)
"""


def test_an_environment_beside_the_user_is_trained_evaluated_dreamed_and_described(tmp_path):
    """As the console script, which unlike `python -m` does not put the current folder on the path."""
    (tmp_path / "own.py").write_text(OWN)
    commands = [
        ["train", "absent:Own-v0"],
        ["train", "own:Own-v0", *words({"eval.every": 0}), "--steps", "30", "--run", "run"],
        ["eval", "run", "--episodes", "1"],
        ["dream", "run", "--horizon", "3"],
        ["info", "run"],
    ]
    program = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    codes = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == [2, 0, 0, 0, 0], done.stderr
    assert f"absent.py in the current folder, {tmp_path}" in done.stderr


def test_the_line_of_a_stopped_run_is_the_whole_command_to_go_on(command, tmp_path):
    options = words({"env.kwargs": {"at": 21, "signals": [int(signal.SIGTERM)]}})
    run = tmp_path / "a run"
    code, _, err = command("train", "Nervous-v0", *options, "--run", run, "--steps", 30, "--device", "cpu")
    line = err.splitlines()[-1].strip()
    assert code == 143 and line.startswith("worldmodel train "), err
    code, out, err = command(*shlex.split(line)[1:], "--json")
    assert code == 0, err
    assert only_object(out)["real_steps"] == 30


def test_a_run_folder_stands_in_the_recipes_place_on_resume(command, tmp_path):
    small_train(tmp_path / "run", 30)
    code, out, _ = command("train", tmp_path / "run", "--resume", "--steps", 35, "--json")
    assert code == 0 and only_object(out)["real_steps"] == 35
    code, out, _ = command("train", tmp_path / "run", "--run", tmp_path / "run", "--resume", "--steps", 40, "--json")
    assert code == 0 and only_object(out)["real_steps"] == 40
    code, _, err = command("train", tmp_path / "run")
    assert code == 2 and "--resume" in err
    code, _, err = command("train", tmp_path / "run", "--run", tmp_path / "other", "--resume")
    assert code == 2 and "two run folders" in err


def test_the_package_says_its_version():
    import worldmodel

    assert worldmodel.__version__ == importlib.metadata.version("worldmodel")


def test_the_version_is_that_of_the_package(command):
    code, out, _ = command("--version")
    assert (code, out.strip()) == (0, importlib.metadata.version("worldmodel"))


def test_the_version_is_all_that_is_printed(command):
    code, out, _ = command("--version", "info", "cartpole")
    assert (code, out.strip()) == (0, importlib.metadata.version("worldmodel"))
