"""One whole update as `train` runs it: drawn from the replay, world model, actor and critic; ours, and sheeprl's in turn.

    python benchmarks/throughput.py                                       # ours alone
    python benchmarks/throughput.py --peers DIR --peer-python VENV/bin/python
    python benchmarks/throughput.py --obs vector --threads 1 --options compile,bf16
    python benchmarks/throughput.py --print

Size S: recurrent state, width and hidden layers of 256, 16 x 16 latents, two-layer perceptrons, convolutions from 24 channels, 255
bins; 2 actions; 4 floats or 64x64x3 pixels; 16 sequences of 64 steps, 15 imagined steps from all 1,024 states, fp32.
The replay holds random episodes. The peer's update starts from a batch in memory, ours from the replay. Every
measurement is a fresh process, ours and the peer's take turns, samples under foreign load are taken again.

GEMM is the rate of a 1024 x 1024 matrix product in the same process; the lower bound is the update's arithmetic (matrix products
and convolutions, as torch counts them) at that rate. DIR holds `peer_dreamer_torch.py`, which prints one JSON object per run; VENV
has sheeprl installed (README.md). `--options` measures what an option of `train` changes, in a row of its own each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from rows import Key, Row, Rows, call, command, marked, options, script, table, timed, words
from tables import number, spread

SIZE_S = [
    "model=dreamer",
    "size=medium",
    "model.transition.kind=categorical",
    "model.transition.units=256",
    "model.heads.bins=255",
    "agent.bins=255",
    "agent.horizon=15",
    "agent.starts=null",
    "train.batch_size=16",
    "train.batch_length=64",
]
OPTIONS = {"fp32": [], "compile": ["train.compile=true"], "bf16": ["train.precision=bf16"]}
EXPERIENCE = 4000
"""Random steps in the replay."""


class Noise(gym.Env):
    """Random observations and reward 1; an episode ends at each step with probability 0.02."""

    def __init__(self, pixels: bool):
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8) if pixels else spaces.Box(-10, 10, (4,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self._draw(), 1.0, bool(self.np_random.random() < 0.02), False, {}

    def _draw(self) -> np.ndarray:
        space = self.observation_space
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape, np.uint8)
        return self.np_random.standard_normal(space.shape).astype(np.float32)


# Ours, in a process of its own ------------------------------------------------------------------------------------------


def work(job: Row) -> Row:
    """Milliseconds of one update and of its halves, GEMM rate, arithmetic and parameters."""
    if "train.compile=true" in job["overrides"]:  # as long as at a new user's first update
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    agent = filled_agent(job["obs"] == "pixel", job["threads"], job["overrides"])
    marks: list[float] = []
    inner = agent.learner.update

    def timestamped(*args: Any) -> Any:
        result = inner(*args)
        marks.append(time.perf_counter())
        return result

    agent.learner.update = timestamped
    started = time.perf_counter()
    agent.update()
    first = time.perf_counter() - started
    halves: list[tuple[float, float]] = []

    def update() -> None:
        start = time.perf_counter()
        agent.update()
        halves.append((1000 * (marks[-1] - start), 1000 * (time.perf_counter() - marks[-1])))

    sampled = timed(update, job["samples"], 0.3, job["seconds"], warmup=1)
    agent.learner.update = inner
    split = {name: statistics.median(half[i] for half in halves[1:]) for i, name in enumerate(("world_ms", "agent_ms"))}
    gflop = {} if job["overrides"] else arithmetic(agent)  # a compiled step hides its products from the count
    modules = {"world": agent.world, "actor": agent.controller.actor, "critic": agent.controller.critic}
    parameters = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in modules.items()}
    return {**sampled, **split, "first_update_s": first, "gemm_gflops": gemm(), **gflop, "parameters": parameters}


def filled_agent(pixels: bool, threads: int, overrides: list[str]) -> Any:
    """A Dreamer of size S that has collected random experience and has not learned yet."""
    from worldmodel.agents import Dreamer

    # The prefill lasts longer than the collecting: every action is random, and nothing is compiled before the first update.
    collect = [f"train.prefill={2 * EXPERIENCE}", f"train.capacity={EXPERIENCE}", "train.pretrain=0", "train.ratio=0"]
    config = [*SIZE_S, *collect, f"train.threads={threads}", *overrides]
    agent = Dreamer("CnnPolicy" if pixels else "MlpPolicy", Noise(pixels), config=config, seed=0, device="cpu")
    return agent.learn(EXPERIENCE, log_interval=None)


def arithmetic(agent: Any) -> dict[str, float]:
    """GFLOP of one update's matrix products and convolutions, and of the world model's share."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as world:
        agent.update(improve=False)
    with FlopCounterMode(display=False) as whole:
        agent.update()
    return {"gflop": whole.get_total_flops() / 1e9, "world_gflop": world.get_total_flops() / 1e9}


def gemm(n: int = 1024) -> float:
    """GFLOP/s of an fp32 matrix product: the best of 7 samples, since foreign load only slows it."""
    a, b = torch.rand(n, n), torch.rand(n, n)
    out = torch.empty(n, n)
    return 2 * n**3 / 1e6 / min(timed(lambda: torch.mm(a, b, out=out), 7, 0.15, 3.0)["ms"])


# The rows -------------------------------------------------------------------------------------------------------------


