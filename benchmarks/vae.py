"""A variational autoencoder with any prior of its latents: its parts, training, and figures. Used by `digits.py` and `mnist.py`.

The prior is built through the registry as a model builds it; everything else is the same for every form. Within a seed all forms
start with the same encoder and decoder and train on the same batches with the same noise.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from worldmodel import registry
from worldmodel.config import Frozen
from worldmodel.data import Sampling
from worldmodel.diagnostics.likelihood import Importance, concatenated, importance
from worldmodel.distributions import EncoderInterface, GaussianLatent, GaussianLatentConfig, GaussianPosterior, PosteriorSource
from worldmodel.model import active_units
from worldmodel.nn.networks import MLP

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
"""Options of each form of the prior, on the small digits."""


class Setup(Frozen):
    """What all forms share."""

    latents: int = Field(2, ge=1, description="size of a latent")
    batch: int = Field(100, ge=1, description="observations in an update")
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam")
    epochs: int = Field(500, ge=1, description="passes over the training set at most")
    patience: int = Field(50, ge=1, description="epochs without a better validation ELBO after which it ends")
    warmup: float = Field(0.0, ge=0, le=1, description="share of the schedule in which the rate's weight grows from 0 to 1")
    decay: float = Field(0.0, ge=0, le=1, description="share of the schedule in which the learning rate falls to 0, at its end")
    average: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights, which are validated and kept; 0: none")
    units: int = Field(128, ge=1, description="width of encoder and decoder")
    layers: int = Field(2, ge=1, description="hidden layers of each")
    init: Literal["torch", "offset"] = Field("torch", description="first weights: torch's, or those of `networks.MLP`")
    clip: float = Field(100.0, gt=0, description="maximum norm of a gradient")
    noises: int = Field(4, ge=1, description="draws of each latent in the validation ELBO")
    seconds: float = Field(math.inf, gt=0, allow_inf_nan=True, description="time after which it ends; the schedule follows it")


class VAE(nn.Module):
    """Encoder, prior and decoder of observations [N, *shape] in [0, 1].

    body     observations -> [N, E];  head  [N, E] -> parameters of a posterior
    decoder  latents [*N, Z] -> input of `likelihood`
    likelihood  (output of the decoder, x [N, *shape]) -> ln p(x|z) [*N]
    prior    its config; made last, so that the first weights of the others do not depend on it
    """

    def __init__(self, shape: tuple[int, ...], latents: int, body: nn.Module, decoder: nn.Module, likelihood, prior: Any):
        super().__init__()
        self.latent = GaussianLatent(GaussianLatentConfig(size=latents))
        self.body, self.decoder, self.likelihood = body, decoder, likelihood
        self.head = nn.Linear(body.out_features, self.latent.parameters)
        source = PosteriorSource(EncoderInterface({"image": shape}, body.out_features, self.embed), 0, self.posterior)
        self.prior = registry.build("distribution", prior, self.latent, 0, source)

    def embed(self, obs: dict[str, Tensor]) -> Tensor:
        return self.body(obs["image"].flatten(1))

    def posterior(self, embed: Tensor, h: Tensor | None = None) -> GaussianPosterior:
        return self.latent.distribution(self.head(embed))

    def encode(self, x: Tensor) -> GaussianPosterior:
        return self.posterior(self.embed({"image": x}))

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """ln p(x|z) [*N] of latents [*N, Z], the last of *N along x."""
        return self.likelihood(self.decoder(z), x)


class Gated(nn.Module):
    """(V x + a) sigmoid(W x + b). Source: Dauphin et al. 2017; van den Oord et al. 2016."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.both, self.out_features = nn.Linear(inputs, 2 * outputs), outputs
        nn.init.kaiming_normal_(self.both.weight)
        nn.init.zeros_(self.both.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.both(x), -1)


def perceptron(inputs: int, outputs: int | None, setup: Setup) -> nn.Sequential:
    """`setup.layers` hidden layers of `setup.units` SiLUs; without `outputs`, the last of them is the output."""
    if setup.init == "offset":
        return MLP(inputs, setup.units, setup.layers, outputs, norm=False)
    widths = [inputs, *[setup.units] * setup.layers]
    parts = [part for one, two in pairwise(widths) for part in (nn.Linear(one, two), nn.SiLU())]
    net = nn.Sequential(*parts, *([] if outputs is None else [nn.Linear(widths[-1], outputs)]))
    net.out_features = outputs or widths[-1]
    return net


# Likelihoods ------------------------------------------------------------------------------------------------------------


