"""Images and rewards before and after training, for a model card. Public names alone."""

from typing import Any

from .evaluation.before_after import BeforeAfter
from .seeds import FIRST_SEED
from .training.trainer import RolloutTrainer


__all__ = ["FIRST_SEED", "Comparison"]


def Comparison(trainer: RolloutTrainer, *args: Any, **options: Any) -> BeforeAfter:
    """
    Samples of a trainer before and after training: `trainer.comparison = Comparison(trainer, num_prompts=50)`.

    Args:
        trainer ([`~trl_fdfo.training.trainer.RolloutTrainer`]): Samples and scores.
        *args, **options: `num_prompts`, `images_per_prompt`, `metrics` and `diversity` of
            [`~trl_fdfo.evaluation.before_after.BeforeAfter`], in this order.
    """
    names = ("num_prompts", "images_per_prompt", "metrics", "diversity")
    return trainer.compare(**dict(zip(names, args)), **options)
