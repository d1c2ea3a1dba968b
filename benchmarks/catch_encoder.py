"""Real steps until Catch is solved from 64x64 pixels: DQN on a pretrained encoder, and DQN on SB3's NatureCNN from scratch.

    python benchmarks/catch_encoder.py                     # all sides, seeds 0 1 2
    python benchmarks/catch_encoder.py --sides encoder --seeds 0
    python benchmarks/catch_encoder.py --print             # the table of what is there

All sides have the same algorithm, hyperparameters (`DQN_OPTIONS`) and observations, two stacked frames: one does not show
where the ball drifts. The first `learning_starts` steps are random. On the encoder's side the world model is then trained on these
steps, `PRETRAIN` updates and none afterwards, so that all data of the encoder are real steps of the run. The third side, `cells`,
shows what perfect perception would give, the cells of ball and paddle, one-hot: how fast DQN learns from a perfect encoder.

Protocol as in control.py: 20 greedy episodes with environment seeds 10000.. every 500 real steps, solved at the first
evaluation whose mean is at least 0.9 and whose confirmation, 20 episodes with seeds 20000.., is too. Seconds are of training
alone. Each run has a process and one thread of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from baselines import BASELINES, Protocol, Stacked
from control import summary
from gymnasium import spaces
from rows import Load, Row, Rows, call, grouped, marked, options, script, table
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack
from tables import median, number, solved, spread

import worldmodel as wm
from worldmodel.agents import JointWorldModel, latent_policy_kwargs
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


def work(job: Row) -> Row:
    """One run of {"side", "seed", "max_steps"}: keys as of `worldmodel train --json`, and encoder_steps."""
    config, seed = Config.from_recipe("catch", ["agent=random"]), job["seed"]
    single = make_vec(config.env, 1, seed)
    plain = job["side"] == "cells"
    seen = Cells(single) if plain else single
    kwargs, callbacks = dict(POLICY), []
    if job["side"] == "encoder":
        world = wm.WorldModel.from_spaces(single.observation_space, single.action_space, config.model, seed)
        kwargs |= latent_policy_kwargs(world, "joint", output=OUTPUT, frames=FRAMES)
        first = {"train.prefill": DQN_OPTIONS["learning_starts"], "train.pretrain": PRETRAIN}
        callbacks = [JointWorldModel(world, ratio=0.0, rl_gradients=FINE_TUNED, config={**WORLD, **first}, seed=seed)]
    policy, venv = "MlpPolicy" if plain else "CnnPolicy", VecFrameStack(seen, FRAMES)
    model = DQN(policy, venv, policy_kwargs=kwargs, seed=seed, device="cpu", **DQN_OPTIONS)
    acting = partial(Stacked, space=seen.observation_space, frames=FRAMES, see=cells if plain else np.asarray)
    with Load() as load:
        result = Protocol(config, job["max_steps"], SECONDS, acting).learn(model, STEPS, callbacks)
    del result["parameters"]
    return {
        **result,
        "encoder_steps": DQN_OPTIONS["learning_starts"] if callbacks else 0,
        "encoder_updates": callbacks[0].agent.learner.updates if callbacks else 0,
        "foreign": load.cores,
    }


# All of them ----------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> str:
    """One line for each side: medians over seeds, [min..max]; then the share of the real steps."""
    by = grouped((row for row in rows if row["key"].get("row") == "catch-encoder"), lambda row: row["key"]["side"])
    lines = []
    for side in (side for side in SIDES if side in by):
        found = by[side]
        steps, seconds, returns = ([row[name] for row in found] for name in ("solved_at", "wall_seconds", "final_return"))
        cells = [spread(steps, 1), found[0]["encoder_steps"], spread(seconds, 1), spread(returns, 2)]
        lines.append([marked(side, found), solved(found), *cells])
    text = table(["side", "solved", "real steps", "of them the encoder's own", "seconds", "final return"], lines)
    if "encoder" in by and "naturecnn" in by:
        ours, theirs = (median(row["solved_at"] for row in by[side]) for side in ("encoder", "naturecnn"))
        text += f"\n\nencoder: {number(ours, 1)} real steps, NatureCNN {number(theirs, 1)}"
        text += f", {ours / theirs:.2f} of them" if max(ours, theirs) < float("inf") else ""
    return text


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--max-steps", type=int, default=STEPS, help="ends every run there")
    args = parser.parse_args()
    rows = Rows("plug_in", args.results, args.again)
    keys = [{"row": "catch-encoder", "side": side, "seed": seed} for side in args.sides for seed in args.seeds]
    run = lambda key: call(__file__, {**key, "max_steps": args.max_steps}, 1, 2 * SECONDS)  # noqa: E731
    failed = 0 if args.print else rows.measure(keys, run, summary=summary)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
