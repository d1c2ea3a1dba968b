"""How likely held-out digits are under a VAE, by the form of its prior: nats, and the gain over N(0, I) paired by seed.

    python benchmarks/digits.py
    python benchmarks/digits.py --forms gaussian,mixture,vamp,flow --seeds 5 --latents 2 --json
    python benchmarks/digits.py --forms gaussian,vamp --seeds 2 vamp.components=200 lr=0.0005
    python benchmarks/digits.py --forms ppca
    python benchmarks/digits.py --mnist DIR --forms gaussian,vamp --seeds 1 --minutes 60 --json
    python benchmarks/digits.py --print

The 1,797 digits of scikit-learn, 8 x 8 pixels of 17 grey levels, are split 1000/350/447 once and for all. Encoder and decoder
are perceptrons; the decoder gives each pixel a discretised logistic, its two outer levels reaching to infinity. Within a seed every
form begins with the same weights and sees the same batches and noise (`vae.py`), under the same limits; the best validation ELBO
is kept. Test images are scored by IWAE with 1000 draws. `diffusion` puts its ODE likelihood into that, and `energy` its density
over a normaliser estimated by annealed importance sampling: no bounds in the same sense, and listed apart.

`ppca`: a linear VAE on the same digits as real numbers, whose exact likelihood is known.
`--mnist DIR`: the VampPrior paper's set-up on MNIST's own files (`mnist.py`), within `--minutes`, two forms at once.
`--json`: the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rows import STALE, Load, Rows, number, options, stale, table

FORMS: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian", "standard": True},
    "gaussian_learned": {"kind": "gaussian"},
    "mixture": {"kind": "mixture", "components": 32},
    "vamp": {"kind": "vamp", "components": 100},
    "flow": {"kind": "flow"},
    "hierarchical": {"kind": "hierarchical"},
    "energy": {"kind": "energy"},
    "diffusion": {"kind": "diffusion"},
}
APART = {"energy": "AIS", "diffusion": "ODE"}
"""Forms whose likelihood is no bound of the same kind, and what it comes from."""
FEWER = {"diffusion": 100}
"""Draws of forms for which 1000 would take minutes; they are compared at equal draws."""
LEVELS, SPLIT, DRAWS = 17, (1000, 350, 447), 1000


# Data and models --------------------------------------------------------------------------------------------------------


def digits():
    """(train, validation, test) [N, 1, 8, 8] in [0, 1], always the same."""
    import torch
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images / (LEVELS - 1), dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].split(SPLIT)


def model(form: str, seed: int, own: dict[str, Any], train, setup):
    """The VAE of one form and seed; `own`: options of the law; `train`: what pseudo-inputs begin with."""
    import vae

    default = {"top": max(1, setup.latents // 2)} if form == "hierarchical" else {}
    law, likelihood, size = vae.law_config({**FORMS[form], **default, **own}), vae.Logistic(LEVELS), train[0].numel()

    def make():
        body = vae.perceptron(size, None, setup)
        decoder = vae.perceptron(setup.latents, size * likelihood.outputs, setup)
        return vae.VAE(tuple(train.shape[1:]), setup.latents, body, decoder, likelihood, law)

    return vae.seeded(seed, make, begin=train)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One form and seed, from first weights to test likelihood."""
    if "mnist" in job:
        from mnist import work as on_mnist

        return on_mnist(job, FORMS)
    import vae

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


def ppca(train, test, job: dict[str, Any]) -> dict[str, Any]:
    """A linear VAE beside the exact likelihood of its own decoder, and of the best linear model there is."""
    import torch
    import vae

    from worldmodel.diagnostics.likelihood import FactorModel, importance

    body = torch.nn.Flatten()
    body.out_features = 64
    likelihood = vae.Normal()
    decoder = torch.nn.Linear(job["latents"], 64)
    law = vae.law_config(FORMS["gaussian"])
    linear = vae.seeded(job["seed"], lambda: vae.VAE((1, 8, 8), job["latents"], body, decoder, likelihood, law))
    found = vae.learn(
        linear,
        train,
        train,
        vae.Setup(latents=job["latents"], lr=1e-2, decay=0.5, average=0, epochs=300, patience=300),
        job["seed"],
    )
    own = FactorModel(decoder.bias.detach(), decoder.weight.detach(), float(likelihood.log_sigma.detach().exp()))
    generator = torch.Generator().manual_seed(job["seed"])
    weighed = importance(
        linear.encode(test), linear.latent, vae.log_prior(linear)[0], lambda z: linear.log_likelihood(z, test), DRAWS, generator
    )
    exact, best = own.log_prob(test.flatten(1)).mean(), FactorModel.fit(train.flatten(1), job["latents"])
    return {
        **found,
        **vae.figures(linear, test, weighed),
        "draws": DRAWS,
        "exact": float(exact),
        "gap": float(exact - weighed.nats.double().mean()),
        "ppca": float(best.log_prob(test.flatten(1)).mean()),
    }


