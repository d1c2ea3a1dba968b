"""DIAMOND: the next picture is drawn by diffusion, given the last L pictures and the actions taken at them.

    encode    u_t = summary(x_t), a convolution; z_t = x_t: the latent is the picture itself, and nothing is inferred
    observe   h_t = GRU(h_{t-1}, u_{t-1}, a_{t-1}): for rewards, ends and agents alone
    imagine   x_t ~ p(x_t | x_{t-1} .. x_{t-L}, a_{t-1} .. a_{t-L}), by a U-Net
    decode    the picture at the end of the feature [h_t, u_t, z_t]
    initial   zeros

The U-Net does not see h: what is out of sight for longer than L pictures is forgotten, and what rewards need does not change
the pictures. There is no distribution of an episode's first picture.

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
from worldmodel.data import Batch, Loss, Obs, Sampling, State, Trace
from worldmodel.distributions import EncoderInterface, PointLatent, PointLatentConfig, PointPosterior
from worldmodel.encoders import EncoderConfig, convolution
from worldmodel.errors import ConfigError
from worldmodel.nn.diffusion import EDM, low_discrepancy
from worldmodel.nn.networks import MLP, BlockGRU, linear, offset_linear
from worldmodel.nn.unet import DenoisingUNet
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec

LEVELS = (0.002, 20.0)
"""Bounds of the noise levels in training."""


# Encode and decode ------------------------------------------------------------------------------------------------------


class DiamondEncoder(nn.Module):
    """One picture {name: [N, C, H, W]} -> [its summary, the picture as a latent], [N, E]; the options are those of the summary.

    Raises ConfigError where the observation is anything but one picture.
    """

    def __init__(self, config: EncoderConfig, spec: ObsSpec):
        super().__init__()
        if [key.kind for key in spec.keys.values()] != ["image"]:
            found = ", ".join(f"'{name}' ({key.kind})" for name, key in spec.keys.items())
            raise ConfigError(
                f"model.dynamics.kind=diamond takes observations that are one picture, and these are {found}. Use another model, "
                "such as model=gaussian, or an environment of pictures."
            )
        ((self.name, key),) = spec.keys.items()
        self.convolution = convolution(key, config.depth)
        self.perceptron = MLP(self.convolution.out_features, config.units, config.layers)
        self.out_features = self.perceptron.out_features + math.prod(key.shape)

    def forward(self, obs: Obs) -> Float[Tensor, "N E"]:
        picture = obs[self.name]
        return torch.cat([self.perceptron(self.convolution(picture)), picture_to_latent(picture)], -1)


class DiamondDecoder(nn.Module):
    """The picture at the end of a feature, {name: [N, C, H, W]} in [0, 1]; it has nothing to learn."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        super().__init__()
        self.name, self.shape, self.in_features = name, shape, math.prod(shape)

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        return {self.name: latent_to_picture(feature[..., -self.in_features :], self.shape)}

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        return self.mean(feature)

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        return {}


def picture_to_latent(picture: Float[Tensor, "*N C H W"]) -> Float[Tensor, "*N Z"]:
    """A picture as one vector of length at most 1: 2 x - 1 over the square root of its size.

    So a whole picture weighs no more than one other number of a feature, and a squared distance is a mean over pixels.
    """
    flat = picture.flatten(-3)
    return (2 * flat - 1) / math.sqrt(flat.shape[-1])


def latent_to_picture(z: Float[Tensor, "*N Z"], shape: tuple[int, ...]) -> Float[Tensor, "*N C H W"]:
    """Inverse of `picture_to_latent`, in [0, 1]."""
    return ((z * math.sqrt(z.shape[-1]) + 1) / 2).clamp(0, 1).unflatten(-1, shape)


# Initial, observe and imagine -------------------------------------------------------------------------------------------


class DiamondConfig(Frozen):
    """The U-Net, its training and its draws; `deter` and `units` are of the GRU, and model.encoder of the summary."""

    latent: ClassVar[PointLatentConfig] = PointLatentConfig()
    """Latents are points; the observation says their size."""

    kind: Literal["diamond"] = "diamond"
    deter: int = Field(128, ge=1, description="size of the recurrent state h, which rewards, ends and agents read")
    units: int = Field(128, ge=1, description="width of the layer in front of it")
    posterior: Literal["observation"] = Field("observation", description="the latent is the picture itself")
    past: int = Field(4, ge=2, description="pictures that the next one is drawn from")
    depth: int = Field(16, ge=1, description="channels of the U-Net")
    frames: int = Field(64, ge=1, description="pictures of each batch that the U-Net is trained on, drawn at random")
    steps: int = Field(3, ge=1, description="Euler steps of a draw; sampling.steps overrides it")
    sigma_max: float = Field(5.0, gt=0, description="noise that a draw starts from, beside pictures of deviation 0.5")
    sigma_min: float = Field(0.002, gt=0, description="noise of the last step")
    log_sigma_mean: float = Field(-0.4, description="mean of ln(noise) in training")
    log_sigma_std: float = Field(1.2, gt=0, description="its deviation")
    offset: float = Field(0.3, ge=0, description="deviation of noise that is the same for all pixels of a channel, in training")

    def check(self, parts: dict[str, Frozen | None]) -> None:
        """ValueError where {option of model: its config} chooses a part that this model replaces or has no place for."""
        for name, part in parts.items():
            if part is not None and part.kind not in ("standard", "reconstruction"):
                raise ValueError(
                    f"model.{name}.kind={part.kind} has no place beside model.dynamics.kind=diamond, a whole model of pictures "
                    "with no distribution of latents: leave it out, or use other dynamics."
                )


