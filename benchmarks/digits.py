"""How likely held-out digits are under a VAE, by the form of its prior: nats, and the gain over N(0, I) paired by seed.

    python benchmarks/digits.py
    python benchmarks/digits.py --forms gaussian,mixture,vamp,flow --seeds 5 --latents 2 --json
    python benchmarks/digits.py --forms gaussian,vamp --seeds 2 vamp.components=200 lr=0.0005
    python benchmarks/digits.py --forms ppca
    python benchmarks/digits.py --mnist DIR --forms gaussian,vamp --seeds 1 --minutes 60 --json
    python benchmarks/digits.py --print

The 1,797 digits of scikit-learn, 8 x 8 pixels of 17 grey levels, are split 1000/350/447 once and for all. Encoder and decoder
are perceptrons; the decoder gives each pixel a discretised logistic, its two outer levels reaching to infinity. Within a seed every
form starts with the same weights, batches and noise (`vae.py`), under the same limits; the best validation ELBO
is kept. Test images are scored by IWAE with 1000 draws. `diffusion` uses its ODE likelihood in that, and `energy` its density over
a normaliser estimated by annealed importance sampling: these are no bounds in the same sense, and are listed apart.

`ppca`: a linear VAE on the same digits as real numbers, whose exact likelihood is known.
`--mnist DIR`: the VampPrior paper's set-up on MNIST's own files (`mnist.py`), within `--minutes`, two forms at once.
`--json`: the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import vae
from rows import STALE, Key, Load, Row, Rows, call, options, script, stale, table
from tables import number
from vae import FORMS, parted

from worldmodel.diagnostics.likelihood import FactorModel, importance

APART = {"energy": "AIS", "diffusion": "ODE"}
"""Forms whose likelihood is no bound of the same kind, and its method."""
FEWER = {"diffusion": 100}
"""Draws of forms for which 1000 would take minutes; they are compared at equal draws."""
LEVELS, SPLIT, DRAWS = 17, (1000, 350, 447), 1000
MEANS = ("nats", "rate", "distortion", "active", "ess", "cpu_seconds", "parameters", "law_parameters", "best_epoch")
ESTIMATES = ("exact", "gap", "ppca", "log_z", "log_z_ess")
"""Figures of every row that are averaged over seeds, and those of some forms."""


# Data and models --------------------------------------------------------------------------------------------------------


def digits():
    """(train, validation, test) [N, 1, 8, 8] in [0, 1], always the same."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images / (LEVELS - 1), dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].split(SPLIT)


