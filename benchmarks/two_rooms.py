"""Goals reached in TwoRooms by planning in latents that were learned without reward and without a decoder.

    python benchmarks/two_rooms.py                                   # all variants, seed 0
    python benchmarks/two_rooms.py --variants sigreg --seeds 0 1 2 --device cuda
    python benchmarks/two_rooms.py --updates 1000 train.lr=5e-4      # dotted keys go over the recipe
    python benchmarks/two_rooms.py --print

The recipe two_rooms: 25,000 random actions, each of four environment steps and repeated three times on average, no reward; then
the world model alone is trained on them. Evaluation: `--episodes` fresh episodes (environment seeds 30000..), start and goal in
different rooms, the goal given by its picture alone; at each step CEM with coloured noise minimises the sum of squared distances of
imagined latents to the goal's. Success is arrival within 4 pixels in 25 actions.

Beside it, on the same goals: random actions as in the data, and the straight line to the goal, which uses both positions but
no wall. The quality of the latents is measured on 100 fresh random episodes (seeds 40000..):

rank     effective rank, exp of the entropy of the covariance's normalised eigenvalues (1: collapsed; Z: isotropic)
T        Epps-Pulley statistic over random directions of 512 latents: 1.05 if Gaussian, 206 if all are equal
linear   R2 of the dot's position, by a linear probe; near: by the 5 nearest latents. near high and linear low: latents are folded
h1, h10  squared error of latents imagined 1 and 10 actions ahead, over that of persistence
line, way  rank correlation of the distance of latents with that of places: straight, and through the door
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from rows import Key, Load, Row, Rows, call, grouped, label, marked, options, script, table
from tables import spread

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
    "hybrid": {
        "model": "hybrid",
        "train.scales.collapse": 10.0,
        "train.scales.inverse": 30.0,
    },  # weights as in sigreg, beside the rate
}
PLAIN = ("random", "straight")
FRAMES = 4
"""Environment steps of one action, as in the recipe."""
GOALS, PROBE, SECONDS = 30_000, 40_000, 7200


# Reaching goals -------------------------------------------------------------------------------------------------------


def reach(config: Config, episodes: int, act: Any) -> list[int | None]:
    """Actions until each goal was reached, None for never; `act(envs, obs, goals, step)` gives an action for each environment."""
    envs = [make_env(config.env) for _ in range(episodes)]
    resets = [env.reset(seed=GOALS + i) for i, env in enumerate(envs)]
    obs, goals = np.stack([first for first, _ in resets]), np.stack([info["goal_obs"] for _, info in resets])
    reached: list[int | None] = [None] * episodes
    running, step = set(range(episodes)), 0
    while running:
        actions = act(envs, obs, goals, step)
        step += 1
        for i in sorted(running):
            obs[i], _, terminated, truncated, _ = envs[i].step(actions[i])
            reached[i] = step if terminated else None
            running -= {i} if terminated or truncated else set()
    return reached


def planned(agent: Any) -> Any:
    """Plans of all environments in one batch."""
    state: Any = None

    def act(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
        nonlocal state
        if not step:
            agent.set_goal(goals)
        action, state = agent.predict(obs, state, np.full(len(obs), not step), deterministic=True)
        return action

    return act


def straight(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
    """Towards the goal as if there were no wall, no faster than needed."""
    away = np.stack([env.unwrapped.goal - env.unwrapped.position for env in envs])
    stride = np.array([[env.unwrapped.speed * FRAMES] for env in envs])  # pixels of one action at full speed
    return (away / np.maximum(np.abs(away).max(1, keepdims=True), stride)).astype(np.float32)


def at_random(repeat: float) -> Any:
    """Uniform actions, each repeated `repeat` times on average."""
    rng, held = np.random.default_rng(0), None

    def act(envs: list[Any], obs: np.ndarray, goals: np.ndarray, step: int) -> np.ndarray:
        nonlocal held
        fresh = rng.uniform(-1, 1, (len(envs), 2)).astype(np.float32)
        held = fresh if held is None else np.where(rng.random((len(envs), 1)) * repeat < 1, fresh, held)
        return held

    return act


# Quality of the latents ------------------------------------------------------------------------------------------------


def random_walks(config: Config, world: Any, episodes: int, length: int = 21) -> tuple[Batch, np.ndarray]:
    """(rows [N, L] on the model's device and scale, positions [N, L, 2]) of episodes that no goal ends."""
    env, rng = make_env(config.env), np.random.default_rng(PROBE)
    frames, places, actions = [], [], []
    for i in range(episodes):
        obs, _ = env.reset(seed=PROBE + i)
        env.unwrapped.goal = np.full(2, -1e3)
        action = np.zeros(2, np.float32)
        for t in range(length):
            frames.append(obs)
            places.append(env.unwrapped.position)
            actions.append(action)
            if not t or rng.random() * config.train.random_action_repeat < 1:
                action = rng.uniform(-1, 1, 2).astype(np.float32)
            obs = env.step(action)[0]
    rows = {name: torch.as_tensor(x, device=world.device) for name, x in world.obs.to_raw(np.stack(frames)).items()}
    seen = {name: x.view(episodes, length, *x.shape[1:]) for name, x in world.preprocess(rows).items()}
    before = torch.as_tensor(np.stack(actions), device=world.device).view(episodes, length, 2)
    first = torch.zeros(episodes, length, dtype=torch.bool, device=world.device)
    first[:, 0] = True
    never, nothing = torch.zeros_like(first), torch.zeros(episodes, length, device=world.device)
    batch = Batch(seen, torch.zeros_like(before), before, nothing, first, never, never)
    return batch, np.stack(places).reshape(episodes, length, 2)


@torch.no_grad()
def quality(config: Config, world: Any) -> dict[str, float]:
    """Figures of the latents of fresh random walks, as explained above."""
    world.eval()
    batch, places = random_walks(config, world, 100)
    trace = world.trace(batch, None, Sampling(mode=True))
    found = {}
    state = trace.states.map(lambda x: x[:, 0])
    for h in range(1, 11):
        state = world.dynamics.imagine(state, batch.prev_action[:, h], Sampling(mode=True))
        error, persistence = ((x - trace.z[:, h]).square().sum(-1).mean() for x in (state["z"], trace.z[:, 0]))
        found[f"h{h}"] = float(error / persistence.clamp_min(1e-9))
    latents, positions = trace.z.flatten(0, 1).cpu().double(), torch.from_numpy(places.reshape(-1, 2))
    spectrum = torch.linalg.eigvalsh(torch.cov(latents.T)).clamp_min(1e-12)
    share = spectrum / spectrum.sum()
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(latents), generator=generator)
    directions = torch.randn(latents.shape[1], 256, generator=generator)
    found["rank"] = float((-(share * share.log()).sum()).exp())
    found["T"] = float(epps_pulley(latents[some[:512]].float(), directions / directions.norm(dim=0)).mean())
    half = len(latents) // 2  # no episode is on both sides
    ones = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    fit = torch.linalg.lstsq(ones[:half], positions[:half], driver="gelsd").solution
    nearest = torch.cdist(latents[half:], latents[:half]).topk(5, largest=False).indices
    for name, predicted in (("linear", ones[half:] @ fit), ("near", positions[:half][nearest].mean(1))):
        found[name] = float(
            1 - (predicted - positions[half:]).square().sum() / (positions[half:] - positions[half:].mean(0)).square().sum()
        )
    one, other = some[:400], some[400:800]
    apart = (latents[one] - latents[other]).norm(dim=-1).numpy()
    found["line"] = ranked(apart, (positions[one] - positions[other]).norm(dim=-1).numpy())
    found["way"] = ranked(
        apart, np.array([length(*pair) for pair in zip(positions[one].numpy(), positions[other].numpy(), strict=True)])
    )
    return {name: round(x, 4) for name, x in found.items()}