def parted(overrides: list[str], form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`flow.units=32 lr=0.001` as (options of this form's law, options of the set-up)."""
    own, shared = {}, {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"'{text}' is no option: write name=value, as in lr=0.001 or flow.units=32.")
        kind, dot, option = name.partition(".")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # a word, which an option may be
        if not dot:
            shared[name] = value
        elif kind == form:
            own[option] = value
    return own, shared


# What the rows say ------------------------------------------------------------------------------------------------------


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
        means = ("nats", "rate", "distortion", "active", "ess", "cpu_seconds", "parameters", "law_parameters", "best_epoch")
        shown = {name: statistics.mean(row[name] for row in rows.values()) for name in means}
        out[form] = {
            "stale": any(map(stale, rows.values())),
            "kind": f"IWAE-{next(iter(rows.values()))['draws']}" + (f" of {APART[form]}" if form in APART else ""),
            "seeds": sorted(rows),
            **shown,
        }
        for name in ("exact", "gap", "ppca", "log_z", "log_z_ess"):
            if name in next(iter(rows.values())):
                out[form][name] = statistics.mean(row[name] for row in rows.values())
        gain = clustered_mean(rows, group.get("gaussian", {})) if form not in ("gaussian", "ppca") else None
        if gain is not None:
            out[form]["gain"], out[form]["gain_se"] = gain
    return out


def targets(found: dict[str, dict[str, Any]], latents: int) -> list[dict[str, Any]]:
    """What was hoped for, and whether it came."""
    hoped = []
    for form, row in found.items():
        if "gain" in row and form not in APART:
            hoped.append(
                {"target": f"{form} within one standard error of N(0, I) or better", "met": row["gain"] >= -row["gain_se"]}
            )
        if "gain" in row and form in ("vamp", "flow") and latents == 2:
            hoped.append({"target": f"{form} better by more than one standard error", "met": row["gain"] > row["gain_se"]})
        if "gap" in row:
            hoped.append({"target": "ppca within 0.1 nat of the exact likelihood", "met": abs(row["gap"]) < 0.1})
    return [{"latents": latents, **line} for line in hoped]


def grouped(rows: Rows, keys: list[dict[str, Any]] | None) -> dict[int, dict[str, dict[int, dict[str, Any]]]]:
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
        cells = [f"{row[name]:.2f}" for name in ("nats",)] + [gain] + [f"{row[name]:.2f}" for name in ("rate", "distortion")]
        size = f"{number(row['parameters'])} ({number(row['law_parameters'])})"
        rest = [f"{row['active']:.1f}", f"{row['ess']:.0f}", f"{row['cpu_seconds']:.0f}", size]
        out.append([str(latents), f"{form} {STALE}" if row["stale"] else form, row["kind"], str(len(row["seeds"])), *cells, *rest])
    return out


HEAD = [
    "latents",
    "prior",
    "kind",
    "seeds",
    "nats",
    "over N(0, I)",
    "rate",
    "distortion",
    "active",
    "ESS",
    "cpu s",
    "parameters (law)",
]


def report(rows: Rows, keys: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Prints the table and what was hoped for; the same as one object."""
    out: dict[str, Any] = {"latents": {}, "targets": []}
    shown: list[list[str]] = []
    for latents, group in grouped(rows, keys).items():
        found = summary(group)
        out["latents"][str(latents)] = found
        out["targets"] += targets(found, latents)
        shown += lines(found, latents)
    print(table(HEAD, shown))
    for latents, found in out["latents"].items():
        if "ppca" in found:
            row = found["ppca"]
            say_ppca = (
                f"IWAE {row['nats']:.3f}, exact {row['exact']:.3f} (gap {row['gap']:.3f}), best linear model {row['ppca']:.3f}"
            )
            print(f"ppca, {latents} latents, continuous: {say_ppca}")
    for line in out["targets"]:
        print(f"{'met' if line['met'] else 'NOT MET'}: {line['target']} ({line['latents']} latents)")
    return out


# The command line -------------------------------------------------------------------------------------------------------


def command_line() -> tuple[argparse.Namespace, list[str]]:
    parser = options(__doc__)
    parser.add_argument(
        "--forms", default="gaussian,mixture,vamp,flow", help=f"of {', '.join([*FORMS, 'ppca'])}; separated by commas"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    parser.add_argument("--latents", help="numbers in a code, separated by commas; 2, with --mnist 40")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="the folder with MNIST's IDX files, plain or .gz")
    parser.add_argument("--minutes", type=float, default=58, help="with --mnist: for everything together")
    parser.add_argument("--draws", type=int, default=1000, help="with --mnist: draws of IWAE for each test image")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    args.forms = [form for form in args.forms.split(",") if form]
    unknown = [form for form in args.forms if form not in (*FORMS, "ppca")]
    if unknown:
        parser.error(f"no form is called {', '.join(unknown)}; there are {', '.join([*FORMS, 'ppca'])}")
    args.latents = [int(n) for n in (args.latents or ("40" if args.mnist else "2")).split(",")]
    return args, overrides


def main() -> int:
    args, overrides = command_line()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    rows = Rows("digits", args.results, args.again)
    if args.mnist:
        from mnist import measure

        out = measure(rows, args, overrides)
    else:
        keys = [
            {"data": "digits", "form": form, "latents": latents, "seed": seed, "overrides": overrides}
            for latents in args.latents
            for seed in range(args.seeds)
            for form in args.forms
        ]
        if not args.print:
            rows.measure(__file__, [(key, key, 1) for key in keys], 3600)
        out = report(rows, None if args.print else keys)
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
