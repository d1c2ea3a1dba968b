"""One role, many forms: laws of codes for the slots initial, transition, marginal and decoder."""

from worldmodel.distributions.base import ClosedForm, ConditionalDistribution, Inputs, Latent, Posterior, Source, UndefinedRate
from worldmodel.distributions.categorical import (
    Categorical,
    CategoricalConfig,
    CategoricalLatent,
    CategoricalLatentConfig,
    CategoricalPosterior,
)
from worldmodel.distributions.gaussian import Gaussian, GaussianConfig, GaussianLatent, GaussianLatentConfig, GaussianPosterior
from worldmodel.distributions.point import PointLatent, PointLatentConfig, PointPosterior

__all__ = [
    "Categorical",
    "CategoricalConfig",
    "CategoricalLatent",
    "CategoricalLatentConfig",
    "CategoricalPosterior",
    "ClosedForm",
    "ConditionalDistribution",
    "Gaussian",
    "GaussianConfig",
    "GaussianLatent",
    "GaussianLatentConfig",
    "GaussianPosterior",
    "Inputs",
    "Latent",
    "PointLatent",
    "PointLatentConfig",
    "PointPosterior",
    "Posterior",
    "Source",
    "UndefinedRate",
]
