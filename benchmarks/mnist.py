"""The VampPrior paper's VAE on MNIST, as far as an hour on two threads goes. Used by `digits.py --mnist DIR`.

40 latents, two gated layers of 300 in encoder and decoder, Bernoulli pixels drawn in each batch (those of the validation and
test sets once, with fixed seeds), Adam at 5e-4, batches of 100, a rate whose weight grows at the beginning, early stopping on the
validation ELBO. The last sixth of the training file is the validation set. What the time limit changes: warm-up is a share of the
schedule and not 100 epochs; the learning rate falls to 0 in its last part, as a constant one would need longer; pseudo-inputs
start at training images, the paper's other option: from zero they would take most of the hour to become digits.
Source: Tomczak and Welling 2018, section 5.1. It reports -84.5 nats (N(0, I)) and -82.4 (VampPrior, 500 pseudo-inputs).

The files are those of the MNIST database (`train-images-idx3-ubyte`, `t10k-images-idx3-ubyte`, plain or .gz); labels are not read.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vae
from rows import Key, Load, Row, Rows, say, table
from torch import Tensor, nn

from worldmodel.errors import ConfigError

SIDE, MAGIC, MAX_IMAGES = 28, 0x00000803, 1_000_000
"""Pixels of a side; "unsigned bytes, three axes"; images of a file at most."""
FORMS = {"vamp": {"components": 500}, "mixture": {"components": 500}}
"""Options of forms that differ from those on the small digits."""
PUBLISHED = {"gaussian": -84.5, "vamp": -82.4}
SHARE, SLACK, AT_ONCE = 0.87, 30.0, 100
"""The share of a form's time for training, the rest being for its likelihood; seconds for starting up; images scored at once,
few enough that their draws stay in the processor's caches."""


# Files ------------------------------------------------------------------------------------------------------------------


