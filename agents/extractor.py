"""Where release 0.1 had LatentExtractor: files of SB3 that it saved import the class from here."""

from worldmodel.agents.sb3.extractor import LatentExtractor

__all__ = ["LatentExtractor"]
