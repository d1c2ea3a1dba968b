"""One role, many forms: distributions over latents for the slots initial, transition, marginal and decoder."""

from worldmodel.distributions.base import ClosedForm, ConditionalDistribution, EncoderInterface, PosteriorSource, likelihood
from worldmodel.distributions.categorical import CategoricalConfig, CategoricalLatent, CategoricalLatentConfig, CategoricalPosterior
from worldmodel.distributions.diffusion import Diffusion, DiffusionConfig
from worldmodel.distributions.energy import Energy
from worldmodel.distributions.ensemble import EnsembleGaussian, EnsembleGaussianConfig
from worldmodel.distributions.flow import Flow
from worldmodel.distributions.gaussian import Gaussian, GaussianConfig, GaussianLatent, GaussianLatentConfig, GaussianPosterior
from worldmodel.distributions.hierarchical import Hierarchical
from worldmodel.distributions.langevin import tilted
from worldmodel.distributions.latent import Latent, Posterior, UndefinedRate
from worldmodel.distributions.mixture import Components, Mixture
from worldmodel.distributions.point import PointLatent, PointLatentConfig, PointPosterior
from worldmodel.distributions.vamp import VampPrior

__all__ = [
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
    "EnsembleGaussian",
    "EnsembleGaussianConfig",
    "Flow",
    "Gaussian",
    "GaussianConfig",
    "GaussianLatent",
    "GaussianLatentConfig",
    "GaussianPosterior",
    "Hierarchical",
    "Latent",
    "Mixture",
    "PointLatent",
    "PointLatentConfig",
    "PointPosterior",
    "Posterior",
    "PosteriorSource",
    "UndefinedRate",
    "VampPrior",
    "likelihood",
    "tilted",
]
