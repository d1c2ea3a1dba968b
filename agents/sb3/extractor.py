"""A trained encoder inside any SB3 policy: frozen, fine-tuned by the algorithm, or trained on with the world model's loss.

    observation of the environment -> SB3's preprocessing -> canonical tensors (preprocessing.py)
        -> scaling -> encoder -> embedding [N, E] -> posterior -> its mean, the latent [N, Z]

The encoder's weights come with the options that `latent_policy_kwargs` returned. Options from a file are plain data alone: then the
weights come from the run, where its folder is still there, or from the zip of the algorithm that is loaded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gymnasium import spaces
from jaxtyping import Float
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from worldmodel import renamed
from worldmodel.agents.sb3.preprocessing import PreprocessedObs
from worldmodel.config import Frozen
from worldmodel.distributions import EncoderInterface
from worldmodel.encoders import VectorScaling
from worldmodel.envs.imagined import Source, learned_world
from worldmodel.envs.vectors.plain import plain_obs
from worldmodel.errors import ConfigError, require_choice, require_whole
from worldmodel.model import WorldModel, build_encoder, default_distribution
from worldmodel.registry import build, config_class
from worldmodel.spaces import ObsSpec
from worldmodel.storage.run import Run
from worldmodel.storage.weights import cpu_randomness

MODES, OUTPUTS = ("frozen", "finetune", "joint"), ("latent", "embedding")


def latent_policy_kwargs(
    run_or_model: Source, mode: str = "frozen", *, output: str | None = None, frames: int = 1, normalize_images: bool = True
) -> dict[str, Any]:
    """`policy_kwargs` with a trained encoder for any SB3 policy: `PPO("CnnPolicy", env, policy_kwargs=latent_policy_kwargs(run))`.

    run_or_model      a Run, a run folder or a WorldModel
    mode              "frozen": nothing changes the encoder; "finetune": the algorithm's gradients do; "joint": the world
                      model's loss does, through the callback JointWorldModel
    output            "latent": the posterior's mean, of models whose posterior depends on the observation alone; "embedding":
                      the encoder's output. Default: the latent where there is one, else the embedding, with a warning
    frames            of a VecFrameStack around the environments: each is encoded, and the results are concatenated
    normalize_images  SB3's option of the same name

    Other policy options go beside it: `{**latent_policy_kwargs(run), "net_arch": [64]}`. The values are plain data.
    Raises ConfigError.
    """
    require_choice("mode", mode, MODES)
    require_whole(frames=frames)
    if output in renamed.EXTRACTOR_OUTPUTS:
        raise ConfigError(f"output is {output!r}; it is called '{renamed.EXTRACTOR_OUTPUTS[output]}' now.")
    if output is not None:
        require_choice("output", output, OUTPUTS)
    world, run = learned_world(run_or_model)
    missing = _why_no_latent(world)
    if output == "latent" and missing:
        raise ConfigError(
            f"output='latent' needs a posterior that depends on the observation alone. {missing} Use output='embedding', train "
            "with model=vae or model.dynamics.posterior=observation, or wrap the environments in worldmodel.envs.LatentVecEnv."
        )
    if output is None and missing:
        warnings.warn(
            f"{missing} So the policy gets the encoder's embedding. Say output='embedding' to silence this; for the whole state of "
            "the world model wrap the environments in worldmodel.envs.LatentVecEnv.",
            stacklevel=2,
        )
    output = output or ("embedding" if missing else "latent")
    config = world.config.model_dump(mode="json")
    kwargs = {
        "observation": plain_obs(world.obs).to_json(),
        "model": {part: config[part] for part in ("vector_scaling", "encoder", "dynamics")},
        "mode": mode,
        "output": output,
        "frames": int(frames),
        "normalize_images": normalize_images,
        "weights": _reference(_encoder_weights(world, output), run),
    }
    return {
        "features_extractor_class": LatentExtractor,
        "features_extractor_kwargs": kwargs,
        "normalize_images": normalize_images,
    }


class LatentExtractor(BaseFeaturesExtractor):
    """SB3's preprocessed observations [N, ...] -> the trained encoder's latent or embedding [N, frames * F].

    `latent_policy_kwargs` gives its options. The result is what the world model itself gives for the raw observation.

    Initialisers that are applied to the policy (`ortho_init` of PPO and A2C) leave it alone. Where no weights were found when
    it was built, it waits for them to be loaded, as SB3's `load` does right away; using it before is a ConfigError.

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
        output, model = renamed.extractor_options(output, model)  # of an algorithm that release 0.1 saved
        spec = ObsSpec.from_json(observation)
        with cpu_randomness():  # the policy's other weights start as they would without this module
            kind = renamed.in_new_kind(
                "dynamics", model.get("dynamics", {"kind": "rssm"})["kind"]
            )  # 0.1 saved none for an embedding
            encoder = build_encoder(_part_config("encoder", model), kind, spec)
            net, latent = _posterior(_part_config("dynamics", model), encoder) if output == "latent" else (None, None)
        super().__init__(observation_space, frames * (latent.size if latent is not None else encoder.out_features))
        self.mode, self.output, self.latent = mode, output, latent
        self.observations = PreprocessedObs(spec, observation_space, frames, normalize_images)
        self.scaling, self.encoder, self.posterior_net = VectorScaling(model["vector_scaling"], spec), encoder, net
        self.source = dict(weights)
        self.register_buffer("filled", torch.tensor(False))
        self._checked = False
        found = _find_weights(weights, output)
        if found is not None:
            self.load_state_dict({**found, "filled": torch.tensor(True)})
        self.detached = True
        self.requires_grad_(False)
        if mode == "finetune":
            self.unfreeze(True)

    def unfreeze(self, gradients: bool) -> None:
        """From now on its weights are trained; `gradients`: by the algorithm's loss too, since its output is not detached."""
        self.requires_grad_(True)
        self.detached = not gradients

    def copy_from(self, leader: LatentExtractor) -> None:
        """Takes the leader's weights; no gradient reaches this copy."""
        self.load_state_dict(leader.state_dict())
        self.requires_grad_(False)
        self.detached = True

    def apply(self, fn: Callable[[nn.Module], None]) -> LatentExtractor:
        """Nothing: SB3 applies initialisers to its policies, which would overwrite the trained weights."""
        return self

    def train(self, mode: bool = True) -> LatentExtractor:
        """A frozen encoder stays in eval mode."""
        return super().train(mode and self.mode != "frozen")

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Float[Tensor, "N F"]:
        if not self._checked:
            self._require_weights()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            features = self.encoder(self.scaling(self.observations.canonical(observations)))
            if self.posterior_net is not None:
                features = self.latent.distribution(self.posterior_net(features)).mean
            frames = self.observations.frames
            count = len(features) // frames
            return features.view(frames, count, -1).transpose(0, 1).reshape(count, -1)  # [N, frames * F]

    def _require_weights(self) -> None:
        if not bool(self.filled):
            location = f" in the run folder '{self.source['run']}'" if self.source.get("run") else ""
            raise ConfigError(
                f"The encoder has no weights: none came with its options, those with digest {self.source.get('digest')} were not "
                f"found{location}, and none were loaded. Load the algorithm from its zip, or make policy_kwargs anew with "
                "latent_policy_kwargs(run)."
            )
        self._checked = True


