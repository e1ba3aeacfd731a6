"""How far the images of a prompt are apart. Public names alone."""

from .evaluation.diversity import Diversity, load_diversity


__all__ = ["Diversity", "load_diversity"]
