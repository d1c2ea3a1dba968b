"""Smoothness: how steeply decoded observations change with latents, where latents are and where a prior draws them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.data import Sampling
from worldmodel.diagnostics.evidence import Evidence, Figure, Section, Slot, bootstrap, joined, prior_of, resampled
from worldmodel.diagnostics.geometry import FilteredStates, spherical
from worldmodel.diagnostics.holes import SlotRows, decodes_draws, slot_features
from worldmodel.diagnostics.usage import decoded_keys, scaled_rows, spaced, with_latent
from worldmodel.model import WorldModel

Decoding = Callable[[Tensor], Tensor]
"""Latents or features [N, X] -> numbers of an observation [N, D]."""
ROWS, PROBES = 200, 4
"""Rows at which a decoder's slope is measured, and random directions at each."""
ROWS_DRAWN, PROBES_DRAWN, STEP = 64, 2, 0.02
"""The same of a decoder that draws, which is much slower, and the step of its differences in deviations of a latent."""
PAIRS, STEPS = 100, 16
"""Pairs of latents that are joined by a path, and its steps."""
MIN_ROWS = 10
STEEP = 2.0
"""Ratio of slopes at draws to those at real latents from which draws lie on cliffs."""


# Estimators -----------------------------------------------------------------------------------------------------------


def decoder_sensitivity(
    decode: Decoding, z: Float[Tensor, "N Z"], *, probes: int = 8, generator: torch.Generator | None = None
) -> Float[Tensor, " N"]:
    """Root mean square change of `decode` per unit step of z: ||J||_F / sqrt(Z) at each latent.

    With `probes` random signs v: E |J v|^2 = ||J||_F^2, as E v v' = I. Source: Hutchinson 1990.
    """
    total = torch.zeros(len(z), device=z.device)
    for v in _signs(z, probes, generator):
        total += torch.func.jvp(decode, (z,), (v,))[1].flatten(1).square().sum(1)
    return (total / probes / z.shape[1]).sqrt()


def difference_sensitivity(
    decode: Decoding,
    z: Float[Tensor, "N Z"],
    *,
    step: float | Float[Tensor, " Z"] = STEP,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " N"]:
    """`decoder_sensitivity` by differences over a finite step, for a decoder that is not differentiated through.

    It must give equal results for equal latents: a decoder that draws must use the same noise in each call.
    """
    total, start = torch.zeros(len(z), device=z.device), decode(z)
    for v in _signs(z, probes, generator):
        total += ((decode(z + step * v) - start).flatten(1).square().sum(1)) / torch.as_tensor(step).square().mean()
    return (total / probes / z.shape[1]).sqrt()


def _signs(z: Tensor, probes: int, generator: torch.Generator | None) -> list[Tensor]:
    return [torch.randint(0, 2, z.shape, generator=generator, device=z.device).to(z) * 2 - 1 for _ in range(probes)]


def path_ratio(
    decode: Decoding,
    one: Float[Tensor, "N Z"],
    other: Float[Tensor, "N Z"],
    steps: int = 16,
    path: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.lerp,
) -> Float[Tensor, " N"]:
    """Length of the decoded path between two latents over the distance of its decoded ends, at least 1.

    path   (one, other, share of the way) -> latents between; straight, unless it is given
    """
    share = torch.linspace(0, 1, steps + 1, device=one.device).view(-1, 1, 1)
    between = path(one, other, share)
    decoded = decode(between.flatten(0, 1)).flatten(1).unflatten(0, (steps + 1, len(one)))
    straight = (decoded[-1] - decoded[0]).norm(dim=-1)
    return decoded.diff(dim=0).norm(dim=-1).sum(0) / straight.clamp_min(1e-6)