def _why_no_latent(world: WorldModel) -> str:
    """Why an observation alone gives no latent in this model; empty where it gives one."""
    if world.config.dynamics.kind == "diamond":
        return "This run predicts pictures as they are: it has no latent, only a summary that is learned for rewards and ends."
    if getattr(world.dynamics, "posterior_net", None) is None:
        return "This run filters: its latent depends on the past, which a features extractor never sees."
    return ""


def _part_config(role: str, model: Mapping[str, Any]) -> Frozen:
    """The config of one part, without the checks that concern the whole model."""
    part = renamed.in_new_kind(role, model[role])
    return config_class(role, part["kind"]).parse_saved(part)


def _posterior(config: Frozen, encoder: nn.Module) -> tuple[nn.Module, Any]:
    """(network: embedding -> parameters of the posterior, the latent's kind) of dynamics with posterior=observation."""
    priors = [default_distribution(config, slot) for slot in ("transition", "initial")]
    interface = EncoderInterface({}, encoder.out_features, encoder.forward, getattr(encoder, "anchor", None))
    dynamics = build("dynamics", config, interface, 1, *priors)
    return dynamics.posterior_net, dynamics.latent


# Weights ------------------------------------------------------------------------------------------------------------------


class _WeightsReference(dict):
    """The option `weights`: plain data {digest, run, step} by which weights are found again, and the `tensors` themselves.

    Copies share the tensors; pickled it is a plain dict.
    """

    def __init__(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        super().__init__(data)
        self.tensors = tensors

    def __deepcopy__(self, memo: dict | None = None) -> _WeightsReference:
        return _WeightsReference(self, self.tensors)

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def _reference(weights: dict[str, Tensor], run: Run | None) -> _WeightsReference:
    data = {"digest": _digest(weights)}
    if run is not None:
        data |= {"run": str(run.path), "step": run.read()[1]["counters"]["num_timesteps"]}
    return _WeightsReference(data, weights)


def _find_weights(source: Mapping[str, Any], output: str) -> Mapping[str, Tensor] | None:
    """The weights that come with a reference, else those of its run, where that is still there and has these weights."""
    if isinstance(source, _WeightsReference):
        return source.tensors
    digest, path = source.get("digest"), source.get("run")
    if not path:
        return None
    try:
        run, step = Run.open(path), source.get("step")
        weights = _encoder_weights(run.world_model(step if step in run.checkpoints else None), output)
    except (ConfigError, OSError, AttributeError):
        return None
    return weights if _digest(weights) == digest else None


def _encoder_weights(world: WorldModel, output: str) -> dict[str, Tensor]:
    """Copies of a world model's tensors by their names in LatentExtractor."""
    modules = {"scaling": world.scaling, "encoder": world.encoder}
    if output == "latent":
        modules["posterior_net"] = world.dynamics.posterior_net
    return {f"{name}.{key}": x.detach().cpu().clone() for name, module in modules.items() for key, x in module.state_dict().items()}


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
