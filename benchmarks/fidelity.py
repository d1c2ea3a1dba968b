"""How sharp decoded pictures are, and how true: a VAE's decoder against decoders that draw by diffusion, on the same features.

    python benchmarks/fidelity.py                                   # seeds 0 1 2, some 15 minutes each on one thread
    python benchmarks/fidelity.py --device cuda --updates 10000
    python benchmarks/fidelity.py --print                           # the table of what is there

Frames are Pendulum's at 64x64 pixels, drawn from its state (rod, and an arc that shows the speed), so that one frame determines
the state. The data set is the same for all seeds: 60 episodes for training and 30 for testing. An encoder and the standard
decoder are trained as a VAE; on the same features, without gradient into them, the refiner of `diffusion` and the whole of
 `latent_diffusion` are trained beside it. Measured on the test frames' features:

    sharpness  mean gradient of the pictures over that of the real frames: 1 is right, less is blurred, more is noisy
    contours   the same of its square (Tenengrad: Krotkov 1987), in which faint grain on flat ground hardly counts and edges do
    frechet    Frechet distance to the real frames in the features of a state probe, a small CNN that predicts a frame's state,
               trained on real training frames alone; `real` is the distance between two halves of the test frames' episodes
    probe      error of the probe's state on the picture over that on the VAE's picture (root mean square, in deviations)
    frames/s   of decoding 64 features at once
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from PIL import Image
from rows import Load, Row, Rows, call, grouped, marked, options, say, script, table, timed
from tables import spread
from torch import Tensor, nn

from worldmodel.data import Sampling
from worldmodel.decoders import DiffusionDecoderConfig, LatentDiffusionDecoderConfig
from worldmodel.distributions import Gaussian, GaussianConfig, GaussianLatent, GaussianLatentConfig
from worldmodel.encoders import Encoder, EncoderConfig
from worldmodel.envs.draw import scene
from worldmodel.nn.networks import MLP, ConvEncoder
from worldmodel.registry import build
from worldmodel.spaces import ObsSpec

SIDE, LENGTH, TRAIN, TEST = 64, 60, 60, 30
LATENT, BATCH, STEPS = 8, 32, (3, 5)
PICTURES = ("vae", *(f"{kind}@{n}" for kind in ("diffusion", "latent") for n in STEPS))


# Data -----------------------------------------------------------------------------------------------------------------


def episodes(first: int, count: int) -> tuple[Tensor, Tensor]:
    """(frames [count, LENGTH, 3, 64, 64] in [0, 1], states [count, LENGTH, 3]) of seeds first.., pushed to all angles."""
    env, draw = gym.make("Pendulum-v1"), scene("Pendulum-v1").draw
    frames, states = [], []
    for seed in range(first, first + count):
        rng, (obs, _) = np.random.default_rng(seed), env.reset(seed=seed)
        for _ in range(LENGTH):
            states.append(obs)
            frames.append(np.asarray(Image.fromarray(draw(obs)).resize((SIDE, SIDE), Image.Resampling.BOX)))
            push = 2 * np.sign(obs[2]) if rng.random() < 0.6 else rng.uniform(-2, 2)
            obs = env.step(np.array([push], np.float32))[0]
    pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return pictures.view(count, LENGTH, 3, SIDE, SIDE), torch.from_numpy(np.stack(states)).view(count, LENGTH, 3)


# Metrics --------------------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """Frame -> state in deviations; `features` is the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = ConvEncoder((3, SIDE, SIDE), 8)
        self.perceptron = MLP(self.convolutions.out_features, 64, 1)
        self.out = nn.Linear(64, 3)

    def features(self, frames: Tensor) -> Tensor:
        return self.perceptron(self.convolutions(frames))

    def forward(self, frames: Tensor) -> Tensor:
        return self.out(self.features(frames))