@register("dynamics", "diamond", DiamondConfig)
class Diamond(nn.Module):
    """State, [N, ...]: h; `summary` and z of the newest picture; the L - 1 `pictures` before it and the `actions` taken at them;
    and `age`, the number of pictures of this episode up to z, at most L.

    What is older than the episode stays in the state and is blanked out for the U-Net, which gets flags for it. The states of a
    trace are views into one tensor; what is taken from them is copied: L pictures a state.
    """

    Encoder = DiamondEncoder
    """Replaces the encoder that the config of a model names."""
    transition = None
    """No distribution of latents."""

    def __init__(self, config: DiamondConfig, encoder: EncoderInterface, action_dim: int, *unused: Frozen):
        super().__init__()
        self.config, self.encoder, self.action_dim = config, encoder, action_dim
        ((self.name, self.shape),) = encoder.shapes.items()
        self.latent = PointLatent(PointLatentConfig(size=math.prod(self.shape)))
        self.decoder = DiamondDecoder(self.name, self.shape)
        self.summary = encoder.size - self.latent.size
        self.feature_dim = config.deter + encoder.size
        self.summary_in = offset_linear(self.summary, config.units)
        self.action_in = linear(action_dim, config.units, bias=False)
        self.bend = nn.Sequential(nn.LayerNorm(config.units), nn.SiLU())
        self.gru = BlockGRU(config.units, config.deter)
        self.edm = EDM(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
        channels, conditioning = self.shape[0], config.past * (action_dim + 1)
        self.unet = DenoisingUNet(channels, config.past * channels, conditioning, tuple(self.shape[1:]), config.depth)

    def compile_step(self) -> None:
        self.unet.compile()

    def initial(self, batch_size: int) -> State:
        """The state before the first observation: zeros."""
        size, past = self.latent.size, self.config.past - 1
        shapes = {"h": (self.config.deter,), "summary": (self.summary,), "z": (size,), "pictures": (past, size)}
        shapes |= {"actions": (past, self.action_dim), "age": ()}
        return State({name: self.summary_in.weight.new_zeros(batch_size, *shape) for name, shape in shapes.items()})

    def observe(
        self,
        state: State,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        sampling: Sampling,
    ) -> tuple[State, Trace]:
        """(the last state, the states after each picture); `is_first` resets."""
        summary, z = embed[..., : self.summary], embed[..., self.summary :].detach()  # pictures have nothing to learn
        keep, h = (~is_first).to(embed).unsqueeze(-1), state["h"]
        before = torch.cat([state["summary"].unsqueeze(1), summary[:, :-1]], 1) * keep
        gru_inputs, hs = self._gru_input(before, prev_action), []
        for t in range(is_first.shape[1]):
            h = self.gru(gru_inputs[:, t], h * keep[:, t])
            hs.append(h)
        h = torch.stack(hs, 1)
        age, past = self._age(state["age"], is_first), self.config.past
        pictures, actions = (_windows(x, past - 1)[:, 1:] for x in self._history(state, z, prev_action))
        states = {"h": h, "summary": summary, "z": z, "pictures": pictures, "actions": actions, "age": (age + 1).clamp_max(past)}
        states = State(states)
        last = states.index((slice(None), -1))
        return last, Trace(embed, PointPosterior(z), z, h, self.feature(states), state, last, states)

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without an observation. No gradient goes through the picture that is drawn."""
        pictures = torch.cat([state["pictures"], state["z"].unsqueeze(1)], 1)
        actions = torch.cat([state["actions"], action.unsqueeze(1)], 1)
        with torch.no_grad():
            embed = self.encoder.encode({self.name: self._draw(pictures, actions, state["age"], sampling)})
        h = self.gru(self._gru_input(state["summary"], action), state["h"])
        age = (state["age"] + 1).clamp_max(self.config.past)
        after = {**state, "h": h, "pictures": pictures[:, 1:], "actions": actions[:, 1:], "age": age}
        return self.correct(State(after), embed, sampling)

    def correct(self, state: State, embed: Float[Tensor, "N E"], sampling: Sampling) -> State:
        """The state with its picture replaced by one of the same moment."""
        return State({**state, "summary": embed[..., : self.summary], "z": embed[..., self.summary :]})

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> PointPosterior:
        """The picture within an embedding."""
        return PointPosterior(embed[..., self.summary :])

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state["h"], state["summary"], state["z"]], -1)

    def z_of(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N Z"]:
        """The latent within a feature."""
        return feature[..., -self.latent.size :]

    def first_recurrent(self, batch_size: int) -> dict[str, Tensor]:
        """{"h": that of an episode's first step}, where no picture and no action came before."""
        start = self.initial(batch_size)
        action = start["h"].new_zeros(batch_size, self.action_dim)
        return {"h": self.gru(self._gru_input(start["summary"], action), start["h"])}

    def _gru_input(self, summary: Float[Tensor, "*N U"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N G"]:
        return self.gru.inputs(self.bend(self.summary_in(summary) + self.action_in(action)))

    @staticmethod
    def _history(
        state: State, z: Float[Tensor, "B T Z"], prev_action: Float[Tensor, "B T A"]
    ) -> tuple[Float[Tensor, "B S Z"], Float[Tensor, "B S A"]]:
        """(pictures from L steps before the first row to one before the last, the actions taken at them); S = T + L - 1."""
        pictures = torch.cat([state["pictures"], state["z"].unsqueeze(1), z[:, :-1]], 1)
        return pictures, torch.cat([state["actions"], prev_action], 1)

    def _age(self, age: Float[Tensor, " B"], is_first: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """How many pictures before each one are of its episode, at most L."""
        steps = torch.arange(is_first.shape[1], device=age.device).expand(is_first.shape)
        start = torch.where(is_first, steps, -1).cummax(1).values
        return torch.where(start < 0, steps + age.unsqueeze(1), (steps - start).to(age)).clamp_max(self.config.past)

    # The U-Net ------------------------------------------------------------------------------------------------------------

    def _network(self, pictures: Float[Tensor, "N L Z"], actions: Float[Tensor, "N L A"], age: Float[Tensor, " N"]):
        """The U-Net given L pictures and actions, of which the last `age` exist."""
        past = self.config.past
        exists = (torch.arange(past, device=age.device) >= past - age.unsqueeze(-1)).to(pictures)
        beside = 2 * latent_to_picture(pictures, self.shape) - 1
        beside = (beside * exists.view(*exists.shape, 1, 1, 1)).flatten(1, 2)
        conditioning = torch.cat([(actions * exists.unsqueeze(-1)).flatten(1), exists], -1)
        return lambda x, level: self.unet(x, level, beside, conditioning)

    def _with_offset(self, level: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The deviation of a pixel's whole noise, which conditions the U-Net in training and in draws."""
        return torch.hypot(level, torch.full_like(level, self.config.offset))

    def _draw(self, pictures: Tensor, actions: Tensor, age: Tensor, sampling: Sampling) -> Float[Tensor, "N C H W"]:
        """The next picture, in [0, 1] at levels of one byte. `sampling.mode` starts from no noise.

        The expected picture is rounded to these levels at each step, so that dreams continue pictures like those of training.
        """
        noise = pictures.new_zeros(len(pictures), *self.shape)
        if not sampling.mode:
            noise = sampling.temperature * torch.randn(noise.shape, generator=sampling.generator, device=noise.device)
        network = self._network(pictures, actions, age)

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            expected = self.edm.denoised(network, x, self._with_offset(level))
            return ((expected.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

        return (self.edm.sample(denoise, noise, sampling.steps or self.config.steps) + 1) / 2

    # Losses ---------------------------------------------------------------------------------------------------------------

    def losses(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """None: points have no rate, and no distribution of a first picture is learned."""
        return {}

    def predict(self, trace: Trace, batch: Batch, z: Float[Tensor, "B T Z"], sampling: Sampling) -> dict[str, Loss]:
        """{"denoise": squared error of the U-Net at pictures z, a mean over pixels}, 0 at an episode's first row.

        Only `frames` rows are computed; they are weighted so that the mean over all rows is theirs.
        """
        later, generator, past = ~batch.is_first, sampling.generator, self.config.past
        given = [_windows(x, past) for x in self._history(trace.start, trace.z, batch.prev_action)]
        given.append(self._age(trace.start["age"], batch.is_first))
        row, step = later.nonzero(as_tuple=True)
        chosen = torch.randperm(len(row), generator=generator, device=z.device)[: self.config.frames]
        row, step = row[chosen], step[chosen]
        value = z.new_zeros(later.shape)
        if len(chosen):
            data = 2 * latent_to_picture(z[row, step], self.shape) - 1
            level = self.edm.training_levels(low_discrepancy(len(data), generator, z.device)).clamp(*LEVELS)
            noise = torch.randn(data.shape, generator=generator, device=z.device) * level.view(-1, 1, 1, 1)
            offset = torch.randn(*data.shape[:2], 1, 1, generator=generator, device=z.device) * self.config.offset
            whole = self._with_offset(level)
            network = self._network(*(x[row, step] for x in given))
            error = self.edm.loss(network, data, (noise + offset) / whole.view(-1, 1, 1, 1), whole) / self.latent.size
            value = value.index_put((row, step), error * (int(later.sum()) / len(chosen)))
        return {"denoise": Loss(value, "score", later)}


def _windows(x: Float[Tensor, "B S V"], length: int) -> Float[Tensor, "B W L V"]:
    """Each `length` consecutive rows: views, not copies."""
    return x.unfold(1, length, 1).movedim(-1, 2)