def length(start: np.ndarray, goal: np.ndarray) -> float:
    """Pixels of the shortest way, through the door where it leads to the other room."""
    env = TwoRooms()
    env.position, env.goal = start, goal
    return float(np.linalg.norm(np.diff(np.vstack([start, env.shortest_path()]), axis=0), axis=1).sum())


def ranked(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


# Rows -----------------------------------------------------------------------------------------------------------------


def work(job: Row) -> Row:
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
        found |= quality(config, agent.policy.world)
        since = time.perf_counter()
        found |= outcome(reach(config, job["episodes"], planned(agent)))
    found |= {"train_seconds": trained, "plan_seconds": time.perf_counter() - since, "foreign": load.cores}
    return {**found, "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else "cpu"}


def outcome(reached: list[int | None]) -> Row:
    known = [x for x in reached if x is not None]
    return {"success": len(known) / len(reached), "actions": float(np.median(known)) if known else None, "reached": reached}


def report(rows: Rows) -> str:
    """One line for each variant and its options: medians over seeds, [min..max]."""
    names = ("rank", "T", "linear", "near", "h1", "h10", "line", "way")
    lines = []
    for name, group in grouped(rows, lambda row: label(row["key"], row["key"]["variant"])).items():
        cells = [spread((row[figure] for row in group if figure in row), 2) for figure in names]
        success = spread((100 * row["success"] for row in group), 2)
        actions = spread((row["actions"] for row in group), 2)
        lines.append([marked(name, group), group[0].get("updates", ""), len(group), success, actions, *cells])
    return table(["variant", "updates", "seeds", "success %", "actions", *names], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0,), overrides=True)
    parser.add_argument("--variants", nargs="+", choices=[*PLAIN, *VARIANTS], default=[*PLAIN, *VARIANTS])
    parser.add_argument("--episodes", type=int, default=50, help="goals of the evaluation")
    parser.add_argument("--updates", type=int, help="gradient steps of the world model (default: the recipe's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--json", action="store_true", help="the rows as JSON lines instead of the table")
    args = parser.parse_intermixed_args()
    rows = Rows("two_rooms", args.results, args.again)
    keys = []
    for variant in args.variants:
        trained = {} if variant in PLAIN else {"updates": args.updates, "overrides": args.overrides}
        for seed in [0] if variant in PLAIN else args.seeds:
            keys.append({"row": "two-rooms", "variant": variant, "seed": seed, "episodes": args.episodes, **trained})

    def run(key: Key) -> Row:
        job = {**key, "updates": args.updates, "overrides": args.overrides, "device": args.device}
        return call(__file__, job, args.threads, SECONDS)

    summary = lambda row: f"success {row['success']:.2f}"  # noqa: E731
    failed = 0 if args.print else rows.measure(keys, run, lambda key: args.threads, summary)
    print("\n".join(json.dumps(row) for row in rows) if args.json else report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
