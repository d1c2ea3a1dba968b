"""How the world rolls on: h' = f(h, z, a), its posterior and its transition distribution."""

from worldmodel.dynamics.rssm import RSSM, RSSMConfig

__all__ = ["RSSM", "RSSMConfig"]
