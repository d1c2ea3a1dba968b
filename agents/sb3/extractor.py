"""A trained encoder inside any SB3 policy: frozen, fine-tuned by the algorithm, or trained on with the world model's loss."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecTransposeImage
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.distributions import EncoderInterface
from worldmodel.encoders import VectorScaling
from worldmodel.envs.imagined import Source, learned_world
from worldmodel.envs.vectors.plain import COUNT_FROM_0, plain_obs
from worldmodel.errors import ConfigError, did_you_mean
from worldmodel.model import WorldModel, build_encoder, default_distribution
from worldmodel.registry import build, config_class
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.keys import KeySpec
from worldmodel.storage.run import Run
from worldmodel.storage.weights import cpu_randomness

MODES, OUTPUTS = ("frozen", "finetune", "joint"), ("code", "embedding")


class _Weights(dict):
    """Encoder weights by name, as something that can be referred to weakly."""


class _WeightsReference(dict):
    """Where weights can be found again, as plain data; they themselves live in this process as long as it, or a copy, does."""

    def __init__(self, location: Mapping[str, Any], tensors: _Weights):
        super().__init__(location)
        self.tensors = tensors

    def __copy__(self) -> _WeightsReference:
        return _WeightsReference(self, self.tensors)

    def __deepcopy__(self, memo: dict) -> _WeightsReference:
        return _WeightsReference(self, self.tensors)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


_weights: WeakValueDictionary[str, _Weights] = WeakValueDictionary()
"""Digest -> encoder weights that this process handed out, so that policies which are built later find them."""


def latent_policy_kwargs(
    run_or_model: Source, mode: str = "frozen", *, output: str | None = None, frames: int = 1, normalize_images: bool = True
) -> dict[str, Any]:
    """`policy_kwargs` with a trained encoder for any SB3 policy: `PPO("CnnPolicy", env, policy_kwargs=latent_policy_kwargs(run))`.

    run_or_model      a Run, a run folder or a WorldModel
    mode              "frozen": nothing changes the encoder; "finetune": the algorithm's gradients do; "joint": the world
                      model's loss does, through the callback JointWorldModel
    output            "code": the posterior's mean, where the posterior looks at the observation alone; "embedding": what the
                      encoder gives. Default: the code where there is one, else the embedding, with a warning that says why
    frames            of a VecFrameStack around the environments: each is encoded, and what comes out is put side by side
    normalize_images  SB3's option of the same name

    Other policy options go beside it: `{**latent_policy_kwargs(run), "net_arch": [64]}`. The values are plain data. The first
    weights come from this process, which keeps them as long as these options or copies of them, or from the run where its folder
    is there; in a saved algorithm they come from its zip.
    Raises ConfigError.
    """
    _one_of("mode", mode, MODES)
    if output is not None:
        _one_of("output", output, OUTPUTS)
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ConfigError(f"frames is {frames!r}; expected a whole number of at least 1.")
    world, run = learned_world(run_or_model)
    missing = _why_no_latent(world)
    if output == "code" and missing:
        raise ConfigError(
            f"output='code' needs a posterior that looks at the observation alone. {missing} Use output='embedding', train with "
            "model=vae or model.dynamics.posterior=observation, or wrap the environments in worldmodel.envs.LatentVecEnv."
        )
    if output is None and missing:
        warnings.warn(
            f"{missing} So the policy gets the encoder's embedding. Say output='embedding' to silence this; for the whole belief "
            "wrap the environments in worldmodel.envs.LatentVecEnv.",
            stacklevel=2,
        )
    output = output or ("embedding" if missing else "code")
    config = world.config.model_dump(mode="json")
    weights = encoder_weights(world, output)
    digest = _digest(weights)
    location = _WeightsReference({"digest": digest, **_weights_location(run)}, _weights.setdefault(digest, _Weights(weights)))
    kwargs = {
        "observation": plain_obs(world.obs).to_json(),
        "model": {part: config[part] for part in ("vector_scaling", "encoder", "dynamics")},
        "mode": mode,
        "output": output,
        "frames": frames,
        "normalize_images": normalize_images,
        "weights": location,
    }
    return {
        "features_extractor_class": LatentExtractor,
        "features_extractor_kwargs": kwargs,
        "normalize_images": normalize_images,
    }


class LatentExtractor(BaseFeaturesExtractor):
    """SB3's preprocessed observations -> the embedding, or the posterior's mean, of a trained encoder.

    `latent_policy_kwargs` gives its options. Two observations on the way are SB3's: images arrive transposed and divided by 255,
    categories as one-hot. What comes out is what the world model itself gives for the raw observation.

    Initialisers that are applied to the policy (`ortho_init` of PPO and A2C) pass it by. Where no weights were found when it
    was built, it waits for them to be loaded, as SB3's `load` does right away, and refuses to be used before: ConfigError.

    mode, output   as in latent_policy_kwargs
    scaling, encoder, posterior_net   modules of the world model; posterior_net is None where the output is the embedding
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        *,
        observation: Mapping[str, Any],
        model: Mapping[str, Any],
        weights: Mapping[str, Any],
        mode: str = "frozen",
        output: str = "embedding",
        frames: int = 1,
        normalize_images: bool = True,
    ):
        spec = ObsSpec.from_json(observation)
        with cpu_randomness():  # the policy's own first weights stay as they would be without us
            kind = model.get("dynamics", {"kind": "rssm"})["kind"]  # 0.1 saved none beside an encoder alone
            encoder = build_encoder(_config("encoder", model), kind, spec)
            net, latent = _posterior(_config("dynamics", model), encoder) if output == "code" else (None, None)
        super().__init__(observation_space, frames * (latent.size if latent is not None else encoder.out_features))
        self.mode, self.output, self.frames, self.spec, self.latent = mode, output, frames, spec, latent
        self.policy_spec = preprocessed_spec(spec, observation_space, frames, normalize_images)
        self.scaling, self.encoder, self.posterior_net = VectorScaling(model["vector_scaling"], spec), encoder, net
        self.source = dict(weights)
        self.register_buffer("filled", torch.tensor(False))
        self._checked = False
        found = _find_weights(self.source, output)
        if found is not None:
            self.load_state_dict({**found, "filled": torch.tensor(True)})
        self.detached = True
        self.requires_grad_(False)
        if mode == "finetune":
            self.unfreeze(True)

    def unfreeze(self, gradients: bool) -> None:
        """From now on its weights are learned; `gradients`: by the algorithm too, for what it gives is no longer detached."""
        self.requires_grad_(True)
        self.detached = not gradients

    def copy_from(self, leader: LatentExtractor) -> None:
        """Takes over the leader's weights; no gradient reaches this copy."""
        self.load_state_dict(leader.state_dict())
        self.requires_grad_(False)
        self.detached = True

    def apply(self, fn) -> LatentExtractor:
        """Nothing: what walks over a policy this way are initialisers, which would wipe the trained weights."""
        return self

    def train(self, mode: bool = True) -> LatentExtractor:
        """A frozen encoder stays in eval mode."""
        return super().train(mode and self.mode != "frozen")

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Float[Tensor, "N F"]:
        if not self._checked:
            self._check_filled()
        obs = {"obs": observations} if self.spec.single else observations
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            rows = {name: self._frames(name, obs[name]) for name in self.spec.keys}
            features = self.encoder(self.scaling(self.policy_spec.canonical(rows)))
            if self.posterior_net is not None:
                features = self.latent.distribution(self.posterior_net(features)).mean
            count = len(features) // self.frames
            return features.view(self.frames, count, -1).transpose(0, 1).reshape(count, -1)  # [N, frames * F]

    def _frames(self, name: str, x: Tensor) -> Tensor:
        """What SB3 hands over of one key -> [frames * N, *raw_shape], all first frames first, as `seen` expects it."""
        key = self.policy_spec.keys[name]
        if self.frames == 1:
            return x.reshape(len(x), *key.raw_shape)
        return torch.cat(x.chunk(self.frames, dim=_stack_axis(key)))

    def _check_filled(self) -> None:
        if not bool(self.filled):
            location = f" or in the run folder '{self.source['run']}'" if self.source.get("run") else ""
            raise ConfigError(
                f"The encoder has no weights: those with digest {self.source.get('digest')} were not found in this process{location}, "
                "and none were loaded. Load the algorithm from its zip, or make policy_kwargs anew with latent_policy_kwargs(run)."
            )
        self._checked = True


