"""Three decoders of pictures in planning roll-outs: how sharp and how true imagined pictures are, and what a planner gets.

    python benchmarks/decoders.py                                # Catch and Pendulum, seeds 0 1 2
    python benchmarks/decoders.py --tasks catch --seeds 0 --decoders latent_diffusion
    python benchmarks/decoders.py --print                        # the table of what is there

Each row trains one world model, alone, on recorded random play (actions last three steps on average, as in the recipe of Catch),
and lets it imagine what a planner imagines: the steps that follow upon some real rows, under given actions, every step decoded. All
have Gaussian latents of eight numbers and the same encoder; what differs is the decoder: `standard` shows the expected picture,
`diffusion` refines that (`model=diffusion_decoder`), `latent_diffusion` draws the latents of an autoencoder
(`model=latent_diffusion_decoder`). Measured on held-out episodes of random play, at the horizons of the task:

    contours   mean squared gradient of the pictures over that of the real ones (`fidelity.edges`): 1 is right, less is blurred
    probe      error of what a convolutional network reads off the picture, which learned from real pictures alone: the cells of
               Catch, cosine and sine of Pendulum's angle; root mean square in deviations, 1 is no better than the mean
    frames/s   of decoding 64 features at once

and the return of a planner (random shooting, no critic) whose candidates are imagined in latents, and in pictures, each decoded
and encoded again (`model.rollouts=observation`). The standard decoder draws each pixel alone: nothing to encode again.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catch_encoder import cells
from fidelity import edges
from rows import Load, Row, Rows, call, grouped, marked, options, say, script, table, timed, words
from tables import spread
from torch import Tensor, nn
from truth import ALONE

from worldmodel.agents.evaluation import FINAL_SEED, evaluate
from worldmodel.commands.train import train
from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.diagnostics.rollouts import roll_out, spaced_starts
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.nn.networks import MLP, ConvEncoder
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run

LATENTS = ["model.dynamics.posterior=filtering", "model.dynamics.latent.kind=gaussian", "model.dynamics.latent.size=8"]
DECODERS = {
    "standard": [*LATENTS, "train.ema_decay=0.98"],
    "diffusion": ["model=diffusion_decoder", *LATENTS],
    "latent_diffusion": ["model=latent_diffusion_decoder", *LATENTS],
}
ROLLOUTS = {"standard": ["latent"], "diffusion": ["latent", "observation"], "latent_diffusion": ["latent", "observation"]}
HELD_OUT, HELD_OUT_SEED, REPEAT, PROBE_UPDATES = 20, 40_000, 3.0, 600


@dataclass(frozen=True)
class Task:
    """A recipe whose observations are pictures, and how it is measured.

    rows      real steps of random play
    context   real rows that a roll-out follows upon
    horizons  steps ahead
    plans     (candidates, imagined steps of each)
    played    (episodes, their longest) of the planner
    """

    recipe: str
    rows: int
    context: int
    horizons: tuple[int, ...]
    plans: tuple[int, int]
    played: tuple[int, int]


TASKS = {
    "catch": Task("catch", 3000, 2, (1, 3, 5), (24, 7), (20, 7)),
    "pendulum_pixels": Task("pendulum_pixels", 5000, 5, (1, 5, 15), (24, 12), (2, 60)),
}


def states_of(task: str, env: Any, frame: np.ndarray) -> np.ndarray:
    """What a picture shows of the state."""
    if task == "catch":
        return cells(frame[None])[0]
    angle = env.unwrapped.state[0]
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def play(
    task: str, config: EnvConfig, seed: int, *, steps: int | None = None, episodes: int | None = None
) -> tuple[Recording, Tensor]:
    """(random play whose actions last, the states of its observations in the order of the recording's rows)."""
    rng, env = np.random.default_rng(seed), make_env(config, seed=seed)
    env.action_space.seed(seed)
    kept, states, left = [], [], steps
    while len(kept) < episodes if left is None else left > 0:
        obs, _ = env.reset(seed=seed + len(kept))
        rows: dict[str, list] = {"observations": [obs], "actions": [], "rewards": [], "terminations": [], "truncations": []}
        states.append(states_of(task, env, obs))
        action = env.action_space.sample()
        while not rows["actions"] or not (rows["terminations"][-1] or rows["truncations"][-1] or len(rows["actions"]) == left):
            action = env.action_space.sample() if rng.random() < 1 / REPEAT else action
            obs, *rest, _ = env.step(action)
            for name, value in zip(rows, (obs, action, *rest), strict=True):
                rows[name].append(value)
            states.append(states_of(task, env, obs))
        kept.append({name: np.stack(values) for name, values in rows.items()})
        left = None if left is None else left - len(rows["actions"])
    env.close()
    made = Recording.from_episodes(env.observation_space, env.action_space, kept, env_id=config.id, origin=task)
    return made, torch.from_numpy(np.stack(states))


class Probe(nn.Module):
    """Pictures [N, 3, 64, 64] in [0, 1] -> what they show of the state, in deviations [N, D]."""

    def __init__(self, frames: Tensor, states: Tensor):
        super().__init__()
        self.mean, self.deviation = states.mean(0), states.std(0).clamp_min(1e-3)
        convolutions = ConvEncoder((3, 64, 64), 8)
        self.net = nn.Sequential(convolutions, MLP(convolutions.out_features, 64, 1), nn.Linear(64, states.shape[-1]))
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_UPDATES)
        for _ in range(PROBE_UPDATES):
            rows = torch.randint(len(frames), (64,))
            loss = (self.net(frames[rows]) - self.scaled(states[rows])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def scaled(self, states: Tensor) -> Tensor:
        return (states - self.mean) / self.deviation

    def error(self, frames: Tensor, states: Tensor) -> float:
        found = torch.cat([self.net(part) for part in frames.split(256)])
        return float((found - self.scaled(states)).square().mean().sqrt())


# One row ----------------------------------------------------------------------------------------------------------------


def work(job: Row) -> Row:
    """Trains and measures one decoder on one task and seed."""
    task = TASKS[job["task"]]
    samples, horizon = task.plans
    agent = ["agent=planner", "agent.plan.method=random", f"agent.plan.samples={samples}", f"agent.plan.horizon={horizon}"]
    agent += ["agent.plan.proposals=0", "agent.plan.terminal=false"]
    given = [*ALONE[1:], *DECODERS[job["decoder"]], *agent, *job["overrides"]]
    config = Config.from_recipe(task.recipe, given)
    recording, states = play(job["task"], config.env, 1000 * job["seed"], steps=task.rows)
    held_out, truth = play(job["task"], config.env, HELD_OUT_SEED, episodes=HELD_OUT)
    torch.manual_seed(job["seed"])
    pictures = lambda made: torch.from_numpy(made.obs["obs"]).permute(0, 3, 1, 2).float() / 255  # noqa: E731
    probe = Probe(pictures(recording), states)
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        file, path, since = recording.write(Path(folder) / "rows.npz"), Path(folder) / "run", time.perf_counter()
        train(task.recipe, job["updates"], job["seed"], path, given, "cpu", data=file, log=say)
        seconds = time.perf_counter() - since
        model = Run.open(path).agent(device="cpu")
    with torch.no_grad():
        found = measure(task, model.policy.world, probe, held_out.to_episodes(), truth)
        return {
            **found,
            "return": returns(job["decoder"], task, model, config.env),
            "probe_on_real": probe.error(pictures(held_out), truth),
            "parameters": sum(p.numel() for p in model.policy.world.decoder.parameters()),
            "train_seconds": round(seconds, 1),
            "foreign": load.cores,
        }


def measure(task: Task, world: Any, probe: Probe, episodes: Any, truth: Tensor) -> Row:
    """Contours and probe at each horizon, and frames a second."""
    episode, start = spaced_starts(episodes, task.context, 3)
    generator, longest = torch.Generator().manual_seed(0), max(task.horizons)
    # Pictures are drawn whole; of the standard decoder, which draws pixels one by one, they are the expected ones.
    draws = not getattr(world.decoder, "pixelwise_noise", [])
    roll = roll_out(world, episodes, episode, start, task.context, longest, samples=1, generator=generator, draw=draws)
    firsts = episodes.rows.is_first[0].nonzero().flatten()[episode] + start
    contours, errors = [], []
    for h in task.horizons:
        row = task.context + h - 1
        inside = roll.inside[:, row]
        real, imagined = roll.truth["obs"][inside, row], roll.imagined["obs"][inside, 0, h - 1].clamp(0, 1)
        contours.append(edges(imagined)[1] / edges(real)[1])
        errors.append(probe.error(imagined, truth[firsts[inside] + row]))
    window = roll.window.window(0, task.context).map(lambda x: x[:64])
    feature = world.trace(window.with_obs(world.preprocess(window.obs)), None, Sampling(generator=generator)).feature[:, -1]
    decode = partial(world.decoder.sample, feature, Sampling(generator=generator)) if draws else partial(world.decode, feature)
    took = timed(decode, 3, 0.3, 20.0)
    speed = 1000 * len(feature) / sorted(took["ms"])[1]
    return {"contours": contours, "probe": errors, "frames_per_second": speed, "quiet": took["quiet"]}


def returns(decoder: str, task: Task, model: Any, env: EnvConfig) -> dict[str, list[float]]:
    """{roll-outs in: returns of the planner's episodes}."""
    world, found = model.policy.world, {}
    for rollouts in ROLLOUTS[decoder]:
        world.config = world.config.model_copy(update={"rollouts": rollouts})
        found[rollouts] = evaluate(model, env, task.played[0], FINAL_SEED, max_steps=task.played[1])[0]
    return found


# All of them ------------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> str:
    """One line for each task and decoder: medians over seeds, [min..max]."""
    lines = []
    for (task, decoder), found in grouped(rows, lambda row: (row["key"]["task"], row["key"]["decoder"])).items():
        horizons = "/".join(map(str, TASKS[task].horizons))
        by_horizon = lambda name, found=found: " / ".join(spread([row[name][i] for row in found], 2) for i in range(3))  # noqa: E731
        played = [
            spread([float(np.mean(row["return"][how])) for row in found], 2) if how in found[0]["return"] else "-"
            for how in ("latent", "observation")
        ]
        speed = spread([row["frames_per_second"] for row in found])
        real = spread([row["probe_on_real"] for row in found], 2)
        lines.append(
            [task, marked(decoder, found), len(found), horizons, by_horizon("contours"), by_horizon("probe"), real, speed, *played]
        )
    head = [
        "task",
        "decoder",
        "seeds",
        "steps ahead",
        "contours",
        "probe",
        "on real ones",
        "frames/s",
        "return, latents",
        "return, pictures",
    ]
    return table(head, lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--tasks", type=words, default=list(TASKS), metavar=",".join(TASKS))
    parser.add_argument("--decoders", type=words, default=list(DECODERS), metavar=",".join(DECODERS))
    parser.add_argument("--updates", type=int, default=2000)
    args = parser.parse_intermixed_args()
    rows = Rows("decoders", args.results, args.again)
    keys = [
        {"task": task, "decoder": decoder, "seed": seed, "updates": args.updates, "overrides": args.overrides}
        for task in args.tasks
        for seed in args.seeds
        for decoder in args.decoders
    ]
    failed = 0 if args.print else rows.measure(keys, lambda key: call(__file__, key, 1, 4 * 3600))
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
