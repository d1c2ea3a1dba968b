"""Does each environment train, by one line of command? 500 real steps, few updates, then an evaluation.

    python benchmarks/environments.py                          # all
    python benchmarks/environments.py --only Taxi-v4 Ant-v5
    python benchmarks/environments.py --print                  # the table of what is there

The line is `worldmodel train ID OPTIONS train.prefill=200 train.ratio=0.2 eval.episodes=5 --steps 500`. It says that an environment
can be trained, and nothing of how well: 500 steps are few. Return: of five greedy episodes of the best evaluated agent.
Environments whose package is not installed are left out, and said.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from rows import Failed, Key, Row, Rows, call, marked, options, script, table

from worldmodel.storage.run import RESULT

STEPS = 500
SHORT = "train.prefill=200", "train.ratio=0.2", "eval.episodes=5"
MINIGRID = "env.ignore=[mission,direction]", "model=dreamer"
ATARI = "env.kwargs={frameskip: 1}", "env.wrappers=[{gymnasium.wrappers:AtariPreprocessing: {screen_size: 64}}]"
MUJOCO = (
    *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum", "Pusher"),
    *("Reacher", "Swimmer", "Walker2d"),
)
GRIDS = (
    *("MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-8x8-v0", "MiniGrid-DoorKey-5x5-v0", "MiniGrid-MemoryS7-v0", "MiniGrid-FourRooms-v0"),
    *("MiniGrid-LavaGapS5-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0", "MiniGrid-Unlock-v0", "BabyAI-GoToRedBallGrey-v0"),
)
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "Classic control": (
        (),
        dict.fromkeys(("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"), ()),
    ),
    "Toy text": (
        (),
        dict.fromkeys(("Blackjack-v1", "CliffWalking-v1", "FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4"), ()),
    ),
    "Box2D": (
        ("Box2D",),
        {
            **dict.fromkeys(("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3"), ()),
            "CarRacing-v3": ("env.action_repeat=4",),
        },
    ),
    "MuJoCo": (("mujoco",), dict.fromkeys((f"{name}-v5" for name in MUJOCO), ())),
    "MiniGrid, BabyAI": (("minigrid",), dict.fromkeys(GRIDS, MINIGRID)),
    "Atari": (("ale_py", "cv2"), dict.fromkeys(("ALE/Pong-v5", "ALE/Breakout-v5", "ALE/Freeway-v5"), ATARI)),
    "highway-env": (("highway_env",), dict.fromkeys(("highway_env:highway-fast-v0", "highway_env:merge-v0"), ())),
    "Gymnasium-Robotics": (
        ("gymnasium_robotics",),
        dict.fromkeys(("gymnasium_robotics:PointMaze_UMaze-v3", "gymnasium_robotics:AntMaze_UMaze-v5"), ()),
    ),
    "Shimmy (dm_control)": (
        ("shimmy", "dm_control"),
        dict.fromkeys((f"shimmy:dm_control/{name}-v0" for name in ("cartpole-balance", "cheetah-run", "walker-walk")), ()),
    ),
}
"""{family: (the modules that it needs, {id: options})}."""
OPTIONS = {name: given for _, ids in FAMILIES.values() for name, given in ids.items()}


def line(name: str) -> list[str]:
    """The words after `worldmodel`."""
    return ["train", name, *OPTIONS[name], *SHORT, "--steps", str(STEPS)]


def work(job: Row) -> Row:
    """One command, as typed in a shell."""
    with tempfile.TemporaryDirectory() as folder:
        run, started = Path(folder) / "run", time.perf_counter()
        words = [sys.executable, "-m", "worldmodel", *line(job["env"]), "--seed", str(job["seed"]), "--run", str(run)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
        seconds = round(time.perf_counter() - started, 1)
        if done.returncode:
            raise Failed(f"{' '.join(words[3:])} ended with {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    return {"return": result["final_return"], "steps": result["real_steps"], "updates": result["updates"], "seconds": seconds}


HEAD = ["family", "environment", "options", "return", "real steps", "updates", "seconds"]


def cells(row: Row) -> list[str]:
    """Family, id, options and what came of it."""
    name = row["key"]["env"]
    family = next(family for family, (_, ids) in FAMILIES.items() if name in ids)
    options = f"`{shlex.join(OPTIONS[name])}`" if OPTIONS[name] else ""
    return [family, name, options, f"{row['return']:.4g}", str(row["steps"]), str(row["updates"]), f"{row['seconds']:.0f}"]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows of the environments that are still listed, in their order."""
    by_id = {row["key"]["env"]: row for row in rows}
    return [by_id[name] for name in OPTIONS if name in by_id]


def report(rows: Rows) -> str:
    """A line for each environment."""
    lines = [[marked(first, [row]), *rest] for row in in_order(rows) for first, *rest in [cells(row)]]
    return table(HEAD, lines)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    args = parser.parse_args()
    rows = Rows("environments", args.results, args.again)

    def run(key: Key) -> Row:
        return call(__file__, key, 1, 600)

    missing = {family: module for family, (modules, _) in FAMILIES.items() for module in modules if find_spec(module) is None}
    for family, module in missing.items():
        print(f"left out: {family}, whose module {module} is not installed")
    there = {name for family, (_, ids) in FAMILIES.items() if family not in missing for name in ids}
    keys = [{"env": name, "seed": 0} for name in args.only if name in there]
    failed = 0 if args.print else rows.measure(keys, run, lambda key: 1)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