def straightness(
    z: Float[Tensor, "R Z"], episode: Int[Tensor, " R"], step: Int[Tensor, " R"]
) -> tuple[Float[Tensor, " M"], Int[Tensor, " M"]]:
    """(cosine of the angle between each two successive changes of the latent, episodes): 1 on a straight line, 0 on a random walk,
    -1/2 of independent latents. Where nothing changes there is no angle.

    Rows are in order; those of one episode stand together. Source: Henaff, Goris and Simoncelli 2019, eq. 1.
    """
    change = z.diff(dim=0)
    follows = (episode[1:] == episode[:-1]) & (step[1:] == step[:-1] + 1) & (change.norm(dim=-1) > 1e-9).to(episode.device)
    both = follows[1:] & follows[:-1]
    cosine = torch.nn.functional.cosine_similarity(change[1:], change[:-1], dim=-1)
    return cosine[both.to(z.device)], episode[2:][both]


# Of a world model -----------------------------------------------------------------------------------------------------


def draws_by_diffusion(world: WorldModel, seen: FilteredStates) -> bool:
    """Whether the decoder learns to draw, beside or instead of a mean."""
    sampling = Sampling(generator=torch.Generator(world.device).manual_seed(0))
    with torch.no_grad():
        terms = world.decoder.loss(seen.feature[:1], {name: x[:1] for name, x in scaled_rows(world, seen).items()}, sampling)
    return any(name.startswith("denoise") for name in terms)


def mean_decoding(world: WorldModel, keys: list[str]) -> Decoding:
    """Features [N, F] -> the decoder's mean of some keys, scaled, side by side."""
    return lambda feature: torch.cat([x.flatten(1) for name, x in world.decoder.mean(feature).items() if name in keys], -1)


def drawn_decoding(world: WorldModel, keys: list[str], seed: int) -> Decoding:
    """Features [N, F] -> a draw of some keys, scaled, side by side, with the same noise in each call of equal shape."""

    @torch.no_grad()
    def decode(feature: Tensor) -> Tensor:
        sampling = Sampling(generator=torch.Generator(feature.device).manual_seed(seed))
        return torch.cat([x.flatten(1) for name, x in world.decoder.sample(feature, sampling).items() if name in keys], -1)

    return decode


# The section ----------------------------------------------------------------------------------------------------------


def smoothness(evidence: Evidence, slot: Slot) -> Section:
    """Slope of the decoder at latents and at draws of a slot's prior, detours of paths, and straightness over time.

    Figures begin with the slot's name, but for the straightness, which comes with the transition.
    """
    sections = [_decoder(evidence, slot)]
    if slot == "transition":
        sections.append(_over_time(evidence))
    return joined(sections)


def _decoder(evidence: Evidence, slot: Slot) -> Section:
    world, what = evidence.world, f"Smoothness at draws of the {slot} prior was not measured, because"
    if prior_of(world, slot) is None:
        return Section(skipped=f"{what} the model has none.")
    if world.decoder is None:
        return Section(skipped=f"{what} the model has no decoder.")
    if not decoded_keys(world):
        return Section(skipped=f"{what} the decoder reads the observation off the latent: its slope is 1 everywhere.")
    if not world.dynamics.latent.continuous:
        return Section(skipped=f"{what} nothing lies between categories.")
    if not decodes_draws(world, slot):
        return Section(skipped=f"{what} the decoder reads h, which draws of the {slot} prior come without.")
    rows = slot_features(world, evidence.test, slot, evidence.generator(31), ROWS)
    if rows is None or len(rows.episode) < MIN_ROWS:
        return Section(skipped=f"{what} the slot has fewer than {MIN_ROWS} test rows.")
    return joined([_slopes(evidence, slot, rows), _paths(evidence, slot, rows)])


