"""Goals reached in TwoRooms by planning in codes that were learned without reward and without a decoder.

    python benchmarks/two_rooms.py                                   # all variants, seed 0
    python benchmarks/two_rooms.py --variants sigreg --seeds 0 1 2 --device cuda
    python benchmarks/two_rooms.py --updates 1000 train.lr=5e-4      # dotted keys go over the recipe
    python benchmarks/two_rooms.py --print

The recipe two_rooms: 25,000 random actions, each of four environment steps and kept for three on average, reward unseen; then the
world model alone is trained on them. Evaluation: `--episodes` fresh episodes (environment seeds 30000..), start and goal in
different rooms, the goal known by its picture alone; at each step CEM with coloured noise searches for the least sum of squared
distances of imagined codes to the goal's. Success is arrival within 4 pixels in 25 actions.

Beside it, on the same goals: random actions as in the data, and the straight line to the goal, which knows both positions but
no wall. What the codes are worth is measured on 100 fresh random episodes (seeds 40000..):

rank     effective rank, exp of the entropy of the covariance's normalised eigenvalues (1: collapsed; Z: isotropic)
T        Epps-Pulley statistic over random directions of 512 codes: 1.05 if Gaussian, 206 if all are one
linear   R2 of the dot's position, by a linear probe; near: by the 5 nearest codes. near high and linear low: the code is folded
h1, h10  squared error of codes imagined 1 and 10 actions ahead, over that of standing still
line, way  rank correlation of the distance of codes with that of places: as the crow flies, and through the door
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from rows import Failed, Load, Rows, call, marked, options, say, spread, table

from worldmodel.agents.training.session import make_agent
from worldmodel.config import Config
from worldmodel.data import Batch, Sampling
from worldmodel.envs.make import make_env
from worldmodel.envs.tiny import TwoRooms
from worldmodel.objectives import epps_pulley

VARIANTS: dict[str, dict[str, Any]] = {
    "sigreg": {"model.objective.probe": False},
    "vicreg": {"model.objective.probe": False, "model.objective.anti_collapse": "vicreg", "train.scales.collapse": 4.0},
    "none": {"model.objective.probe": False, "model.objective.anti_collapse": "none", "model.objective.inverse": False},
    "hybrid": {"model": "hybrid", "train.scales.collapse": 10.0, "train.scales.inverse": 30.0},  # as sigreg, beside nats
}
PLAIN = ("random", "straight")
FRAMES = 4
"""Environment steps of one action, as in the recipe."""
GOALS, PROBE, SECONDS = 30_000, 40_000, 7200


# Reaching goals -------------------------------------------------------------------------------------------------------


def reach(config: Config, episodes: int, act: Any) -> list[int | None]:
    """Actions until each goal was reached, None for never; `act(envs, obs, first)` gives an action for each environment."""
    envs = [make_env(config.env) for _ in range(episodes)]
    opened = [env.reset(seed=GOALS + i) for i, env in enumerate(envs)]
    obs, goals = np.stack([o for o, _ in opened]), np.stack([info["goal_obs"] for _, info in opened])
    reached: list[int | None] = [None] * episodes
    open_ = set(range(episodes))
    step = 0
    while open_:
        actions = act(envs, obs, goals, step)
        step += 1
        for i in sorted(open_):
            obs[i], _, terminated, truncated, _ = envs[i].step(actions[i])
            reached[i] = step if terminated else None
            open_ -= {i} if terminated or truncated else set()
    return reached


def planned(agent: Any) -> Any:
    """Plans of all environments in one batch."""
    belief: Any = None

    def act(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
        nonlocal belief
        if not step:
            agent.set_goal(goals)
        action, belief = agent.predict(obs, belief, np.full(len(obs), not step), deterministic=True)
        return action

    return act


def straight(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
    """Towards the goal as if there were no wall, no faster than needed."""
    away = np.stack([env.unwrapped.goal - env.unwrapped.position for env in envs])
    stride = np.array([[env.unwrapped.speed * FRAMES] for env in envs])  # pixels of one action at full speed
    return (away / np.maximum(np.abs(away).max(1, keepdims=True), stride)).astype(np.float32)


def at_random(hold: float) -> Any:
    rng, held = np.random.default_rng(0), None

    def act(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
        nonlocal held
        fresh = rng.uniform(-1, 1, (len(envs), 2)).astype(np.float32)
        held = fresh if held is None else np.where(rng.random((len(envs), 1)) * hold < 1, fresh, held)
        return held

    return act


# What codes are worth -------------------------------------------------------------------------------------------------


def random_walks(config: Config, world: Any, episodes: int, length: int = 21) -> tuple[Batch, np.ndarray]:
    """(rows [N, L] on the model's device and scale, positions [N, L, 2]) of episodes that no goal ends."""
    env, rng = make_env(config.env), np.random.default_rng(PROBE)
    shown, places, actions = [], [], []
    for i in range(episodes):
        obs, _ = env.reset(seed=PROBE + i)
        env.unwrapped.goal = np.full(2, -1e3)
        action = np.zeros(2, np.float32)
        for t in range(length):
            shown.append(obs)
            places.append(env.unwrapped.position)
            actions.append(action)
            if not t or rng.random() * config.train.random_action_repeat < 1:
                action = rng.uniform(-1, 1, 2).astype(np.float32)
            obs = env.step(action)[0]
    rows = {name: torch.as_tensor(x, device=world.device) for name, x in world.obs.to_raw(np.stack(shown)).items()}
    seen = {name: x.view(episodes, length, *x.shape[1:]) for name, x in world.preprocess(rows).items()}
    before = torch.as_tensor(np.stack(actions), device=world.device).view(episodes, length, 2)
    first = torch.zeros(episodes, length, dtype=torch.bool, device=world.device)
    first[:, 0] = True
    never, nothing = torch.zeros_like(first), torch.zeros(episodes, length, device=world.device)
    batch = Batch(seen, torch.zeros_like(before), before, nothing, first, never, never)
    return batch, np.stack(places).reshape(episodes, length, 2)


@torch.no_grad()
def worth(config: Config, world: Any) -> dict[str, float]:
    """What the codes of fresh random walks say; the words are explained above."""
    world.eval()
    batch, places = random_walks(config, world, 100)
    trace = world.trace(batch, None, Sampling(mode=True))
    found = {}
    state = trace.states.map(lambda x: x[:, 0])
    for h in range(1, 11):
        state = world.dynamics.imagine(state, batch.prev_action[:, h], Sampling(mode=True))
        error, still = ((x - trace.z[:, h]).square().sum(-1).mean() for x in (state["z"], trace.z[:, 0]))
        found[f"h{h}"] = float(error / still.clamp_min(1e-9))
    codes, spots = trace.z.flatten(0, 1).cpu().double(), torch.from_numpy(places.reshape(-1, 2))
    spectrum = torch.linalg.eigvalsh(torch.cov(codes.T)).clamp_min(1e-12)
    share = spectrum / spectrum.sum()
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(codes), generator=generator)
    ways = torch.randn(codes.shape[1], 256, generator=generator)
    found["rank"] = float((-(share * share.log()).sum()).exp())
    found["T"] = float(epps_pulley(codes[some[:512]].float(), ways / ways.norm(dim=0)).mean())
    half = len(codes) // 2  # episodes of their own on either side
    ones = torch.cat([codes, torch.ones(len(codes), 1)], 1)
    fit = torch.linalg.lstsq(ones[:half], spots[:half], driver="gelsd").solution
    nearest = torch.cdist(codes[half:], codes[:half]).topk(5, largest=False).indices
    for name, told in (("linear", ones[half:] @ fit), ("near", spots[:half][nearest].mean(1))):
        found[name] = float(1 - (told - spots[half:]).square().sum() / (spots[half:] - spots[half:].mean(0)).square().sum())
    one, other = some[:400], some[400:800]
    apart = (codes[one] - codes[other]).norm(dim=-1).numpy()
    found["line"] = ranked(apart, (spots[one] - spots[other]).norm(dim=-1).numpy())
    found["way"] = ranked(apart, np.array([length(*pair) for pair in zip(spots[one].numpy(), spots[other].numpy(), strict=True)]))
    return {name: round(x, 4) for name, x in found.items()}