def pair(args: argparse.Namespace, key: Key) -> Row:
    """Ours, and what it is compared with (the peer, or for an option ours without it), in turn."""
    obs, threads, option = key["obs"], key["threads"], key["option"]
    job = {"obs": obs, "threads": threads, "samples": args.samples, "seconds": args.seconds}
    ours, without, peers = [], [], []
    for _ in range(args.rounds):
        ours.append(call(__file__, {**job, "overrides": OPTIONS[option]}, threads, 600 + 4 * args.seconds))
        if option != "fp32":
            without += call(__file__, {**job, "overrides": []}, threads, 600 + 4 * args.seconds)["ms"]
        elif args.peers is not None:
            peers.append(peer(args, obs, threads))
    row = {**ours[0], "ms": [ms for one in ours for ms in one["ms"]]}
    for name in ("world_ms", "agent_ms", "first_update_s", "gemm_gflops"):
        row[name] = statistics.median(one[name] for one in ours)
    row["quiet"] = all(one["quiet"] for one in ours)
    row["foreign"] = max((one["foreign"] for one in ours if one["foreign"] is not None), default=None)
    if "gflop" in row:
        row["floor_ms"] = 1000 * row["gflop"] / row["gemm_gflops"]
    if without:
        row["without_ms"] = without
    if peers:
        row["peer"] = {
            **{name: peers[-1].get(name) for name in ("peer", "params", "split", "torch", "threads")},
            "rounds_ms": [one["update_ms"] for one in peers],
            "noise": [one.get("noise") for one in peers],
        }
    return row


def peer(args: argparse.Namespace, obs: str, threads: int) -> Row:
    """One run of the peer's script in the peer's own environment."""
    file = args.peers.resolve() / "peer_dreamer_torch.py"
    line = [str(args.peer_python.absolute()), str(file), "sheeprl", obs, "S", *(["1thread"] if threads == 1 else [])]
    return command(line, threads, 900, PYTHONDONTWRITEBYTECODE="1")


def peer_ms(row: Row) -> tuple[float, str]:
    """(median, `median [min..max]`) of the peer's milliseconds, over all rounds."""
    rounds = row["peer"]["rounds_ms"]
    middle = statistics.median(x["median"] for x in rounds)
    return middle, f"{number(middle)} [{number(min(x['min'] for x in rounds))}..{number(max(x['max'] for x in rounds))}]"


def report(rows: Iterable[Row]) -> str:
    """Milliseconds as median [min..max]; the peer's from its own samples over all rounds."""
    lines = []
    for row in sorted(rows, key=lambda row: json.dumps(row["key"])):
        key, ours, theirs, name = row["key"], statistics.median(row["ms"]), None, ""
        if "peer" in row:
            theirs, name = peer_ms(row)
            name = f"{row['peer']['peer']} {name}"
        elif "without_ms" in row:
            theirs, name = statistics.median(row["without_ms"]), f"fp32 eager {spread(row['without_ms'])}"
        first = f" (first {number(row['first_update_s'], 2)} s)" if key["option"] == "compile" else ""
        lines.append(
            [
                marked(f"{key['obs']} S, {key['threads']}t, {key['option']}{first}", [row]),
                spread(row["ms"]),
                f"{number(row['world_ms'])} + {number(row['agent_ms'])}",
                number(1000 / ours),
                name,
                "" if theirs is None else f"{theirs / ours:.2f} x",
                number(row["gemm_gflops"]),
                f"{number(row['floor_ms'])} ({ours / row['floor_ms']:.1f} x)" if "floor_ms" in row else "",
                _millions(row["parameters"].values()),
                _millions(row["peer"]["params"].values()) if "peer" in row else "",
                f"{row['foreign']}{'' if row['quiet'] else ' NOISY'}",
            ]
        )
    head = ["update", "ms", "world + agent", "updates/s", "beside", "faster", "GFLOP/s", "lower bound, ms", "parameters"]
    head += ["the peer's", "foreign"]
    return table(head, lines)


def _millions(counts: Iterable[int]) -> str:
    return " / ".join(f"{n / 1e6:.3f}" for n in counts) + " M"


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--obs", nargs="+", choices=["vector", "pixel"], default=["vector", "pixel"])
    parser.add_argument("--threads", type=int, nargs="+", default=[n for n in (2, 1) if n <= (os.cpu_count() or 1)])
    parser.add_argument("--options", type=words, default=[], help="separated by commas: compile, bf16")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of peer_dreamer_torch.py")
    parser.add_argument("--peer-python", type=Path, metavar="FILE", help="python of the peer's environment")
    parser.add_argument("--samples", type=int, default=5, help="quiet samples in each round")
    parser.add_argument("--rounds", type=int, default=2, help="how often ours and the peer take turns")
    parser.add_argument("--seconds", type=float, default=40.0, help="for quiet samples; then noisy ones count")
    args = parser.parse_args()
    if (args.peers is None) != (args.peer_python is None):
        parser.error("--peers and --peer-python belong together")
    if unknown := sorted(set(args.options) - set(OPTIONS)):
        parser.error(f"--options takes {', '.join(OPTIONS)}; not {', '.join(unknown)}")
    rows = Rows("throughput", args.results, args.again)
    peers = "sheeprl" if args.peers is not None else None
    keys = []
    for obs, threads, option in itertools.product(args.obs, args.threads, dict.fromkeys(["fp32", *args.options])):
        beside = peers if option == "fp32" else "fp32"
        keys.append({"obs": obs, "size": "S", "threads": threads, "option": option, "beside": beside})
    failed = 0 if args.print else rows.measure(keys, lambda key: pair(args, key), lambda key: key["threads"])
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
