"""Real steps until Catch is solved from 64x64 pixels: DQN on a pretrained encoder, and DQN on SB3's NatureCNN from scratch.

    python benchmarks/catch_encoder.py                     # all sides, seeds 0 1 2
    python benchmarks/catch_encoder.py --sides encoder --seeds 0
    python benchmarks/catch_encoder.py --print             # the table of what is there

All sides have the same algorithm, hyperparameters (`DQN_OPTIONS`) and observations, two stacked frames: one does not show
where the ball drifts. The first `learning_starts` steps are random. On the encoder's side the world model is
trained on those very steps when they are taken, `PRETRAIN` updates and none afterwards, so that every step that the encoder
saw is a real step of the run and counted. The third side, `cells`, is no picture at all but what perfect perception could give,
the cells of ball and paddle, one-hot: how fast could DQN learn from an encoder that has nothing left to learn?

Protocol as in control.py: 20 greedy episodes with environment seeds 10000.. every 500 real steps, solved at the first
evaluation whose mean is at least 0.9 and whose confirmation, 20 episodes with seeds 20000.., is too. Seconds are of training
alone. Each run has a process and one thread of its own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from baselines import BASELINES, StackedProtocol
from control import came
from gymnasium import spaces
from rows import Load, Rows, marked, median, number, options, spread, table
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack

import worldmodel as wm
from worldmodel.agents import JointWorldModel, latent_policy_kwargs
from worldmodel.agents.evaluation import FINAL_SEED
from worldmodel.config import Config
from worldmodel.envs.make import make_vec
from worldmodel.envs.tiny import BALL, CELL, PADDLE

SIDES = ("encoder", "naturecnn", "cells")
BASELINE = BASELINES["worldmodel.envs:Catch-v0", "dqn on 2 frames"]
FRAMES, STEPS, SECONDS = BASELINE.frames, BASELINE.steps, 3600
DQN_OPTIONS: dict[str, Any] = {name: x for name, x in BASELINE.options.items() if name != "policy_kwargs"}
POLICY: dict[str, Any] = BASELINE.options["policy_kwargs"]
OUTPUT, FINE_TUNED, PRETRAIN = "embedding", True, 600
WORLD = {"train.batch_size": 8, "train.batch_length": 8}


def cells(pictures: np.ndarray) -> np.ndarray:
    """Pictures [N, 64, 64, 3] of Catch -> one-hot row and column of the ball, column of the paddle, float32 [N, 24]."""
    middles = pictures[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
    ball, paddle = ((middles == colour).all(-1) for colour in (BALL, PADDLE))
    hidden = ~paddle.any((1, 2))  # behind the ball that it caught
    paddle[hidden] = ball[hidden]
    return np.concatenate([ball.any(2), ball.any(1), paddle.any(1)], 1).astype(np.float32)


class Cells(VecEnvWrapper):
    """Catch, seen as its cells."""

    def __init__(self, venv: VecEnv):
        super().__init__(venv, observation_space=spaces.Box(0, 1, (24,), np.float32))

    def reset(self) -> np.ndarray:
        return cells(self.venv.reset())

    def step_wait(self) -> tuple:
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = cells(info["terminal_observation"][None])[0]
        return cells(obs), rewards, dones, infos


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One run of {"side", "seed", "max_steps"}: keys as of `worldmodel train --json`, and encoder_steps."""
    config, seed = Config.from_recipe("catch", ["agent=random"]), job["seed"]
    single = make_vec(config.env, 1, seed)
    plain = job["side"] == "cells"
    seen = Cells(single) if plain else single
    venv = VecFrameStack(seen, FRAMES)
    kwargs, callbacks = dict(POLICY), []
    if job["side"] == "encoder":
        world = wm.WorldModel.from_spaces(single.observation_space, single.action_space, config.model, seed)
        kwargs |= latent_policy_kwargs(world, "joint", output=OUTPUT, frames=FRAMES)
        first = {"train.prefill": DQN_OPTIONS["learning_starts"], "train.pretrain": PRETRAIN}
        callbacks = [JointWorldModel(world, ratio=0.0, rl_gradients=FINE_TUNED, config={**WORLD, **first}, seed=seed)]
    model = DQN("MlpPolicy" if plain else "CnnPolicy", venv, policy_kwargs=kwargs, seed=seed, device="cpu", **DQN_OPTIONS)
    see = {"space": seen.observation_space, "frames": FRAMES, "see": cells if plain else np.asarray}
    protocol = StackedProtocol(config, job["max_steps"], SECONDS, **see)
    since = time.perf_counter()
    with Load() as load:
        model.learn(STEPS, callback=CallbackList([*callbacks, protocol]))
    wall = time.perf_counter() - since - protocol.eval_seconds
    final = float(np.mean(protocol.measure(FINAL_SEED)))
    return {
        "real_steps": model.num_timesteps,
        "encoder_steps": DQN_OPTIONS["learning_starts"] if callbacks else 0,
        "updates": model._n_updates,
        "encoder_updates": callbacks[0].agent.learner.updates if callbacks else 0,
        "wall_seconds": wall,
        "eval_seconds": protocol.eval_seconds,
        "threshold": protocol.goal,
        "solved_at": protocol.solved_at,
        "final_return": final,
        "evaluations": protocol.evaluations,
        "stopped": protocol.stopped,
        "foreign": load.cores,
    }


# All of them ----------------------------------------------------------------------------------------------------------


def measure(args: Any, rows: Rows) -> int:
    """Runs what is missing, one after the other; gives the number of runs that failed."""
    keys = [{"row": "catch-encoder", "side": side, "seed": seed} for side in args.sides for seed in args.seeds]
    return rows.measure(__file__, [(key, {**key, "max_steps": args.max_steps}, 1) for key in keys], 2 * SECONDS, came)


def report(rows: Rows) -> str:
    """One line for each side: medians over seeds, [least..greatest]; then the share of the real steps."""
    by = {side: [row for row in rows if row["key"].get("row") == "catch-encoder" and row["key"]["side"] == side] for side in SIDES}
    lines = []
    for side, found in by.items():
        solved = [row["solved_at"] for row in found]
        if found:
            count = f"{sum(x is not None for x in solved)}/{len(solved)}"
            returns, seconds = [row["final_return"] for row in found], [row["wall_seconds"] for row in found]
            name, own = marked(side, found), found[0]["encoder_steps"]
            lines.append([name, count, spread(solved, 1), own, spread(seconds, 1), spread(returns, 2)])
    head = ["side", "solved", "real steps", "of them the encoder's own", "seconds", "final return"]
    text = table(head, lines)
    if by["encoder"] and by["naturecnn"]:
        ours, theirs = (median(row["solved_at"] for row in by[side]) for side in ("encoder", "naturecnn"))
        text += f"\n\nencoder: {number(ours, 1)} real steps, NatureCNN {number(theirs, 1)}"
        text += f", {ours / theirs:.2f} of them" if max(ours, theirs) < float("inf") else ""
    return text


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        print(json.dumps(run(json.loads(sys.argv[2])), allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=STEPS, help="ends every run there")
    parser.add_argument("--print", action="store_true", help="only the table")
    args = parser.parse_args()
    rows = Rows("plug_in", args.results, args.again)
    failed = 0 if args.print else measure(args, rows)
    print(report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