def length(start: np.ndarray, goal: np.ndarray) -> float:
    """Pixels of the shortest way, through the door if need be."""
    env = TwoRooms()
    env.position, env.goal = start, goal
    return float(np.linalg.norm(np.diff(np.vstack([start, env.shortest_path()]), axis=0), axis=1).sum())


def ranked(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


# Rows -----------------------------------------------------------------------------------------------------------------


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One variant with one seed: trained, measured, and sent to all goals."""
    over = VARIANTS.get(job["variant"], {})
    updates = {} if job["updates"] is None else {"train.pretrain": job["updates"]}
    config = Config.from_recipe("two_rooms", [f"{k}={json.dumps(v)}" for k, v in {**over, **updates}.items()] + job["overrides"])
    if job["variant"] in PLAIN:
        act = straight if job["variant"] == "straight" else at_random(config.train.random_action_repeat)
        return outcome(reach(config, job["episodes"], act))
    with Load() as load:
        since = time.perf_counter()
        agent = make_agent(config, job["seed"], job["device"])
        agent.learn(config.train.steps)
        trained = time.perf_counter() - since
        found = {"updates": agent.learner.updates, "real_steps": agent.num_timesteps * config.env.action_repeat}
        found |= worth(config, agent.policy.world)
        since = time.perf_counter()
        found |= outcome(reach(config, job["episodes"], planned(agent)))
    found |= {"train_seconds": trained, "plan_seconds": time.perf_counter() - since, "foreign": load.cores}
    return {**found, "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else "cpu"}


def outcome(reached: list[int | None]) -> dict[str, Any]:
    known = [x for x in reached if x is not None]
    return {"success": len(known) / len(reached), "actions": float(np.median(known)) if known else None, "reached": reached}


def measure(args: Any, overrides: list[str], rows: Rows) -> int:
    """Runs what is missing, one after the other; gives the number of runs that failed."""
    failed = 0
    for variant in args.variants:
        for seed in [0] if variant in PLAIN else args.seeds:
            key = {"row": "two-rooms", "variant": variant, "seed": seed, "episodes": args.episodes}
            if variant not in PLAIN:
                key |= {"updates": args.updates, "overrides": overrides}
            if rows.has(key):
                continue
            job = {**key, "updates": args.updates, "overrides": overrides, "device": args.device}
            try:
                row = rows.add(key, call(__file__, job, args.threads, SECONDS), args.threads)
            except Failed as error:
                failed += 1
                say(f"failed: {variant} seed {seed}: {error}")
                continue
            say(f"  success {row['success']:.2f}")
    return failed


def report(rows: Rows) -> str:
    """One line for each variant and its options: medians over seeds, [least..greatest]."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = row["key"]
        groups.setdefault(" ".join([key["variant"], *key.get("overrides", [])]), []).append(row)
    names = ("rank", "T", "linear", "near", "h1", "h10", "line", "way")
    lines = []
    for name, group in groups.items():
        cells = [spread([row[key] for row in group if key in row], 2) for key in names]
        success = spread([100 * row["success"] for row in group], 2)
        actions = spread([row["actions"] for row in group], 2)
        lines.append([marked(name, group), group[0].get("updates", ""), len(group), success, actions, *cells])
    return table(["variant", "updates", "seeds", "success %", "actions", *names], lines)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(run(json.loads(sys.argv[2])), allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument("--variants", nargs="+", choices=[*PLAIN, *VARIANTS], default=[*PLAIN, *VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--episodes", type=int, default=50, help="goals of the evaluation")
    parser.add_argument("--updates", type=int, help="gradient steps of the world model (default: the recipe's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--json", action="store_true", help="the rows as JSON lines instead of the table")
    parser.add_argument("--print", action="store_true", help="only what is there")
    args, overrides = parser.parse_known_args()
    rows = Rows("two_rooms", args.results, args.again)
    failed = 0 if args.print else measure(args, overrides, rows)
    print("\n".join(json.dumps(row) for row in rows) if args.json else report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
