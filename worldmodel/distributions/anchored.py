"""Anchored latents: the observation's own numbers, and how they change.

Vectors, categories and bits are latents as they are; a Gaussian latent stands for pictures. The coordinate system on which encoder
and decoder agree is then the observation's own, and what a prior says of a latent it says of the observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Obs, Sampling
from worldmodel.distributions.base import ConditionalDistribution, PosteriorSource
from worldmodel.distributions.gaussian import GaussianLatent, GaussianLatentConfig, GaussianPosterior
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import SkipMLP, by_group, one_hot_sample
from worldmodel.registry import build
from worldmodel.spaces import ObsSpec

MIN_CHANGE = 1e-5
"""The smallest deviation of changes, in deviations of the observation: float32 tells no smaller ones apart."""
MARGIN = 2.0
"""Drawn numbers stay near this multiple of the largest that was seen, so that no dream overflows."""


@dataclass(frozen=True)
class Anchor:
    """What of an observation is its own latent, in the order [categories, bits, vectors].

    categories   sizes of the one-hot groups
    bits         binary numbers
    vectors      real numbers
    keys         {key: (first number, one after its last)} within the latent
    """

    categories: tuple[int, ...]
    bits: int
    vectors: int
    keys: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, spec: ObsSpec) -> Anchor:
        kinds = ("categorical", "binary", "vector")
        ordered = [(name, key) for kind in kinds for name, key in spec.keys.items() if key.kind == kind]
        keys, end = {}, 0
        for name, key in ordered:
            keys[name] = (end, end + key.shape[0])
            end += key.shape[0]
        width = {kind: sum(key.shape[0] for _, key in ordered if key.kind == kind) for kind in kinds}
        sizes = tuple(size for _, key in ordered if key.kind == "categorical" for size in key.sizes)
        return cls(sizes, width["binary"], width["vector"], keys)

    @property
    def discrete(self) -> int:
        """Numbers in front that are categories or bits."""
        return sum(self.categories) + self.bits

    @property
    def size(self) -> int:
        return self.discrete + self.vectors

    def split(self, z: Float[Tensor, "*N Z"]) -> Obs:
        """The scaled canonical observation in a latent."""
        return {name: z[..., first:last] for name, (first, last) in self.keys.items()}


@dataclass(frozen=True)
class AnchoredPosterior(Posterior):
    """All probability at what was observed, and a Gaussian of the latent of pictures.

    Densities are those of the pictures' latent: of the observed numbers every density is taken relative to this point.
    """

    observed: Float[Tensor, "*N W"]
    code: GaussianPosterior

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self._with(self.code.mean)

    @property
    def std(self) -> Tensor:
        return torch.cat([torch.zeros_like(self.observed), self.code.std], -1)

    def _with(self, code: Tensor) -> Tensor:
        return torch.cat([self.observed, code], -1)

    def sample(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        return self._with(self.code.sample(noise, temperature))

    def mirror(self, z: Tensor) -> Tensor | None:
        return self._with(self.code.mirror(z[..., self.observed.shape[-1] :]))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.code.log_prob(z[..., self.observed.shape[-1] :])

    def entropy(self) -> Tensor:
        return self.code.entropy()

    def kl_elements(self, other: Posterior) -> Tensor:
        """The rate of each number: -ln p of an observed one, the KL of one of the pictures' latent."""
        if not isinstance(other, GaussianPosterior):
            raise TypeError(f"KL of an observation against a {type(other).__name__} has no closed form.")
        width = self.observed.shape[-1]
        seen, code = (other.map(lambda x, rows=rows: x[..., rows]) for rows in (slice(width), slice(width, None)))
        each = GaussianPosterior(seen.mean.unsqueeze(-1), seen.std.unsqueeze(-1)).log_prob(self.observed.unsqueeze(-1))
        return torch.cat([-each, self.code.kl_elements(code)], -1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> AnchoredPosterior:
        return AnchoredPosterior(fn(self.observed), self.code.map(fn))


class AnchoredLatent(Latent):
    """An observation's own numbers, and a Gaussian latent of its pictures."""

    kind = "anchored"
    continuous = True
    axis = -1

    def __init__(self, anchor: Anchor, code: int):
        self.anchor = anchor
        self.code = GaussianLatent(GaussianLatentConfig.model_construct(size=code, min_std=0.01))  # 0 numbers without pictures
        self.size = self.variables = anchor.size + self.code.size
        self.numbers = self.size - anchor.discrete
        self.parameters = anchor.size + self.code.parameters

    @property
    def family(self) -> Latent:
        return GaussianLatent(GaussianLatentConfig(size=self.size))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
        return torch.randn(*shape, self.code.size, generator=generator, device=device)

    def distribution(self, parameters: Tensor) -> AnchoredPosterior:
        observed, code = parameters.float().split([self.anchor.size, self.code.parameters], -1)
        return AnchoredPosterior(observed, self.code.distribution(code))

    def part(self, variables: int) -> Latent:
        return self.family.part(variables)

    def traverse(self, z: Tensor, latents: Tensor, steps: int, width: float) -> Tensor:
        return self.family.traverse(z, latents, steps, width)


@dataclass(frozen=True)
class Reads:
    """What of a context h a transition reads: everything from `first` on.

    before, after   where z_{t-1} begins, and the first number after it
    The last number is 1 where there was a step before, and 0 where nothing was seen yet.
    """

    first: int
    before: int
    after: int


class Change(ConditionalDistribution):
    """p(z_t | h_t): numbers by how they change, categories and bits by a network; without a context p(z_0).

        (z_t - z_{t-1} - b) / s ~ form(h_t)      b, s: running mean and deviation of the changes

    Where nothing was seen before, which is so at the first row of a window that opens within an episode, numbers are N(0, 1) and
    the rest is uniform: nothing is learned there.

    The memory and the last change pass gates that are 0 at first (Bachlechner et al. 2021, ReZero): where an observation says all,
    other numbers that change from step to step double the error.

    Categories and bits have logits of two networks, of which only the second one reads the memory. It is used where it predicts
    rows better that it never learned from: where chance decides, a memory learns the sequences of the replay by heart.

    form     the distribution of changes that a config names
    reads    what it reads of h; None without a context
    linear   the size up to which a number of the latent is one of the observation, and not its logarithm
    """

    JUDGES, BLOCK = 8, 16
    """One block of rows in so many judges whether the memory helps, and so many rows are in each."""
    EVIDENCE_DECAY = 0.99
    """Of the running mean of what the memory adds to ln p at these rows."""

    def __init__(
        self,
        config: Frozen,
        latent: AnchoredLatent,
        context_dim: int,
        source: PosteriorSource | None,
        reads: Reads | None,
        linear: float,
    ):
        nn.Module.__init__(self)
        self.linear = linear
        self.latent, self.context_dim, self.reads, self.anchor = latent, context_dim, reads, latent.anchor
        inputs = context_dim - reads.first if reads else 0
        numbers = latent.family.part(latent.numbers) if latent.numbers else None
        self.form = build("distribution", config, numbers, inputs, source) if numbers else None
        self.density = self.form.density if self.form else "exact"
        self.fits_in_training = self.form is not None and self.form.fits_in_training
        self.moments = RunningMoments(latent.numbers)  # of all batches: where targets move by 2 %, so does the error
        self.register_buffer("largest", torch.zeros(latent.numbers))
        if reads:
            self.gates = nn.ParameterList(torch.zeros(n) for n in (reads.before - reads.first, latent.numbers))
        discrete, units = self.anchor.discrete, getattr(config, "units", 128)
        if discrete and inputs:
            self.logits = SkipMLP(context_dim - reads.before, units, 2, discrete)
            self.remembered = SkipMLP(inputs, units, 2, discrete)
            self.evidence = RunningMoments((), self.EVIDENCE_DECAY)
        elif discrete:
            self.free = nn.Parameter(torch.zeros(1, discrete))

    @property
    def members(self) -> int:
        """Members of an ensemble of distributions; 0 where the form is none."""
        return getattr(self.form, "members", 0)

    @property
    def deviation(self) -> Float[Tensor, " M"]:
        """s of the latent's M numbers."""
        return self.moments.deviation(MIN_CHANGE)

    # Between latents and what the form is a distribution of ------------------------------------------------------------------

    def _known(self, like: Tensor, context: Tensor | None) -> Bool[Tensor, "*N"]:
        return torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device) if context is None else context[..., -1] > 0.5

    def _shift_and_scale(self, context: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """(z_{t-1} + b, s) of the numbers; (0, 1) without a context."""
        if context is None:
            return 0.0, 1.0
        before = self._before(context)
        return before + self.moments.mean.float(), self.deviation

    def _before(self, context: Tensor) -> Float[Tensor, "*N M"]:
        """The numbers of z_{t-1}."""
        return context[..., self.reads.before + self.anchor.discrete : self.reads.after]

    def _read(self, context: Tensor | None) -> Tensor | None:
        """What the form reads: the memory and the last change through gates that open where they help, and all else."""
        if context is None:
            return None
        reads, numbers = self.reads, self.latent.numbers
        memory, z, change, rest = context[..., reads.first :].tensor_split(
            [reads.before - reads.first, reads.after - reads.first, reads.after - reads.first + numbers], -1
        )
        return torch.cat([self.gates[0] * memory, z, self.gates[1] * change, rest], -1)

    def _standardised(self, z: Tensor, context: Tensor | None) -> Float[Tensor, "*N M"]:
        shift, scale = self._shift_and_scale(context)
        return (z[..., self.anchor.discrete :] - shift) / scale

    def _volume(self, context: Tensor | None) -> Tensor | float:
        """ln of the volume that one unit of the form's numbers has in latents."""
        return 0.0 if context is None else self.deviation.log().sum()

    def _logits(self, context: Tensor | None) -> Float[Tensor, "*N V"]:
        if context is None:
            return self.free.float()
        without, added = self._logits_and_memory(context)
        return without + added * (self.evidence.mean > 0)

    def _logits_and_memory(self, context: Tensor) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N V"]]:
        """(logits without the memory, what it adds to them)."""
        return self.logits(context[..., self.reads.before :]).float(), self.remembered(self._read(context)).float()

    # Draws and density -------------------------------------------------------------------------------------------------------

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N Z"]:
        return self.draw(context, count, sampling)[0]

    def draw(
        self,
        context: Tensor | None,
        count: int = 1,
        sampling: Sampling | None = None,
        member: Int[Tensor, " N"] | None = None,
    ) -> tuple[Float[Tensor, "K N Z"], Float[Tensor, " N"]]:
        """(draws, of an ensemble's member where one is given; deviation between the members' means, a root mean square over the
        latent's numbers, 0 without members)."""
        sampling, parts, uncertainty = sampling or Sampling(), [], self.largest.new_zeros(())
        if self.anchor.discrete:
            parts.append(self._sample_discrete(context, count, sampling))
        if self.form is not None:
            shift, scale = self._shift_and_scale(context)
            if self.members:
                x, between = self.form.draw(self._read(context), count, sampling, member)
                uncertainty = (between * scale**2).mean(-1).sqrt()
            else:
                x = self.form.sample(self._read(context), count, sampling)
            parts.append(self._bounded(shift + scale * x))
        z = torch.cat(parts, -1)
        known = self._known(z[0], context)
        if not known.all():
            z = torch.where(known.unsqueeze(-1), z, self._unseen(z, sampling))
        return z, uncertainty.expand(z.shape[1:-1])

    def _bounded(self, numbers: Tensor) -> Tensor:
        """Numbers, which approach a bound beyond MARGIN times the largest that was seen.

        Beyond `linear` they are logarithms of observations, which a factor would raise to a power: there the margin is a sum.
        """
        bound = (MARGIN * (1 + self.largest)).minimum((self.largest + 1).clamp_min(self.linear - 1))
        excess = (numbers.abs() - bound).clamp_min(0)
        return torch.where(excess > 0, numbers.sign() * (bound - torch.expm1(-excess)), numbers)

    @torch.no_grad()
    def _extend(self, z: Float[Tensor, "N Z"]) -> None:
        """Takes in how large numbers are."""
        self.largest = torch.maximum(self.largest, z[..., self.anchor.discrete :].abs().amax(0))

    def _unseen(self, z: Tensor, sampling: Sampling) -> Tensor:
        """Draws where nothing was seen: normal numbers, and the categories and bits of `z`."""
        numbers = z[..., self.anchor.discrete :]
        normal = torch.zeros_like(numbers)
        if not sampling.mode:
            normal = torch.randn(numbers.shape, generator=sampling.generator, device=z.device) * sampling.temperature
        return torch.cat([z[..., : self.anchor.discrete], normal], -1)

    def _sample_discrete(self, context: Tensor | None, count: int, sampling: Sampling) -> Float[Tensor, "K N V"]:
        logits = self._logits(context)
        logits = logits.expand(count, *logits.shape)
        draw = None if sampling.mode else torch.rand(logits.shape, generator=sampling.generator, device=logits.device)
        sizes, first_bit = self.anchor.categories, sum(self.anchor.categories)
        groups, bits = logits.split([first_bit, self.anchor.bits], -1)
        parts = [torch.sigmoid(bits) > (0.5 if draw is None else draw[..., first_bit:])]
        if sizes:
            probs = by_group(partial(torch.softmax, dim=-1), sizes, groups)
            parts.insert(0, one_hot_sample(probs, sizes, None if draw is None else draw[..., :first_bit]))
        return torch.cat([part.to(logits) for part in parts], -1)

    def log_prob(self, x: Float[Tensor, "*N Z"], context: Tensor | None) -> Float[Tensor, "*N"]:
        numbers = None if self.form is None else self.form.log_prob(self._standardised(x, context), self._read(context))
        return self._with_discrete(x, context, numbers)

    def ode_log_prob(self, x: Float[Tensor, "*N Z"], context: Tensor | None, steps: int = 32) -> Float[Tensor, "*N"]:
        return self._with_discrete(x, context, self.form.ode_log_prob(self._standardised(x, context), self._read(context), steps))

    def _with_discrete(self, x: Tensor, context: Tensor | None, numbers: Tensor | None) -> Float[Tensor, "*N"]:
        """ln p of a latent from that of its standardised numbers."""
        known = self._known(x, context)
        total = self._discrete_log_prob(x, context, known)
        if numbers is None:
            return total
        normal = -(0.5 * (x[..., self.anchor.discrete :].square() + math.log(2 * math.pi))).sum(-1)
        return total + torch.where(known, numbers - self._volume(context), normal)

    def _discrete_log_prob(self, x: Tensor, context: Tensor | None, known: Tensor) -> Float[Tensor, "*N"]:
        if not self.anchor.discrete:
            return x.new_zeros(x.shape[:-1])
        return self._log_prob_of(self._logits(context) * known.unsqueeze(-1), x)  # zeros: uniform

    def _log_prob_of(self, logits: Float[Tensor, "*#N V"], x: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N"]:
        """ln p of a latent's categories and bits."""
        sizes, widths = self.anchor.categories, [sum(self.anchor.categories), self.anchor.bits]
        groups, bits = logits.expand(*x.shape[:-1], -1).split(widths, -1)
        chosen, ones = x[..., : self.anchor.discrete].split(widths, -1)
        total = -F.binary_cross_entropy_with_logits(bits, ones, reduction="none").sum(-1)
        if not sizes:
            return total
        each = by_group(lambda one, group: (one * group.log_softmax(-1)).sum(-1, keepdim=True), sizes, chosen, groups)
        return total + sum(each.unbind(-1))

    def log_z(
        self, context: Tensor | None, count: int = 1000, sampling: Sampling | None = None, *, ais: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self.form.log_z(self._read(context), count, sampling, ais=ais)

    def antithetic(self, posterior: Posterior, z: Tensor) -> tuple[Tensor, ...]:
        return super().antithetic(posterior, z) if self.latent.code.size else (z,)

    # Learning ----------------------------------------------------------------------------------------------------------------

    def loss(
        self, x: Float[Tensor, "*N Z"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """The form's own losses at the changes, and the negative log-likelihood of categories and bits."""
        known = self._known(x, context)
        terms = {"nll": Loss(self._discrete_loss(x, context, known, rows))} if self.anchor.discrete else {}
        if self.form is None or not known.any():
            return terms or {"nll": Loss(x.new_zeros(x.shape[:-1]))}
        given = None if context is None else context[known]
        if self.training:
            self._extend(x[known])
            if context is not None:
                self.moments.update(x[known][..., self.anchor.discrete :] - self._before(given))
        own = self.form.loss(self._standardised(x[known], given), self._read(given), sampling=sampling)
        for name, term in own.items():
            value = term.value + self._volume(given) if term.unit == "nats" else term.value
            wide = x.new_zeros(known.shape).masked_scatter(known, value) if value.ndim else value
            terms[name] = Loss(wide + terms[name].value if name in terms else wide, term.unit)
        return terms

    def _discrete_loss(self, x: Tensor, context: Tensor | None, known: Tensor, rows: Tensor | None) -> Float[Tensor, "*N"]:
        """-ln p(categories and bits), whose gradient trains the logits with and without the memory; those with it not at the rows
        that judge them. Where no row has a number, all train and all judge."""
        if context is None:
            return -self._discrete_log_prob(x, context, known)
        without, added = (y * known.unsqueeze(-1) for y in self._logits_and_memory(context))
        alone, both = (-self._log_prob_of(logits, x) for logits in (without, without.detach() + added))
        judges = known if rows is None else known & (rows // self.BLOCK % self.JUDGES == 0)
        used = torch.where(self.evidence.mean > 0, both, alone).detach()
        if self.training:
            self.evidence.update((alone - both)[judges])
        trained = alone + (both if rows is None else both * ~judges)
        return used + trained - trained.detach()

    @torch.no_grad()
    def calibrate(self, used: Change, z: Float[Tensor, "N Z"], context: Float[Tensor, "N C"]) -> None:
        """Fits the ensemble's deviations to the errors of `used`, the same distribution with the weights that predict."""
        known = self._known(z, context)
        if self.members and known.any():
            z, context = z[known], context[known]
            self.form.calibrate(used.form, used._standardised(z, context), used._read(context))

    def fit(self, latents: Float[Tensor, "N Z"], context: Tensor | None = None, **options) -> float:
        """As everywhere; the running statistics are then those of all changes."""
        known = self._known(latents, context)
        given = None if context is None else context[known]
        if self.form is not None and known.any():
            self._extend(latents[known])
            if context is not None:
                self.moments.reset_to(latents[known][..., self.anchor.discrete :] - self._before(given))
            self.form.prepare_fit(self._standardised(latents[known], given))
        return super().fit(latents, context, **options)

    def measures(self, x: Float[Tensor, "N Z"], context: Tensor | None) -> dict[str, float]:
        known = self._known(x, context)
        if self.form is None or not known.any():
            return {}
        given = None if context is None else context[known]
        return self.form.measures(self._standardised(x[known], given), self._read(given))