# How SB3 hands observations over ------------------------------------------------------------------------------------------


def preprocessed_spec(spec: ObsSpec, space: spaces.Space, frames: int, normalize_images: bool) -> ObsSpec:
    """The spec of single frames in a policy's `space` as SB3 preprocesses them, whose canonical form is that of `spec`.

    Raises ConfigError where the space is not the one of `spec`, transposed as SB3 does it and stacked `frames` times.
    """
    given = {"obs": space} if spec.single and not isinstance(space, spaces.Dict) else getattr(space, "spaces", None)
    if given is None or given.keys() != spec.keys.keys() or spec.single == isinstance(space, spaces.Dict):
        raise _other_space(spec, space, frames)
    keys = {}
    for name, key in spec.keys.items():
        own = _stacked(key.space, key, frames)
        transposed = _transposed(own)
        if given[name] != own and (transposed is None or given[name] != transposed):
            raise _other_space(spec, space, frames)
        keys[name] = _preprocessed_key(key, given[name], given[name] != own, normalize_images)
    return ObsSpec(keys, spec.single)


def _preprocessed_key(key: KeySpec, space: spaces.Space, transposed: bool, normalize_images: bool) -> KeySpec:
    """How one key reaches a features extractor."""
    scaled = normalize_images and is_image_space(space)
    if key.kind == "categorical":  # one-hot already
        return replace(key, kind="binary", raw_shape=key.shape)
    if key.kind != "image":
        if transposed or scaled:
            raise ConfigError(
                f"'{key.name}' is a vector for the world model, but SB3 takes {key.space} for an image, which it transposes and "
                "divides by 255. Train the run with env.layout=hwc (or chw), or reshape the observation with "
                "gymnasium.wrappers.ReshapeObservation."
            )
        return key
    layout, shape = ("chw", key.shape) if transposed else (key.layout, key.raw_shape)
    high = np.ones((), np.float32) if scaled else key.high
    return replace(key, layout=layout, raw_shape=shape, raw_dtype=np.dtype(np.float32), high=high)