def frechet(one: Tensor, other: Tensor) -> float:
    """Between Gaussians with the mean and covariance of two sets of features [N, D]. Source: Heusel et al. 2017, eq. 6."""
    one, other = one.double().cpu(), other.double().cpu()
    first, second = one.T.cov(), other.T.cov()
    root = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return float((one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)


def edges(frames: Tensor) -> tuple[float, float]:
    """(mean length, mean squared length) of the gradient of brightness."""
    grey = frames.mean(1)
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    squares = across.square() + down.square()
    return float(squares.sqrt().mean()), float(squares.mean())


# One seed -------------------------------------------------------------------------------------------------------------


class Decoders(nn.Module):
    """An encoder, and the decoders that read the same features."""

    def __init__(self, depth: int, sampler: str):
        super().__init__()
        spec = ObsSpec.from_space(spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8))
        self.latent = GaussianLatent(GaussianLatentConfig(size=LATENT))
        self.encoder = Encoder(EncoderConfig(depth=depth), spec)
        self.posterior = nn.Linear(self.encoder.out_features, self.latent.parameters)
        self.prior = Gaussian(GaussianConfig(standard=True), self.latent, 0)
        own = {"depth": depth, "gradient": "stop"}
        self.diffusion = build(
            "decoder", DiffusionDecoderConfig(refine_depth=depth, frames=BATCH, sampler=sampler, **own), spec, LATENT, LATENT
        )
        self.drawn = build("decoder", LatentDiffusionDecoderConfig(**own), spec, LATENT, LATENT)

    def feature(self, frames: Tensor, generator: torch.Generator):
        """(posterior, a draw from it)."""
        posterior = self.latent.distribution(self.posterior(self.encoder({"obs": frames})))
        return posterior, self.latent.draw(posterior, Sampling(generator=generator), (len(frames),), frames.device)

    def loss(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        posterior, latent = self.feature(frames, generator)
        terms = list(self.diffusion.loss(latent, {"obs": frames}, Sampling(generator=generator)).values())
        terms += self.drawn.loss(latent.detach(), {"obs": frames}, Sampling(generator=generator)).values()
        return sum(term.mean() for term in terms) + posterior.kl(self.prior.given(None)).mean()

    def pictures(self, feature: Tensor, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
        """What decodes the features, by the name of the picture."""

        def draw(decoder: nn.Module, steps: int) -> Tensor:
            return decoder.sample(feature, Sampling(generator=generator, steps=steps))["obs"]

        made = {"vae": lambda: self.diffusion.mean(feature)["obs"]}
        for steps in STEPS:
            made |= {
                f"diffusion@{steps}": partial(draw, self.diffusion, steps),
                f"latent@{steps}": partial(draw, self.drawn, steps),
            }
        return made


def train(
    module: nn.Module, loss: Callable[[Tensor], Tensor], count: int, updates: int, lr: float, rng: np.random.Generator
) -> None:
    """Adam with a cosine schedule; `loss` gets the indices of a batch's frames."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    module.train()
    for update in range(updates):
        value = loss(torch.from_numpy(rng.integers(count, size=BATCH)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1000.0)
        optimizer.step()
        schedule.step()
        if update % 250 == 0:
            say(f"  update {update} of {updates}: loss {float(value.detach()):.2f}")
    module.eval()


def work(job: Row) -> Row:
    """The result of one seed."""
    device, rng = torch.device(job["device"]), np.random.default_rng(job["seed"])
    torch.manual_seed(job["seed"])
    generator = torch.Generator(device).manual_seed(job["seed"])
    (seen, states), (unseen, truth) = (tuple(x.to(device) for x in episodes(*which)) for which in ((0, TRAIN), (1000, TEST)))
    seen, states, deviation = seen.flatten(0, 1), states.flatten(0, 1), states.flatten(0, 1).std(0)
    probe, decoders = Probe().to(device), Decoders(job["depth"], job["sampler"]).to(device)
    since = time.perf_counter()
    with Load() as load:
        error = lambda indices: (probe(seen[indices]) - states[indices] / deviation).square().mean()  # noqa: E731
        train(probe, error, len(seen), job["probe_updates"], 2e-3, rng)
        train(decoders, lambda indices: decoders.loss(seen[indices], generator), len(seen), job["updates"], 1e-3, rng)
    seconds = time.perf_counter() - since
    with torch.no_grad():
        return measure(decoders, probe, unseen, truth / deviation, generator) | {"train_seconds": seconds, "foreign": load.cores}


def measure(decoders: Decoders, probe: Probe, unseen: Tensor, truth: Tensor, generator: torch.Generator) -> Row:
    """The quality of the pictures of test frames, and the speed of decoding."""
    halves = [probe.features(half.flatten(0, 1)) for half in (unseen[::2], unseen[1::2])]
    real, truth = unseen.flatten(0, 1), truth.flatten(0, 1)
    features = probe.features(real)
    wrong = lambda frames: float((probe(frames) - truth).square().mean().sqrt())  # noqa: E731
    feature = decoders.feature(real, generator)[1]
    made = {name: torch.cat(parts) for name, parts in _in_parts(decoders, feature, generator).items()}
    out: Row = {"real": {"frechet": frechet(*halves), "probe_error": wrong(real)}}
    for name, frames in made.items():
        out[name] = {
            **{name: own / true for name, own, true in zip(("sharpness", "contours"), edges(frames), edges(real), strict=True)},
            "frechet": frechet(features, probe.features(frames)),
            "probe_error": wrong(frames),
            "pixel_error": float((frames - real).square().mean().sqrt()),
        }
    for name, decode in decoders.pictures(feature[:64], generator).items():
        synchronise = torch.cuda.synchronize if feature.is_cuda else lambda: None
        took = timed(lambda decode=decode, wait=synchronise: (decode(), wait()), 3, 0.3, 20.0)
        out[name] |= {"frames_per_second": 64_000 / sorted(took["ms"])[1], "quiet": took["quiet"]}
    name = torch.cuda.get_device_name() if feature.is_cuda else "cpu"
    return {
        "pictures": out,
        "device_name": name,
        "parameters": {k: sum(p.numel() for p in v.parameters()) for k, v in decoders.named_children()},
    }


def _in_parts(decoders: Decoders, feature: Tensor, generator: torch.Generator) -> dict[str, list[Tensor]]:
    parts: dict[str, list[Tensor]] = {name: [] for name in PICTURES}
    for part in feature.split(256):
        for name, decode in decoders.pictures(part, generator).items():
            parts[name].append((decode().clamp(0, 1) * 255).round() / 255)  # as frames are stored
    return parts


# All of them ----------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> str:
    """One line for each kind of picture, device and number of updates: medians over seeds, [min..max]."""
    lines, kinds = [], ("sharpness", "contours", "frechet")
    groups = grouped(rows, lambda row: (row["device_name"], *(row["key"][name] for name in ("updates", "depth", "sampler"))))
    for (*where, sampler), found in groups.items():
        distance = spread(row["pictures"]["real"]["frechet"] for row in found)
        lines.append([marked("real", found), *where, "", len(found), "1", "1", distance, "", ""])
        for name in PICTURES:
            cells = [spread(row["pictures"][name][kind] for row in found if kind in row["pictures"][name]) for kind in kinds]
            probe = spread(row["pictures"][name]["probe_error"] / row["pictures"]["vae"]["probe_error"] for row in found)
            speed = spread(row["pictures"][name]["frames_per_second"] for row in found)
            lines.append([marked(name, found), *where, sampler if "diffusion" in name else "", len(found), *cells, probe, speed])
    return table(["pictures", "device", "updates", "depth", "sampler", "seeds", *kinds, "probe", "frames/s"], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=3000, help=f"of {BATCH} frames each")
    parser.add_argument("--probe-updates", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=8, help="channels of encoder, decoders and U-Net")
    parser.add_argument("--sampler", choices=("multistep", "euler", "heun"), default="euler", help="of the refiner")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="all rows as one JSON list instead of the table")
    args = parser.parse_args()
    rows = Rows("fidelity", args.results, args.again)
    names = ("device", "updates", "depth", "probe_updates", "sampler")
    keys = [{"row": "fidelity", "seed": seed, **{name: getattr(args, name) for name in names}} for seed in args.seeds]
    run = lambda key: call(__file__, key, args.threads, 4 * 3600)  # noqa: E731
    failed = 0 if args.print else rows.measure(keys, run, lambda key: args.threads)
    print(json.dumps(list(rows)) if args.json else report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