def model(form: str, seed: int, own: dict[str, Any], train, setup):
    """The VAE of one form and seed; `own`: options of the prior; `train`: observations that pseudo-inputs start at."""
    default = {"top": max(1, setup.latents // 2)} if form == "hierarchical" else {}
    prior, likelihood, size = vae.prior_config({**FORMS[form], **default, **own}), vae.Logistic(LEVELS), train[0].numel()

    def make():
        body = vae.perceptron(size, None, setup)
        decoder = vae.perceptron(setup.latents, size * likelihood.outputs, setup)
        return vae.VAE(tuple(train.shape[1:]), setup.latents, body, decoder, likelihood, prior)

    return vae.seeded(seed, make, begin=train)


def work(job: Row) -> Row:
    """One form and seed, from first weights to test likelihood."""
    if "mnist" in job:
        import mnist

        return mnist.work(job)
    train, valid, test = digits()
    if job["form"] == "ppca":
        return ppca(train, test, job)
    own, shared = parted(job["overrides"], job["form"])
    setup = vae.Setup.parse({"latents": job["latents"], **shared})
    trained = model(job["form"], job["seed"], own, train, setup)
    with Load() as load:
        found = vae.learn(trained, train, valid, setup, job["seed"])
        draws = FEWER.get(job["form"], DRAWS)
        prior, normaliser = vae.log_prior(trained, finely=True)
        weighed = vae.weighed(trained, test, draws, job["seed"], prior)
    return {**found, **vae.figures(trained, test, weighed), **normaliser, "draws": draws, "foreign": load.cores}


def ppca(train, test, job: Row) -> Row:
    """A linear VAE beside the exact likelihood of its own decoder, and of the best linear model there is."""
    body = torch.nn.Flatten()
    body.out_features = 64
    likelihood = vae.Normal()
    decoder = torch.nn.Linear(job["latents"], 64)
    config = vae.prior_config(FORMS["gaussian"])
    linear = vae.seeded(job["seed"], lambda: vae.VAE((1, 8, 8), job["latents"], body, decoder, likelihood, config))
    setup = vae.Setup(latents=job["latents"], lr=1e-2, decay=0.5, average=0, epochs=300, patience=300)
    found = vae.learn(linear, train, train, setup, job["seed"])
    own = FactorModel(decoder.bias.detach(), decoder.weight.detach(), float(likelihood.log_sigma.detach().exp()))
    prior, generator = vae.log_prior(linear)[0], torch.Generator().manual_seed(job["seed"])
    weighed = importance(linear.encode(test), linear.latent, prior, lambda z: linear.log_likelihood(z, test), DRAWS, generator)
    exact, best = own.log_prob(test.flatten(1)).mean(), FactorModel.fit(train.flatten(1), job["latents"])
    return {
        **found,
        **vae.figures(linear, test, weighed),
        "draws": DRAWS,
        "exact": float(exact),
        "gap": float(exact - weighed.nats.double().mean()),
        "ppca": float(best.log_prob(test.flatten(1)).mean()),
    }


# Report -----------------------------------------------------------------------------------------------------------------


def clustered_mean(rows: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """(mean, standard error) of nats minus those of `base` at as many draws, over the seeds of both; None under two of them."""
    gains = [row["nats"] - base[seed]["curve"][str(row["draws"])] for seed, row in rows.items() if seed in base]
    if len(gains) < 2:
        return None
    return statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def summary(group: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per form {seed: row}: means over its seeds, and the gain over N(0, I) in nats, paired by seed."""
    out: dict[str, dict[str, Any]] = {}
    for form, rows in group.items():
        first = next(iter(rows.values()))
        out[form] = {
            "stale": any(map(stale, rows.values())),
            "kind": f"IWAE-{first['draws']}" + (f" of {APART[form]}" if form in APART else ""),
            "seeds": sorted(rows),
        }
        for name in (*MEANS, *(name for name in ESTIMATES if name in first)):
            out[form][name] = statistics.mean(row[name] for row in rows.values())
        gain = clustered_mean(rows, group.get("gaussian", {})) if form not in ("gaussian", "ppca") else None
        if gain is not None:
            out[form]["gain"], out[form]["gain_se"] = gain
    return out


def targets(found: dict[str, dict[str, Any]], latents: int) -> list[dict[str, Any]]:
    """The targets of these forms, and whether they are met."""
    out = []
    for form, row in found.items():
        met = {}
        if "gain" in row and form not in APART:
            met[f"{form} within one standard error of N(0, I) or better"] = row["gain"] >= -row["gain_se"]
        if "gain" in row and form in ("vamp", "flow") and latents == 2:
            met[f"{form} better by more than one standard error"] = row["gain"] > row["gain_se"]
        if "gap" in row:
            met["ppca within 0.1 nat of the exact likelihood"] = abs(row["gap"]) < 0.1
        out += [{"latents": latents, "target": target, "met": reached} for target, reached in met.items()]
    return out


def grouped(rows: Rows, keys: list[Key] | None) -> dict[int, dict[str, dict[int, dict[str, Any]]]]:
    """{latents: {form: {seed: row}}} of the rows with these keys; None: of all without options."""
    out: dict[int, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        key = row["key"]
        if key in keys if keys is not None else key["data"] == "digits" and not key["overrides"]:
            out.setdefault(key["latents"], {}).setdefault(key["form"], {})[key["seed"]] = row
    order = [*FORMS, "ppca"]
    return {n: dict(sorted(forms.items(), key=lambda x: order.index(x[0]))) for n, forms in sorted(out.items())}


def lines(found: dict[str, dict[str, Any]], latents: int) -> list[list[str]]:
    out = []
    for form, row in sorted(found.items(), key=lambda x: x[0] in APART):
        gain = f"{row['gain']:+.2f} ± {row['gain_se']:.2f}" if "gain" in row else ""
        nats = [f"{row['nats']:.2f}", gain, f"{row['rate']:.2f}", f"{row['distortion']:.2f}"]
        size = f"{number(row['parameters'])} ({number(row['law_parameters'])})"
        rest = [f"{row['active']:.1f}", f"{row['ess']:.0f}", f"{row['cpu_seconds']:.0f}", size]
        out.append([str(latents), f"{form} {STALE}" if row["stale"] else form, row["kind"], str(len(row["seeds"])), *nats, *rest])
    return out


def report(rows: Rows, keys: list[Key] | None) -> dict[str, Any]:
    """Prints the table and the targets; the same as one object."""
    out: dict[str, Any] = {"latents": {}, "targets": []}
    cells: list[list[str]] = []
    for latents, group in grouped(rows, keys).items():
        found = summary(group)
        out["latents"][str(latents)] = found
        out["targets"] += targets(found, latents)
        cells += lines(found, latents)
    head = ["latents", "prior", "kind", "seeds", "nats", "over N(0, I)", "rate", "distortion", "active", "ESS", "cpu s"]
    print(table([*head, "parameters (prior)"], cells))
    for latents, found in out["latents"].items():
        if row := found.get("ppca"):
            figures = (
                f"IWAE {row['nats']:.3f}, exact {row['exact']:.3f} (gap {row['gap']:.3f}), best linear model {row['ppca']:.3f}"
            )
            print(f"ppca, {latents} latents, continuous: {figures}")
    for line in out["targets"]:
        print(f"{'met' if line['met'] else 'NOT MET'}: {line['target']} ({line['latents']} latents)")
    return out


def command_line() -> argparse.Namespace:
    parser, known = options(__doc__, overrides=True), [*FORMS, "ppca"]
    parser.add_argument("--forms", default="gaussian,mixture,vamp,flow", help=f"of {', '.join(known)}; separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    parser.add_argument("--latents", help="sizes of the latent, separated by commas; 2, with --mnist 40")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="the folder with MNIST's IDX files, plain or .gz")
    parser.add_argument("--minutes", type=float, default=58, help="with --mnist: for everything together")
    parser.add_argument("--draws", type=int, default=1000, help="with --mnist: draws of IWAE for each test image")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_intermixed_args()
    args.forms = [form for form in args.forms.split(",") if form]
    if unknown := [form for form in args.forms if form not in known]:
        parser.error(f"no form is called {', '.join(unknown)}; there are {', '.join(known)}")
    args.latents = [int(n) for n in (args.latents or ("40" if args.mnist else "2")).split(",")]
    return args


def main() -> int:
    args = command_line()
    rows = Rows("digits", args.results, args.again)
    data = {"data": "mnist", "minutes": args.minutes} if args.mnist else {"data": "digits"}
    keys: list[Key] = [
        {**data, "form": form, "latents": latents, "seed": seed, "overrides": args.overrides}
        for latents in args.latents
        for seed in range(args.seeds)
        for form in args.forms
    ]
    if args.mnist:
        import mnist

        failed = 0 if args.print else mnist.measure(rows, keys, args, lambda job, *limits: call(__file__, job, *limits))
        out = mnist.report([row for row in rows if row["key"] in keys])
    else:
        failed = 0 if args.print else rows.measure(keys, lambda key: call(__file__, key, 1, 3600))
        out = report(rows, None if args.print else keys)
    if args.json:
        print(json.dumps(out))
    return failed


if __name__ == "__main__":
    script(main, work)