def _slopes(evidence: Evidence, slot: Slot, rows: SlotRows) -> Section:
    """Slopes at real latents and at draws: medians, and the ratios of medians and of 95 % quantiles."""
    world, keys = evidence.world, decoded_keys(evidence.world)
    drawn, index = draws_by_diffusion(world, evidence.test), torch.arange(len(rows.episode))
    if drawn:
        index, keys = spaced(index, ROWS_DRAWN), [name for name in keys if world.obs.keys[name].kind in ("image", "vector")]
    if not keys:
        return Section(skipped="The decoder's slope was not measured, because it draws categories alone.")
    decode = drawn_decoding(world, keys, evidence.seed) if drawn else mean_decoding(world, keys)
    own, made = (_slope(evidence, decode, x[index], drawn) for x in (rows.inferred, rows.drawn))
    episode = rows.episode[index]

    def ratio(q: float) -> Figure:
        unit = "times that at real latents"
        return resampled(lambda i: float(made[i].quantile(q) / own[i].quantile(q).clamp_min(1e-9)), episode, evidence.seed, unit)

    figures = {
        f"{slot} slope": resampled(lambda i: float(own[i].median()), episode, evidence.seed, "per unit of the latent"),
        f"{slot} slope ratio": ratio(0.5),
        f"{slot} steepest ratio": ratio(0.95),
    }
    tail = figures[f"{slot} steepest ratio"]
    if tail.surely_above(STEEP):
        text = f"Draws of the {slot} prior lie on cliffs: the decoder's steepest slope is {tail.value:.2g} times that at real "
        text += f"latents; another form may help: `worldmodel fit-prior {evidence.run} --slot {slot} --kind flow`."
    else:
        text = f"The decoder is as smooth at draws of the {slot} prior as at real latents: its steepest slope is {tail.value:.2g} "
        text += "times as large."
    return Section(figures, None, (text,))


def _slope(evidence: Evidence, decode: Decoding, feature: Float[Tensor, "N F"], differences: bool) -> Float[Tensor, " N"]:
    """Slopes with regard to the latent, with h as it is."""
    z, generator = evidence.world.dynamics.z_of(feature), evidence.generator(32)

    def of_latent(latent: Tensor) -> Tensor:
        return decode(with_latent(feature, latent))

    if differences:
        return difference_sensitivity(of_latent, z, probes=PROBES_DRAWN, generator=generator).cpu()
    return decoder_sensitivity(of_latent, z, probes=PROBES, generator=generator).detach().cpu()


@torch.no_grad()
def _paths(evidence: Evidence, slot: Slot, rows: SlotRows) -> Section:
    """Detours of decoded paths between real latents, straight and on a sphere, and between draws."""
    world, decode = evidence.world, mean_decoding(evidence.world, decoded_keys(evidence.world))
    index = spaced(torch.arange(len(rows.episode)), PAIRS)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(evidence.seed + 33))
    other = index[order.roll(1)][order.argsort()]  # no row is joined with itself
    episode, size = rows.episode[index], world.dynamics.latent.size

    def on_sphere(one: Tensor, end: Tensor, share: Tensor) -> Tensor:
        middle = torch.lerp(one, end, share)
        return with_latent(middle, spherical(one[..., -size:], end[..., -size:], share))

    def ratio(feature: Tensor, path: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.lerp) -> Figure:
        found = path_ratio(decode, feature[index], feature[other], STEPS, path).cpu()
        return resampled(lambda i: float(found[i].median()), episode, evidence.seed, "times the straight distance")

    figures = {
        f"{slot} path ratio": ratio(rows.inferred),
        f"{slot} spherical path ratio": ratio(rows.inferred, on_sphere),
        f"{slot} drawn path ratio": ratio(rows.drawn),
    }
    straight, _, drawn = (figure.value for figure in figures.values())
    text = f"What decodes on the way from one latent to another is {straight:.2g} times as long as the straight way in observations"
    return Section(figures, None, (f"{text}, and {drawn:.2g} times between draws of the {slot} prior.",))


def _over_time(evidence: Evidence) -> Section:
    seen = evidence.test
    if not evidence.world.dynamics.latent.continuous:
        return Section(skipped="Straightness over time was not measured, because categories have no directions.")
    cosine, episode = straightness(seen.z, seen.episode, seen.step)
    if not len(cosine):
        return Section(skipped="Straightness over time was not measured, because no three test rows follow one another and differ.")
    figure = bootstrap(cosine, episode, evidence.seed, "mean cosine of successive changes")
    text = f"Successive changes of latents have a mean cosine of {figure.value:.2f}: 1 is a straight line, 0 a random walk."
    return Section({"straightness": figure}, None, (text,))