def raw_observations(extractor: LatentExtractor, obs: Any) -> Any:
    """The environments' own observations [N, ...] out of a policy's: not transposed, and the newest frame alone."""
    single = extractor.spec.single
    rows = {"obs": obs} if single else dict(obs)
    for name, key in extractor.spec.keys.items():
        policy_spec, x = extractor.policy_spec.keys[name], np.asarray(rows[name])
        if extractor.frames > 1:
            x = np.split(x, extractor.frames, axis=_stack_axis(policy_spec))[-1]
        rows[name] = np.moveaxis(x, -3, -1) if policy_spec.layout != key.layout else x
    return rows["obs"] if single else rows


def _transposed(space: spaces.Space) -> spaces.Space | None:
    """An image space as SB3 transposes it; None where it leaves the space as it is."""
    if not is_image_space(space) or np.argmin(space.shape) == 0:
        return None
    return VecTransposeImage.transpose_space(space)


def _stack_axis(key: KeySpec) -> int:
    return -3 if key.kind == "image" and key.layout == "chw" else -1


def _stacked(space: spaces.Space, key: KeySpec, frames: int) -> spaces.Space:
    """The space of VecFrameStack; ConfigError for observations whose frames cannot be told apart afterwards."""
    if frames == 1:
        return space
    if key.low is None or len(key.raw_shape) not in (1, 3) or (key.kind != "image" and len(key.raw_shape) != 1):
        raise ConfigError(f"frames={frames}: '{key.name}' is {space}; only images with channels and flat Boxes are stacked.")
    low, high = (np.repeat(bound, frames, axis=_stack_axis(key)) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)


def _other_space(spec: ObsSpec, space: spaces.Space, frames: int) -> ConfigError:
    stack = f", stacked {frames} times" if frames > 1 else "; if a VecFrameStack is around the environments, say frames=N"
    return ConfigError(
        f"The policy observes {space}, but the encoder was trained on {spec.space}{stack}. Use environments made as in the run's "
        f"training, worldmodel.envs.make_vec(run.config.env), or a run of this environment. {COUNT_FROM_0}"
    )


# Weights ------------------------------------------------------------------------------------------------------------------


def encoder_weights(world: WorldModel, output: str) -> dict[str, Tensor]:
    """Copies of what the extractor holds of a world model, by its names there."""
    modules = {"scaling": world.scaling, "encoder": world.encoder}
    if output == "code":
        modules["posterior_net"] = world.dynamics.posterior_net
    return {f"{name}.{key}": x.detach().cpu().clone() for name, module in modules.items() for key, x in module.state_dict().items()}


def _find_weights(source: Mapping[str, Any], output: str) -> dict[str, Tensor] | None:
    """The weights of a digest: those of this process, else those of the run where it is still there."""
    digest, path = source.get("digest"), source.get("run")
    in_process = _weights.get(digest)
    if in_process is not None or not path:
        return in_process
    try:
        run = Run.open(path)
        step = source.get("step")
        weights = encoder_weights(run.world_model(step if step in run.checkpoints else None), output)
    except (ConfigError, OSError, AttributeError):
        return None
    return weights if _digest(weights) == digest else None


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _weights_location(run: Run | None) -> dict[str, Any]:
    """Where the weights can be found again, as long as the run is kept."""
    return {} if run is None else {"run": str(run.path), "step": run.read()[1]["counters"]["num_timesteps"]}


def _why_no_latent(world: WorldModel) -> str:
    """Why an observation alone has no code in this model; empty where it has one."""
    if world.config.dynamics.kind == "diamond":
        return "This run predicts pictures as they are: it has no latent code, only a summary that is learned for rewards and ends."
    if getattr(world.dynamics, "posterior_net", None) is None:
        return "This run filters: its code depends on the past, which a features extractor never sees."
    return ""


def _config(role: str, model: Mapping[str, Any]) -> Frozen:
    """The options of one part by its own class: what the whole model asks of its parts together does not concern it."""
    return config_class(role, model[role]["kind"]).parse(model[role])


def _posterior(config: Frozen, encoder: nn.Module) -> tuple[nn.Module, Any]:
    """(embedding -> parameters of the belief, the family of codes) of dynamics whose posterior sees the observation alone."""
    prior = default_distribution(config)
    dynamics = build("dynamics", config, EncoderInterface({}, encoder.out_features, encoder.forward), 1, prior, prior)
    return dynamics.posterior_net, dynamics.latent


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; expected one of {known}.{did_you_mean(str(value), known)}")
