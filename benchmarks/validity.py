"""Does sampling land in valid regions? N(0, I) against each learned prior, and validity against beta.

    python benchmarks/validity.py
    python benchmarks/validity.py --data two_rooms --betas 0 1 --seeds 0
    python benchmarks/validity.py --print

Recipe `model=vae` learns from random actions alone (agent=random), once for each beta (`train.scales.marginal`) and seed: the same
first weights, the same experience. Then each form of the prior is fitted to the frozen codes of the replay (two-stage), and N(0, I)
needs no fit. What is drawn from them is decoded and compared with fresh held-out episodes, in units of the run's deviations:

valid       share of decoded draws that lie as near to a real observation as 99 % of other real ones do; hole mass is the rest.
            Reference row `codes`: decoded codes of real observations
midpoint    the same of decoded midpoints between codes of two real observations, on the line and on the great circle
regret      nats by which the fitted law explains held-out codes better than N(0, I) does (a lower bound of KL(codes || N(0, I)))
slope       95th percentile of the decoder's slope at draws over that at codes: much more than 1 is a cliff
detour      decoded length of the line between two codes over the distance of its ends, median
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Failed, Load, Rows, call, marked, options, say, spread, table

DATA: dict[str, dict[str, Any]] = {
    "pendulum": {"recipe": "pendulum", "steps": 4000, "options": ["train.ratio=1.0"], "episodes": 40},
    "two_rooms": {"recipe": "two_rooms", "steps": 4000, "options": ["train.ratio=0.5"], "episodes": 40},
}
BETAS = (0.0, 0.25, 1.0, 4.0)
FORMS = ("gaussian", "mixture", "vamp", "flow", "energy", "diffusion")
DRAWS, FIT_STEPS = 2000, 2000


# One model, in a process of its own -------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train, fit, draw, decode and compare."""
    import worldmodel
    from worldmodel.agents.held_out import collect
    from worldmodel.storage.run import Run

    data, torch_seed = DATA[job["data"]], torch.Generator().manual_seed(job["seed"])
    torch.set_num_threads(1)
    given = ["model=vae", "agent=random", f"train.scales.marginal={job['beta']}", "eval.every=0", "eval.episodes=1"]
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        path = Path(folder) / "run"
        worldmodel.train(
            data["recipe"], data["steps"], job["seed"], path, [*given, *data["options"], *job["overrides"]], job["device"]
        )
        run = Run.open(path)
        agent = run.agent(device=job["device"])
        replay = run.replay()
        train = replay.sample(64, min(64, min(replay.lengths)), np.random.default_rng(0))
        held_out = collect(agent, run.config.env, data["episodes"], random=1.0)
    world = agent.policy.world.eval().requires_grad_(False)
    found = measure(world, train, held_out.rows, job, torch_seed)
    return {**found, "foreign": load.cores}