class Logistic:
    """Each number is one of `levels` evenly spaced ones in [0, 1]: a logistic distribution in bins, the outer two without end.

    The decoder gives a centre and a log scale for each. Source: Salimans et al. 2017 (PixelCNN++), eq. 2, with one component.
    """

    outputs = 2

    def __init__(self, levels: int):
        self.levels = levels

    def __call__(self, out: Tensor, x: Tensor) -> Tensor:
        centre, log_scale = out.unflatten(-1, (-1, 2)).unbind(-1)
        sharpness, half = (-log_scale.clamp(-6, 1)).exp(), 0.5 / (self.levels - 1)
        x = x.flatten(1)
        below, above = (x > half).to(out), (x < 1 - half).to(out)  # whether the bin ends on that side
        upper, lower = (x - centre + half) * sharpness, (x - centre - half) * sharpness
        # s(u) - s(l) = s(u) s(-l) (1 - exp(l - u)): no difference of two numbers that are almost the same
        ends = above * F.logsigmoid(upper) + below * F.logsigmoid(-lower)
        return (ends + above * below * torch.log(-torch.expm1(-2 * half * sharpness))).sum(-1)


class Bernoulli:
    """Each number is 0 or 1."""

    outputs = 1

    def __call__(self, out: Tensor, x: Tensor) -> Tensor:
        # ln sigmoid(out) where x is 1 and ln sigmoid(-out) where it is 0: one pass instead of the two of a cross-entropy
        return -F.softplus(out * (1 - 2 * x.flatten(1))).sum(-1)


class Normal(nn.Module):
    """Each number is normal around the decoder's output, all with one learned deviation."""

    outputs = 1

    def __init__(self, log_sigma: float = -1.0):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(log_sigma))

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        away = (x.flatten(1) - out) / self.log_sigma.exp()
        return (-0.5 * away.square() - self.log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)


# Training ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """The random numbers of one seed, apart, so that noise drawn by a form does not change the batches."""

    rows: torch.Generator
    latents: torch.Generator
    pixels: torch.Generator
    prior: torch.Generator

    @classmethod
    def of(cls, seed: int) -> Streams:
        return cls(*(torch.Generator().manual_seed(4 * seed + n) for n in range(4)))


def prior_config(options: dict[str, Any]) -> Any:
    """The config of a prior from {"kind": ..., option: ...}; ConfigError for a kind or option that does not exist."""
    return registry.config_class("distribution", options["kind"]).parse(options)


