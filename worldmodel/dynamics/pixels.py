"""Pictures that follow one another: the next one is drawn by diffusion given the last ones and the actions taken at them.

    x_t ~ p(x_t | x_{t-1} .. x_{t-L}, a_{t-1} .. a_{t-L})     a U-Net; the code z of a state is its picture
    h_t = GRU(h_{t-1}, u_{t-1}, a_{t-1}),  u_t a convolution's summary of x_t: for rewards, ends and agents alone

The U-Net knows nothing of h: what is out of sight for longer than L pictures is forgotten, and what rewards need shapes no
picture. There is no posterior to be found and no law of a first picture.

Source: Alonso et al. 2024 (DIAMOND), section 3 and table 3, at sizes for a CPU. It starts a draw from noise of deviation 1; here
that deviation is the first level's, as the U-Net was trained on.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Loss, Sampling, State, Trace
from worldmodel.decoders.unet import DenoisingUNet
from worldmodel.distributions import EncoderInterface, PointLatent, PointLatentConfig, PointPosterior
from worldmodel.nn.diffusion import EDM, SAMPLERS, low_discrepancy
from worldmodel.nn.networks import BlockGRU, latent_to_picture, linear, offset_linear
from worldmodel.registry import register

LEVELS = (0.002, 20.0)
"""Noise that training does not leave."""


class PixelsConfig(Frozen):
    """How far the U-Net looks back, how it is trained and how it draws; the carry beside it is for rewards and ends."""

    pixels: ClassVar[bool] = True
    latent: ClassVar[PointLatentConfig] = PointLatentConfig()
    """Codes are points; how long they are is said by the observation."""

    kind: Literal["pixels"] = "pixels"
    deter: int = Field(128, ge=1, description="size of the carry h, which rewards, ends and agents read")
    units: int = Field(128, ge=1, description="width of the layer that enters it")
    posterior: Literal["observation"] = Field("observation", description="the code is the picture itself")
    past: int = Field(4, ge=2, description="pictures that the next one is drawn from")
    depth: int = Field(16, ge=1, description="channels of the U-Net")
    frames: int = Field(64, ge=1, description="pictures of each batch that the U-Net is trained on, drawn at random")
    steps: int = Field(3, ge=1, description="Euler steps of a draw; sampling.steps overrides it")
    sigma_max: float = Field(5.0, gt=0, description="noise that a draw starts from, beside pictures of deviation 0.5")
    sigma_min: float = Field(0.002, gt=0, description="noise of the last step")
    log_sigma_mean: float = Field(-0.4, description="mean of ln(noise) in training")
    log_sigma_std: float = Field(1.2, gt=0, description="its deviation")
    offset: float = Field(0.3, ge=0, description="deviation of noise that is the same for all pixels of a channel, in training")


@register("dynamics", "pixels", PixelsConfig)
class Pixels(nn.Module):
    """State, [N, ...]: h, z (the picture as `encoders.as_code` has it), its summary, and of what came before z the last L - 1
    pictures and the actions taken at them, with how many pictures of this episode there are, z among them (`age`, at most L).

    What is older than an episode stays in the state and is blank to the U-Net, which is told so. The states of a trace are
    views into one tensor; what is taken from them is copied: L pictures a state.
    """

    transition = None
    """No law over codes in general, as the slots hold."""

    def __init__(self, config: PixelsConfig, encoder: EncoderInterface, action_dim: int, transition: Frozen, initial: Frozen):
        super().__init__()
        self.config, self.encoder, self.action_dim = config, encoder, action_dim
        ((self.name, self.shape),) = encoder.shapes.items()
        self.latent = PointLatent(PointLatentConfig(size=math.prod(self.shape)))
        self.summary = encoder.size - self.latent.size
        self.feature_dim = config.deter + encoder.size
        self.summary_in = offset_linear(self.summary, config.units)
        self.action_in = linear(action_dim, config.units, bias=False)
        self.bend = nn.Sequential(nn.LayerNorm(config.units), nn.SiLU())
        self.gru = BlockGRU(config.units, config.deter)
        self.path = EDM(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
        channels, conditioning = self.shape[0], config.past * (action_dim + 1)
        self.unet = DenoisingUNet(channels, config.past * channels, conditioning, tuple(self.shape[1:]), config.depth)

    def compile_step(self) -> None:
        self.unet.compile()

    # The carry, and what a state holds -----------------------------------------------------------------------------------

    def initial(self, batch_size: int) -> State:
        """The state before the first observation: zeros."""
        size, past = self.latent.size, self.config.past - 1
        shapes = {"h": (self.config.deter,), "summary": (self.summary,), "z": (size,), "pictures": (past, size)}
        shapes |= {"actions": (past, self.action_dim), "age": ()}
        return State({name: self.summary_in.weight.new_zeros(batch_size, *shape) for name, shape in shapes.items()})

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state["h"], state["summary"], state["z"]], -1)

    def z_of(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N Z"]:
        """The code within a feature."""
        return feature[..., -self.latent.size :]

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> PointPosterior:
        """The picture within an embedding."""
        return PointPosterior(embed[..., self.summary :])

    def correct(self, state: State, embed: Float[Tensor, "N E"], sampling: Sampling) -> State:
        """The state with its picture replaced by one of the same moment."""
        return State({**state, "summary": embed[..., : self.summary], "z": embed[..., self.summary :]})

    def _gru_input(self, summary: Float[Tensor, "*N U"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N G"]:
        return self.gru.inputs(self.bend(self.summary_in(summary) + self.action_in(action)))

    def first_recurrent(self, batch_size: int) -> dict[str, Tensor]:
        """An episode's first carry: no picture and no action came before."""
        start = self.initial(batch_size)
        action = start["h"].new_zeros(batch_size, self.action_dim)
        return {"h": self.gru(self._gru_input(start["summary"], action), start["h"])}

    # The verbs -----------------------------------------------------------------------------------------------------------

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without looking. No gradient goes through the picture that is drawn."""
        pictures = torch.cat([state["pictures"], state["z"].unsqueeze(1)], 1)
        actions = torch.cat([state["actions"], action.unsqueeze(1)], 1)
        with torch.no_grad():
            embed = self.encoder.encode({self.name: self._draw(pictures, actions, state["age"], sampling)})
        moved = {
            "h": self.gru(self._gru_input(state["summary"], action), state["h"]),
            "pictures": pictures[:, 1:],
            "actions": actions[:, 1:],
            "age": (state["age"] + 1).clamp_max(self.config.past),
        }
        return self.correct(State({**state, **moved}), embed, sampling)

    def observe(
        self,
        state: State,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        sampling: Sampling,
    ) -> tuple[State, Trace]:
        """The state after each picture; `is_first` forgets. The state returned is the last one."""
        summary, z = embed[..., : self.summary], embed[..., self.summary :].detach()  # pictures have nothing to learn
        keep, h = (~is_first).to(embed).unsqueeze(-1), state["h"]
        entered = self._gru_input(torch.cat([state["summary"].unsqueeze(1), summary[:, :-1]], 1) * keep, prev_action)
        hs = []
        for t in range(is_first.shape[1]):
            h = self.gru(entered[:, t], h * keep[:, t])
            hs.append(h)
        h = torch.stack(hs, 1)
        pictures, actions = self._before(state, z, prev_action)
        seen, past = self._seen(state["age"], is_first), self.config.past
        windows = {"pictures": _windows(pictures, past - 1)[:, 1:], "actions": _windows(actions, past - 1)[:, 1:]}
        states = State({"h": h, "summary": summary, "z": z, **windows, "age": (seen + 1).clamp_max(past)})
        last = states.index((slice(None), -1))
        return last, Trace(embed, PointPosterior(z), z, h, self.feature(states), state, last, states)

    @staticmethod
    def _before(
        state: State, z: Float[Tensor, "B T Z"], prev_action: Float[Tensor, "B T A"]
    ) -> tuple[Float[Tensor, "B S Z"], Float[Tensor, "B S A"]]:
        """(pictures from L steps before the first row to one before the last, the actions taken at them); S = T + L - 1."""
        pictures = torch.cat([state["pictures"], state["z"].unsqueeze(1), z[:, :-1]], 1)
        return pictures, torch.cat([state["actions"], prev_action], 1)

    def _seen(self, age: Float[Tensor, " B"], is_first: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """How many pictures before each one are of its episode, at most L."""
        steps = torch.arange(is_first.shape[1], device=age.device).expand(is_first.shape)
        opened = torch.where(is_first, steps, -1).cummax(1).values
        return torch.where(opened < 0, steps + age.unsqueeze(1), (steps - opened).to(age)).clamp_max(self.config.past)

    # The U-Net -----------------------------------------------------------------------------------------------------------

    def _network(self, pictures: Float[Tensor, "N L Z"], actions: Float[Tensor, "N L A"], seen: Float[Tensor, " N"]):
        """F given L pictures and actions, of which the last `seen` are there."""
        past = self.config.past
        present = (torch.arange(past, device=seen.device) >= past - seen.unsqueeze(-1)).to(pictures)
        beside = 2 * latent_to_picture(pictures, self.shape) - 1
        beside = (beside * present.view(*present.shape, 1, 1, 1)).flatten(1, 2)
        conditioning = torch.cat([(actions * present.unsqueeze(-1)).flatten(1), present], -1)
        return lambda x, level: self.unet(x, level, beside, conditioning)

    def _draw(self, pictures: Tensor, actions: Tensor, seen: Tensor, sampling: Sampling) -> Float[Tensor, "N C H W"]:
        """The next picture, in [0, 1] at levels of one byte. `sampling.mode` starts from no noise.

        Whatever is expected is brought to these levels at each step, so that dreams feed on pictures like those of training.
        """
        noise = pictures.new_zeros(len(pictures), *self.shape)
        if not sampling.mode:
            noise = sampling.temperature * torch.randn(noise.shape, generator=sampling.generator, device=noise.device)
        levels = self.path.grid(sampling.steps or self.config.steps).to(noise)
        network = self._network(pictures, actions, seen)

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            expected = self.path.denoised(network, x, self._with_offset(level))
            return ((expected.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

        drawn = SAMPLERS["euler"](denoise, self.path.start(noise, levels[0]), levels)
        return (drawn + 1) / 2

    def _with_offset(self, level: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The deviation of a pixel's whole noise: what the U-Net is told, in training as in draws."""
        return torch.hypot(level, torch.full_like(level, self.config.offset))

    def losses(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """None: pictures have no rate, and no law of a first one learns."""
        return {}

    def predict(self, trace: Trace, batch: Batch, z: Float[Tensor, "B T Z"], sampling: Sampling) -> dict[str, Loss]:
        """{"denoise": squared error of the U-Net at pictures z, a mean over pixels}; it never sees rows that open an episode.

        Only `frames` rows are computed; they weigh so that the mean over all rows is theirs.
        """
        later, generator, past = ~batch.is_first, sampling.generator, self.config.past
        given = [_windows(x, past) for x in self._before(trace.start, trace.z, batch.prev_action)]
        given.append(self._seen(trace.start["age"], batch.is_first))
        row, step = later.nonzero(as_tuple=True)
        chosen = torch.randperm(len(row), generator=generator, device=z.device)[: self.config.frames]
        row, step = row[chosen], step[chosen]
        value = z.new_zeros(later.shape)
        if len(chosen):
            data = 2 * latent_to_picture(z[row, step], self.shape) - 1
            level = self.path.training_levels(low_discrepancy(len(data), generator, z.device)).clamp(*LEVELS)
            noise = torch.randn(data.shape, generator=generator, device=z.device) * level.view(-1, 1, 1, 1)
            offset = torch.randn(*data.shape[:2], 1, 1, generator=generator, device=z.device) * self.config.offset
            whole = self._with_offset(level)
            network = self._network(*(x[row, step] for x in given))
            error = self.path.loss(network, data, (noise + offset) / whole.view(-1, 1, 1, 1), whole) / self.latent.size
            value = value.index_put((row, step), error * (int(later.sum()) / len(chosen)))
        return {"denoise": Loss(value, "score", later)}


def _windows(x: Float[Tensor, "B S V"], length: int) -> Float[Tensor, "B W L V"]:
    """Each `length` rows that follow one another: views, not copies."""
    return x.unfold(1, length, 1).movedim(-1, 2)