def images(folder: Path, name: str) -> Tensor:
    """`name` or `name.gz` of a folder as uint8 [N, 1, 28, 28]. ConfigError where it is missing or damaged."""
    file = next((file for file in (Path(folder) / name, Path(folder) / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise ConfigError(f"{folder} holds no {name} and no {name}.gz. Give the folder with the MNIST database's own files.")
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
        try:
            head = stream.read(16)
            if len(head) < 16:
                raise ConfigError(f"{file} ends within its head of 16 bytes. Fetch it again.")
            magic, count, height, width = struct.unpack(">4I", head)
            if magic != MAGIC:
                raise ConfigError(f"{file} begins with {magic:#010x} and not {MAGIC:#010x}: it is no IDX file of images.")
            if (height, width) != (SIDE, SIDE) or not 0 < count <= MAX_IMAGES:
                raise ConfigError(
                    f"{file} tells of {count} images of {height} x {width}; expected 1 to {MAX_IMAGES:,} of {SIDE} x {SIDE}."
                )
            pixels = stream.read(count * SIDE * SIDE + 1)  # one more byte than expected
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(f"{file} cannot be unpacked ({error}). Fetch it again.") from error
    if len(pixels) != count * SIDE * SIDE:
        held = "more" if len(pixels) > count * SIDE * SIDE else f"{len(pixels):,}"
        raise ConfigError(f"{file} tells of {count * SIDE * SIDE:,} pixels and holds {held}. Fetch it again.")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(count, 1, SIDE, SIDE).copy())


def split(folder: Path):
    """(train, validation, test) in [0, 1]: 50,000, 10,000 and 10,000 of the database's own."""
    known = images(folder, "train-images-idx3-ubyte").float() / 255
    return *known.tensor_split([len(known) - max(1, len(known) // 6)]), images(folder, "t10k-images-idx3-ubyte").float() / 255


# One form ---------------------------------------------------------------------------------------------------------------


def work(job: Row) -> Row:
    """One form and seed within `job["seconds"]`, from files to test likelihood."""
    started = time.perf_counter()
    train, valid, test = split(job["mnist"])
    own, shared = vae.parted(job["overrides"], job["form"])
    limit = job["seconds"] - SLACK
    given = {"latents": job["latents"], "lr": 5e-4, "batch": 100, "epochs": 2000, "patience": 50, "noises": 1}
    given |= {"warmup": 0.1, "decay": 0.4, "seconds": SHARE * limit}
    setup = vae.Setup.parse({**given, **shared})
    prior = vae.prior_config({**vae.FORMS[job["form"]], **FORMS.get(job["form"], {}), **own})
    model = vae.seeded(job["seed"], lambda: network(job["latents"], prior), train)
    with Load() as load:
        found = vae.learn(model, train, valid, setup, job["seed"], binary=True, log=lambda text: say(f"{job['form']}: {text}"))
        seen = vae.binarised(test, torch.Generator().manual_seed(2))
        seen, weighed = _within(model, seen, job["draws"], limit - (time.perf_counter() - started), job["seed"])
    return {**found, **vae.figures(model, seen, weighed), "images": len(seen), "draws": job["draws"], "foreign": load.cores}


def network(latents: int, prior):
    """The paper's VAE."""
    body = nn.Sequential(vae.Gated(SIDE * SIDE, 300), vae.Gated(300, 300))
    body.out_features = 300
    decoder = nn.Sequential(vae.Gated(latents, 300), vae.Gated(300, 300), nn.Linear(300, SIDE * SIDE))
    return vae.VAE((1, SIDE, SIDE), latents, body, decoder, vae.Bernoulli(), prior)


def _within(model, test, draws: int, seconds: float, seed: int):
    """As many of the first test images as can be scored in the time, at least 500, and their weights."""
    since = time.perf_counter()
    probe = test[:500]
    prior, _ = vae.log_prior(model, finely=True)
    vae.weighed(model, probe, 10, seed, prior, rows=AT_ONCE)
    each = (time.perf_counter() - since) / len(probe) * draws / 10
    seen = test[: max(500, int(0.8 * seconds / each))]
    say(f"scoring {len(seen)} of {len(test)} test images by {draws} draws, {each * len(seen):.0f} s")
    return seen, vae.weighed(model, seen, draws, seed, prior, rows=AT_ONCE)


# All forms --------------------------------------------------------------------------------------------------------------


def measure(rows: Rows, keys: list[Key], args: argparse.Namespace, call: Callable[..., Row]) -> int:
    """Measures what is missing, two forms at a time with a thread each and equal seconds for all; gives the number that failed.

    call  (job, threads, seconds) -> what `work` makes of it in a process of its own
    """
    split(args.mnist)  # a wrong file raises before anything runs
    missing = [key for key in keys if not rows.has(key)]
    threads = 2 if len(missing) == 1 else 1
    seconds = 60 * args.minutes / max(1, (len(missing) + 1) // 2)
    limits = {"mnist": str(args.mnist), "draws": args.draws, "seconds": seconds}
    run = lambda key: call({**key, **limits}, threads, 10 * seconds)  # noqa: E731
    return rows.measure(missing, run, lambda key: threads, at_once=2)


def report(rows: list[Row]) -> dict[str, Any]:
    """Prints the rows beside the published figures; means over seeds as one object."""
    lines, out = [], {}
    for form in dict.fromkeys(row["key"]["form"] for row in rows):
        group = [row for row in rows if row["key"]["form"] == form]
        names = ("nats", "rate", "distortion", "active", "ess", "epochs", "updates", "seconds", "parameters", "images", "draws")
        mean = {name: statistics.mean(row[name] for row in group) for name in names}
        out[form] = {"kind": f"IWAE-{group[0]['draws']}", "seeds": [row["key"]["seed"] for row in group], **mean}
        out[form]["published"] = PUBLISHED.get(form)
        cells = [f"{mean[name]:.2f}" for name in names[:3]] + [f"{mean[name]:,.0f}" for name in names[3:]]
        lines.append([form, str(len(group)), *cells, str(PUBLISHED.get(form, ""))])
    head = ["prior", "seeds", "nats", "rate", "distortion", "active", "ESS", "epochs", "updates", "seconds", "parameters"]
    print(table([*head, "test images", "draws", "published"], lines))
    if "gaussian" in out and "vamp" in out:
        out["gain"] = out["vamp"]["nats"] - out["gaussian"]["nats"]
        print(f"vamp over N(0, I): {out['gain']:+.2f} nats (published {PUBLISHED['vamp'] - PUBLISHED['gaussian']:+.1f})")
    return {"mnist": out}
