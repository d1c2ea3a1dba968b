"""Does sampling land in valid regions? N(0, I) against each learned prior, and validity against beta.

    python benchmarks/validity.py
    python benchmarks/validity.py --data two_rooms --betas 0 1 --seeds 0
    python benchmarks/validity.py --print

Recipe `model=vae` learns from random actions alone (agent=random), once for each beta (`train.scales.marginal`) and seed: the same
first weights, the same experience. Then each form of the prior is fitted to the frozen latents of the replay (two-stage); N(0, I)
needs no fit. Draws from them are decoded and compared with fresh held-out episodes, in units of the run's deviations:

valid       share of decoded draws that lie as near to a real observation as 99 % of other real ones do; hole mass is the rest.
            Reference row `codes`: decoded latents of real observations
midpoint    the same of decoded midpoints between latents of two real observations, on the line and on the great circle
regret      difference of the log-likelihood of held-out latents under the fitted prior and N(0, I), in nats (a lower bound of
            KL(latents || N(0, I)))
slope       95th percentile of the decoder's slope at draws over that at latents: much more than 1 is a cliff
detour      decoded length of the line between two latents over the distance of its ends, median
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Load, Row, Rows, call, grouped, marked, options, script, table, words
from tables import spread

DATA: dict[str, dict[str, Any]] = {
    "pendulum": {"recipe": "pendulum", "steps": 4000, "options": ["train.ratio=1.0"], "episodes": 40},
    "two_rooms": {"recipe": "two_rooms", "steps": 4000, "options": ["train.ratio=0.5"], "episodes": 40},
}
BETAS = (0.0, 0.25, 1.0, 4.0)
FORMS = ("gaussian", "mixture", "vamp", "flow", "energy", "diffusion")
DRAWS, FIT_STEPS = 2000, 2000


# One model, in a process of its own -------------------------------------------------------------------------------------


def work(job: Row) -> Row:
    """Train, fit, draw, decode and compare."""
    import worldmodel
    from worldmodel.agents.held_out import collect
    from worldmodel.storage.run import Run

    data, generator = DATA[job["data"]], torch.Generator().manual_seed(job["seed"])
    given = ["model=vae", "agent=random", f"train.scales.marginal={job['beta']}", "eval.every=0", "eval.episodes=1"]
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        path = Path(folder) / "run"
        overrides = [*given, *data["options"], *job["overrides"]]
        worldmodel.train(data["recipe"], data["steps"], job["seed"], path, overrides, job["device"])
        run = Run.open(path)
        agent = run.agent("newest", device=job["device"])
        replay = run.replay()
        train = replay.sample(64, min(64, min(replay.lengths)), np.random.default_rng(0))
        held_out = collect(agent, run.config.env, data["episodes"], random=1.0)
    world = agent.policy.world.eval().requires_grad_(False)
    return {**measure(world, train, held_out.rows, job["forms"], generator), "foreign": load.cores}


def measure(world, train, held_out, forms: list[str], generator: torch.Generator) -> Row:
    """The figures of one model, fitted to rows `train` and tested on `held_out`; the same noise for each form."""
    from regions import Region

    from worldmodel.diagnostics.geometry import spherical
    from worldmodel.diagnostics.holes import nearest
    from worldmodel.diagnostics.smoothness import decoder_sensitivity, path_ratio
    from worldmodel.model import active_units

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.flatten(1) for x in world.decoder.mean(z).values()], 1)

    fitted, real, held = (latents_of(world, rows, generator) for rows in (train, held_out, held_out))
    truth = torch.cat([x.flatten(1) for x in real["obs"].values()], 1)
    half = len(truth) // 2  # whole episodes: those of the first half are the region's, the others' the test
    region = Region.of(truth[:half], truth[half:])
    latents, pairs = held["z"][half:], torch.randperm(len(truth) - half, generator=generator)
    rebuilt = decode(held["mean"][half:])
    steep = float(decoder_sensitivity(decode, latents[:DRAWS], generator=generator).quantile(0.95))
    out: Row = {
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
    for form in ("N(0, I)", *forms):
        z, nats = draws(world, form, fitted, latents, generator)
        out[form] = {
            "valid": float(region.contains(decode(z)).float().mean()),
            "slope": float(decoder_sensitivity(decode, z, generator=generator).quantile(0.95)) / max(steep, 1e-9),
            "regret": nats,
        }
    return out


def latents_of(world, rows, generator: torch.Generator) -> dict[str, Any]:
    """{"z": drawn latents, "mean": of posteriors, "h": recurrent states, "obs": scaled observations} of raw rows [B, T], flat."""
    from worldmodel.data import Sampling
    from worldmodel.nn.networks import flatten

    rows = rows.to(world.device)
    batch = rows.with_obs(world.preprocess(rows.obs))
    with torch.no_grad():
        trace = world.trace(batch, None, Sampling(generator=generator))
    found = {"z": trace.z, "mean": trace.posterior.mean, "h": trace.h}
    return {**{k: flatten(x) for k, x in found.items()}, "obs": {k: flatten(x) for k, x in batch.obs.items()}}


def draws(world, form: str, fitted, test, generator: torch.Generator) -> tuple[torch.Tensor, float | None]:
    """(draws [N, Z] of a form fitted to what `latents_of` gave, nats by which it explains `test` better than N(0, I))."""
    from worldmodel import registry
    from worldmodel.data import Sampling

    def build(config: Any, *more: Any) -> Any:
        return registry.build("distribution", config, world.dynamics.latent.family, 0, *more)

    normal = build(registry.config_class("distribution", "gaussian")(standard=True))
    if form == "N(0, I)":
        return normal.sample(None, DRAWS, Sampling(generator=generator))[:, 0], None
    prior = build(registry.config_class("distribution", form)(), world.dynamics.source)
    if prior.num_pseudo_inputs:
        some = torch.randperm(len(fitted["z"]), generator=generator)[: prior.num_pseudo_inputs]
        prior.init_pseudo_inputs({name: x[some] for name, x in fitted["obs"].items()}, fitted["h"][some])
    prior.fit(fitted["z"], steps=FIT_STEPS, generator=generator)
    prior.eval()
    z = prior.sample(None, DRAWS, Sampling(generator=generator))[:, 0].detach()
    if prior.density != "exact":
        return z, None
    with torch.no_grad():
        return z, float((prior.log_prob(test, None) - normal.log_prob(test, None)).mean())


# All of them ------------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> str:
    """Validity by form at each beta; the effect of beta; the hole mass of N(0, I) without and with a rate."""
    groups = grouped(rows, lambda row: (row["key"]["data"], row["key"]["beta"], " ".join(row["key"]["overrides"])))
    by_form, by_beta = [], []
    for (data, beta, more), group in sorted(groups.items()):
        name = f"{data} {more}".strip()
        for form in ("codes", "N(0, I)", *FORMS):
            found = [row[form] for row in group if form in row]
            cells = ([x[figure] for x in found if x.get(figure) is not None] for figure in ("valid", "slope", "regret"))
            if found:
                by_form.append([name, f"{beta:g}", len(found), marked(form, group), *(spread(cell, 2) for cell in cells)])
        cells = [[row["error"] for row in group], *([row[form]["valid"] for row in group] for form in ("codes", "N(0, I)"))]
        cells += [[row[figure] for row in group] for figure in ("midpoint, line", "midpoint, circle", "detour", "active")]
        by_beta.append([name, marked(f"{beta:g}", group), len(group), *(spread(cell, 2) for cell in cells)])
    head = ["data", "beta", "seeds"]
    parts = [table([*head, "prior", "valid", "slope", "regret, nats"], by_form)]
    head += ["error", "valid codes", "valid N(0, I)", "midpoint, line", "midpoint, circle", "detour", "active"]
    parts.append(table(head, by_beta))
    for data, more in sorted({(data, more) for data, _, more in groups}):
        sides = [groups.get((data, beta, more)) for beta in (0.0, 1.0)]
        if all(sides):
            without, with_rate = (spread((1 - row["N(0, I)"]["valid"] for row in side), 2) for side in sides)
            parts.append(f"{data}: hole mass of N(0, I) {without} at beta 0, {with_rate} at beta 1")
    return "\n\n".join(parts)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["pendulum"])
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS))
    parser.add_argument("--forms", type=words, default=FORMS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_intermixed_args()
    rows = Rows("validity", args.results, args.again)
    keys = [
        {"data": data, "beta": beta, "seed": seed, "overrides": args.overrides}
        for data in args.data
        for seed in args.seeds
        for beta in args.betas
    ]
    run = lambda key: call(__file__, {**key, "forms": args.forms, "device": args.device}, 1, 3600)  # noqa: E731
    failed = 0 if args.print else rows.measure(keys, run)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
