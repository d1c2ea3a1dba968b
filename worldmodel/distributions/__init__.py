"""One role, many forms: laws of codes for the slots initial, transition, marginal and decoder."""

from worldmodel.distributions.base import (
    ClosedForm,
    ConditionalDistribution,
    EncoderInterface,
    Latent,
    Posterior,
    PosteriorSource,
    UndefinedRate,
    likelihood,
)
from worldmodel.distributions.categorical import (
    Categorical,
    CategoricalConfig,
    CategoricalLatent,
    CategoricalLatentConfig,
    CategoricalPosterior,
)
from worldmodel.distributions.diffusion import Diffusion, DiffusionConfig
from worldmodel.distributions.energy import Energy, EnergyConfig
from worldmodel.distributions.flow import Flow, FlowConfig
from worldmodel.distributions.gaussian import Gaussian, GaussianConfig, GaussianLatent, GaussianLatentConfig, GaussianPosterior
from worldmodel.distributions.hierarchical import Hierarchical, HierarchicalConfig
from worldmodel.distributions.langevin import tilted
from worldmodel.distributions.mixture import Components, Mixture, MixtureConfig
from worldmodel.distributions.point import PointLatent, PointLatentConfig, PointPosterior
from worldmodel.distributions.vamp import VampConfig, VampPrior

__all__ = [
    "Categorical",
    "CategoricalConfig",
    "CategoricalLatent",
    "CategoricalLatentConfig",
    "CategoricalPosterior",
    "ClosedForm",
    "Components",
    "ConditionalDistribution",
    "Diffusion",
    "DiffusionConfig",
    "EncoderInterface",
    "Energy",
    "EnergyConfig",
    "Flow",
    "FlowConfig",
    "Gaussian",
    "GaussianConfig",
    "GaussianLatent",
    "GaussianLatentConfig",
    "GaussianPosterior",
    "Hierarchical",
    "HierarchicalConfig",
    "Latent",
    "Mixture",
    "MixtureConfig",
    "PointLatent",
    "PointLatentConfig",
    "PointPosterior",
    "Posterior",
    "PosteriorSource",
    "UndefinedRate",
    "VampConfig",
    "VampPrior",
    "likelihood",
    "tilted",
]