def measure(world, train, held_out, job: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Everything about one model; the same draws' noise for each form."""
    from regions import Region, decoder_sensitivity, nearest, path_ratio

    from worldmodel.diagnostics.geometry import spherical
    from worldmodel.model import active_units

    def decode(z):
        return torch.cat([x.flatten(1) for x in world.decoder.mean(z).values()], 1)

    fitted, real, held = (codes_of(world, rows, generator) for rows in (train, held_out, held_out))
    truth = torch.cat([x.flatten(1) for x in real["obs"].values()], 1)
    half = len(truth) // 2  # whole episodes: those of the first half are the region's, the others' the test
    region = Region.of(truth[:half], truth[half:])
    latents, pairs = held["z"][half:], torch.randperm(len(truth) - half, generator=generator)
    rebuilt = decode(held["mean"][half:])
    steep = float(decoder_sensitivity(decode, latents[:DRAWS], generator=generator).quantile(0.95))
    out: dict[str, Any] = {
        "error": float((rebuilt - truth[half:]).square().mean().sqrt()),
        "radius": region.radius,
        "codes": {"valid": float(region.contains(decode(latents[:DRAWS])).float().mean())},
        "active": active_units(held["mean"]),
        "deviation": float(latents.std(0).mean()),
        "apart": float(nearest(latents, held["z"][:half]).median()),
    }
    one, other = latents[:DRAWS], latents[pairs][:DRAWS]
    for name, middle in (("line", torch.lerp(one, other, 0.5)), ("circle", spherical(one, other, 0.5))):
        out[f"midpoint, {name}"] = float(region.contains(decode(middle)).float().mean())
    out["detour"] = float(path_ratio(decode, one[:256], other[:256]).median())
    for form in ("N(0, I)", *job["forms"]):
        z, nats = draws(world, form, fitted, latents, generator)
        out[form] = {
            "valid": float(region.contains(decode(z)).float().mean()),
            "slope": float(decoder_sensitivity(decode, z, generator=generator).quantile(0.95)) / max(steep, 1e-9),
            "regret": nats,
        }
    return out


def codes_of(world, rows, generator: torch.Generator) -> dict[str, Any]:
    """Drawn codes, their means, the carries before them and the scaled observations of raw rows [B, T], flat."""
    from worldmodel.data import Sampling
    from worldmodel.nn.networks import flatten

    rows = rows.to(world.device)
    batch = rows.with_obs(world.preprocess(rows.obs))
    with torch.no_grad():
        trace = world.trace(batch, None, Sampling(generator=generator))
    found = {"z": trace.z, "mean": trace.posterior.mean, "carry": trace.h}
    return {**{k: flatten(x) for k, x in found.items()}, "obs": {k: flatten(x) for k, x in batch.obs.items()}}


def draws(world, form: str, fitted, test, generator: torch.Generator) -> tuple[torch.Tensor, float | None]:
    """(draws [N, Z] of a form fitted to what `codes_of` gave, nats by which it explains `test` better than N(0, I))."""
    from worldmodel import registry
    from worldmodel.data import Sampling

    latent = world.dynamics.latent.family
    config = registry.config_class("distribution", "gaussian")
    normal = registry.build("distribution", config(standard=True), latent, 0)
    if form == "N(0, I)":
        return normal.sample(None, DRAWS, Sampling(generator=generator))[:, 0], None
    law = registry.build("distribution", registry.config_class("distribution", form)(), latent, 0, world.dynamics.source)
    if law.num_pseudo_inputs:
        some = torch.randperm(len(fitted["z"]), generator=generator)[: law.num_pseudo_inputs]
        law.init_pseudo_inputs({name: x[some] for name, x in fitted["obs"].items()}, fitted["carry"][some])
    law.fit(fitted["z"], steps=FIT_STEPS, generator=generator)
    law.eval()
    z = law.sample(None, DRAWS, Sampling(generator=generator))[:, 0].detach()
    if law.density != "exact":
        return z, None
    with torch.no_grad():
        return z, float((law.log_prob(test, None) - normal.log_prob(test, None)).mean())


# All of them ------------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> str:
    """Validity by form at each beta; what beta does; and the negative control."""
    parts, groups = [], {}
    for row in rows:
        groups.setdefault((row["key"]["data"], row["key"]["beta"], " ".join(row["key"]["overrides"])), []).append(row)
    head = ["data", "beta", "seeds", "prior", "valid", "slope", "regret, nats"]
    lines = []
    for (data, beta, more), group in sorted(groups.items()):
        for form in ("codes", "N(0, I)", *FORMS):
            found = [row[form] for row in group if form in row]
            nats = [x["regret"] for x in found if x.get("regret") is not None]
            steep = [x["slope"] for x in found if "slope" in x]
            if found:
                valid = spread([x["valid"] for x in found], 2)
                name = marked(form, group)
                lines.append([f"{data} {more}".strip(), f"{beta:g}", len(found), name, valid, spread(steep, 2), spread(nats, 2)])
    parts.append(table(head, lines))
    head = [
        "data",
        "beta",
        "seeds",
        "error",
        "valid codes",
        "valid N(0, I)",
        "midpoint, line",
        "midpoint, circle",
        "detour",
        "active",
    ]
    lines = []
    for (data, beta, more), group in sorted(groups.items()):
        cells = [
            [row["error"] for row in group],
            [row["codes"]["valid"] for row in group],
            [row["N(0, I)"]["valid"] for row in group],
        ]
        cells += [[row[name] for row in group] for name in ("midpoint, line", "midpoint, circle", "detour", "active")]
        lines.append([f"{data} {more}".strip(), marked(f"{beta:g}", group), len(group), *(spread(cell, 2) for cell in cells)])
    parts.append(table(head, lines))
    for data, more in sorted({(data, more) for data, _, more in groups}):
        holes = {
            beta: [1 - row["N(0, I)"]["valid"] for row in groups[data, beta, more]]
            for beta in (0.0, 1.0)
            if (data, beta, more) in groups
        }
        if len(holes) == 2:
            parts.append(f"{data}: hole mass of N(0, I) {spread(holes[0.0], 2)} at beta 0, {spread(holes[1.0], 2)} at beta 1")
    return "\n\n".join(parts)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2])), allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["pendulum"])
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS))
    parser.add_argument("--forms", type=lambda text: tuple(text.split(",")), default=FORMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--print", action="store_true", help="only the tables")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    rows, failed = Rows("validity", args.results, args.again), 0
    for data in [] if args.print else args.data:
        for seed in args.seeds:
            for beta in args.betas:
                key = {"data": data, "beta": beta, "seed": seed, "overrides": args.overrides}
                if rows.has(key):
                    continue
                try:
                    rows.add(key, call(__file__, {**key, "forms": args.forms, "device": args.device}, 1, 3600), threads=1)
                except Failed as failure:
                    failed += 1
                    say(f"{data} beta {beta} seed {seed}: {failure}")
    print(report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
