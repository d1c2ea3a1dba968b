"""The recurrent state h' = f(h, z, a), its posterior and its prior."""

from worldmodel.dynamics.anchored import AnchoredDynamics
from worldmodel.dynamics.base import Dynamics
from worldmodel.dynamics.mdn_rnn import MDNRNN
from worldmodel.dynamics.rssm import RSSM, RSSMConfig
from worldmodel.dynamics.transformer import Transformer, TransformerConfig

__all__ = ["MDNRNN", "RSSM", "AnchoredDynamics", "Dynamics", "RSSMConfig", "Transformer", "TransformerConfig"]