def parted(overrides: list[str], form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`flow.units=32 lr=0.001` as (options of this form's prior, options of the set-up)."""
    own, shared = {}, {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"'{text}' is no option: write name=value, as in lr=0.001 or flow.units=32.")
        kind, dot, option = name.partition(".")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # an option may be a word
        if not dot:
            shared[name] = value
        elif kind == form:
            own[option] = value
    return own, shared


def seeded(seed: int, make: Callable[[], VAE], begin: Tensor | None = None) -> VAE:
    """A model whose first weights come from `seed` alone; the process's own random state stays as it was.

    begin  observations that pseudo-inputs start at
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = make()
    if begin is not None and hasattr(vae.prior, "init_pseudo_inputs"):
        order = torch.randperm(len(begin), generator=torch.Generator().manual_seed(seed))
        vae.prior.init_pseudo_inputs({"image": begin[order]})
    return vae


def learn(
    vae: VAE,
    train: Tensor,
    valid: Tensor,
    setup: Setup,
    seed: int,
    binary: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains until the validation ELBO is no better; leaves the best weights. `binary`: pixels are drawn anew in each batch.

    Forms with an exact density learn with the encoder, by their rate. The others learn by their own loss on detached latents,
    and their frozen rate trains the encoder.
    """
    streams, started, cpu = Streams.of(seed), time.perf_counter(), time.process_time()
    optimizer = torch.optim.Adam(vae.parameters(), lr=setup.lr, fused=True)
    averaged = copy.deepcopy(vae) if setup.average else vae
    best, kept, at = -math.inf, copy.deepcopy(vae.state_dict()), 0
    valid = binarised(valid, torch.Generator().manual_seed(1)) if binary else valid
    updates = epoch = 0
    for epoch in range(1, setup.epochs + 1):
        done = max((epoch - 1) / setup.epochs, (time.perf_counter() - started) / setup.seconds)
        if done >= 1 or epoch - at > setup.patience:
            break
        beta = min(1.0, done / setup.warmup) if setup.warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = setup.lr * min(1.0, max(0.01, (1 - done) / setup.decay) if setup.decay else 1.0)
        vae.train()
        for rows in torch.randperm(len(train), generator=streams.rows).split(setup.batch):
            if time.perf_counter() - started >= setup.seconds:
                break
            x = binarised(train[rows], streams.pixels) if binary else train[rows]
            _update(vae, optimizer, x, rows, beta, setup.clip, streams)
            updates += 1
            if averaged is not vae:
                update_average(averaged, vae, setup.average)
        elbo = validation(averaged, valid, setup.noises)
        if beta < 1:
            at = epoch  # patience starts when the rate has its full weight
        elif elbo > best:
            best, kept, at = elbo, copy.deepcopy(averaged.state_dict()), epoch
        log(f"epoch {epoch} beta {beta:.2f} validation ELBO {elbo:.3f} best {best:.3f}, {time.perf_counter() - started:.0f} s")
    vae.load_state_dict(kept)
    vae.eval()
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return {"epochs": epoch, "best_epoch": at, "updates": updates, "validation": best, **seconds}


def _update(vae: VAE, optimizer, x: Tensor, rows: Tensor, beta: float, clip: float, streams: Streams) -> None:
    posterior = vae.encode(x)
    z = posterior.sample(vae.latent.noise((len(x),), streams.latents, x.device))
    prior, sampling = vae.prior, Sampling(generator=streams.prior)
    exact = prior.density == "exact"
    rate = prior.rate(posterior, z, None, frozen=not exact, sampling=sampling, rows=rows)
    loss = (beta * rate - vae.log_likelihood(z, x)).mean()
    if not exact:
        loss = loss + sum(term.mean() for term in prior.loss(z.detach(), None, sampling=sampling, rows=rows).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(vae.parameters(), clip)
    if torch.isfinite(norm):
        optimizer.step()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the exponential average of the model's weights; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for own, new in zip(average.buffers(), model.buffers()):
        own.copy_(new)


@torch.no_grad()
def validation(vae: VAE, x: Tensor, noises: int, chunk: int = 2000) -> float:
    """The mean ELBO with the same noise at every call, in nats."""
    vae.eval()
    generator, total = torch.Generator().manual_seed(0), 0.0
    prior, _ = log_prior(vae)
    for part in x.split(chunk):
        posterior = vae.encode(part)
        z = posterior.sample(vae.latent.noise((noises, len(part)), generator, part.device))
        total += float((vae.log_likelihood(z, part) + prior(z) - posterior.log_prob(z)).mean(0).sum())
    return total / len(x)


def binarised(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel 1 with its brightness as the probability."""
    return (torch.rand(x.shape, generator=generator) < x).to(x)


# Measuring --------------------------------------------------------------------------------------------------------------


def log_prior(vae: VAE, finely: bool = False) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    """(ln p(z) of latents [*N, Z], normalised; figures of the normaliser where it is estimated).

    `finely`: annealed importance sampling for a normaliser and the ODE for a form with a bound, instead of the cheaper ways.
    """
    prior = vae.prior
    if prior.density == "unnormalised":
        sampling = Sampling(generator=torch.Generator().manual_seed(0))
        log_z, ess = prior.log_z(None, 2000 if finely else 1000, sampling, **({"ais": True} if finely else {}))
        normaliser = float(log_z.squeeze())
        return lambda z: prior.log_prob(z, None) - normaliser, {"log_z": normaliser, "log_z_ess": float(ess.squeeze())}
    if prior.density == "bound" and finely and hasattr(prior, "ode_log_prob"):
        return lambda z: prior.ode_log_prob(z, None), {}
    return lambda z: prior.log_prob(z, None), {}


@torch.no_grad()
def weighed(vae: VAE, x: Tensor, draws: int, seed: int, prior: Callable[[Tensor], Tensor], rows: int = 500) -> Importance:
    """`draws` importance-weighted draws for each observation, `rows` observations at a time."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for part in x.split(rows):
        likelihood = lambda z, part=part: vae.log_likelihood(z, part)  # noqa: E731
        parts.append(importance(vae.encode(part), vae.latent, prior, likelihood, draws, generator))
    return concatenated(parts)


def figures(vae: VAE, x: Tensor, found: Importance) -> dict[str, Any]:
    """The figures of a trained model, in nats per observation."""
    with torch.no_grad():
        mean = vae.encode(x).mean
    return {
        "nats": float(found.nats.mean()),
        "curve": {str(k): nats for k, nats in found.curve().items()},
        "ess": float(found.ess.median()),
        "rate": float(found.rate.mean()),
        "distortion": float(found.distortion.mean()),
        "active": active_units(mean),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "law_parameters": sum(p.numel() for p in vae.prior.parameters()),
    }
