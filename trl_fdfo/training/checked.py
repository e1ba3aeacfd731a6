"""
An algorithm as a class, and what its methods return, checked in one place: the trainer calls the methods from here.

Dimensions: P prompts, G branches, N = P x G samples, T steps, K trained levels.
"""

import operator
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from torch import Tensor

from ..pipeline.records import RolloutBatch
from ..pipeline.schedulers import RolloutScheduler
from ..saving.model_card import Paper
from .algorithm import Algorithm
from .buffer import ScoredBatch
from .config import RolloutConfig


_METHODS = ("initial_seeds", "noise_amounts", "trained_levels", "targets", "loss")


def check_class(algorithm: type[Algorithm]) -> None:
    """
    Raises:
        TypeError: An attribute of the class is missing or of another kind, or a method is not written.
    """
    is_name = lambda value: isinstance(value, str) and value.strip() != ""
    is_class = lambda value, parent: isinstance(value, type) and issubclass(value, parent)
    attributes = {
        "algorithm": (is_name, "the name of the algorithm"),
        "paper": (lambda value: isinstance(value, Paper), "a `Paper`"),
        "config_class": (lambda value: is_class(value, RolloutConfig), "a subclass of `RolloutConfig`"),
        "scheduler_class": (lambda value: is_class(value, RolloutScheduler), "a subclass of `RolloutScheduler`"),
        "base_distance_name": (is_name, "the name of a metric"),
        "latents_per_target": (lambda value: isinstance(value, int) and value >= 0, "an int >= 0"),
        "noises_endpoints": (lambda value: isinstance(value, bool), "a bool"),
        "has_old_policy": (lambda value: isinstance(value, bool), "a bool"),
        "hyperparameters": (lambda value: isinstance(value, tuple), "a tuple of names of options"),
    }
    for name, (is_right, should) in attributes.items():
        if not hasattr(algorithm, name):
            raise TypeError(f"{algorithm.__name__} has no `{name}`, which must be {should} (docs/algorithms.md).")
        value = getattr(algorithm, name)
        if not is_right(value):
            raise TypeError(f"{algorithm.__name__} has {name}={value!r}: it must be {should} (docs/algorithms.md).")
    options = {field.name for field in fields(algorithm.config_class)}
    unknown = [name for name in algorithm.hyperparameters if name not in options]
    if unknown:
        raise TypeError(
            f"{algorithm.__name__} has {unknown[0]!r} among its hyperparameters, and {algorithm.config_class.__name__} has no "
            "such option."
        )
    missing = [name for name in _METHODS if not _is_written(algorithm, name)]
    if missing:
        raise TypeError(f"{algorithm.__name__} does not implement {', '.join(missing)} (docs/algorithms.md).")


def check_methods(trainer: Algorithm) -> None:
    """
    Call what needs no images, as the first rollout will.

    Raises:
        ValueError: A method returned something else than it should, or `beta` needs one that is not written.
    """
    if trainer.args.beta and not _is_written(type(trainer), "base_distance"):
        raise ValueError(
            f"beta={trainer.args.beta} weighs the `base_distance` of {type(trainer).__name__}, which does not implement it: "
            "set beta=0."
        )
    numbers = range(trainer.args.prompts_per_call)
    initial_seeds(trainer, 0, numbers)
    noise_amounts(trainer, 0, numbers)
    trained_levels(trainer, 0, 0)


def initial_seeds(trainer: Algorithm, rollout: int, numbers: Sequence[int]) -> list[int]:
    prompts, samples = len(numbers), len(numbers) * trainer.args.num_candidates
    seeds = returned = trainer.initial_seeds(rollout, numbers)
    try:
        seeds = [operator.index(seed) for seed in returned]
    except TypeError:
        seeds = []
    if len(seeds) not in (prompts, samples) or not all(0 <= seed < 2**64 for seed in seeds):
        _refuse(
            trainer,
            "initial_seeds",
            returned,
            f"it must return ints in [0, 2^64), one for each of the {prompts} prompts or of their {samples} images",
        )
    return seeds


def noise_amounts(trainer: Algorithm, rollout: int, numbers: Sequence[int]) -> Tensor:
    levels = len(trainer.sigmas)
    shapes = ([levels], [len(numbers), levels])
    amounts = trainer.noise_amounts(rollout, numbers)
    if not _is_float(amounts) or list(amounts.shape) not in shapes or not (amounts.isfinite() & (amounts >= 0)).all():
        should = (
            f"it must return finite floats >= 0 as a tensor of shape [T + 1] = {shapes[0]} or [P, T + 1] = {shapes[1]}"
        )
        _refuse(trainer, "noise_amounts", amounts, should)
    return amounts


def trained_levels(trainer: Algorithm, rollout: int, batch: int) -> list[int]:
    steps, count = len(trainer.sigmas) - 1, trainer.args.num_trained_levels
    known = set(trainer.trainable_levels)
    returned = trainer.trained_levels(rollout, batch)
    try:
        levels = [operator.index(level) for level in returned]
    except TypeError:
        levels = []
    if len(levels) != count or not known.issuperset(levels):
        should = f"it must return K = {count} ints in [0, T) = [0, {steps})"
        if len(known) < steps:
            should += f", of which only {sorted(known)} are steps of a trained transformer"
        _refuse(trainer, "trained_levels", returned, should)
    return levels


def targets(trainer: Algorithm, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    returned = trainer.targets(sampled, rewards, rows)
    samples = rewards.numel()
    if not isinstance(returned, tuple) or not all(
        isinstance(t, Tensor) and t.shape[:1] == (samples,) for t in returned
    ):
        should = f"it must return a tuple of tensors, each with N = {samples} samples in front"
        _refuse(trainer, "targets", returned, should)
    return returned


def loss(
    trainer: Algorithm, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int
) -> tuple[Tensor, Tensor | None]:
    """Loss and ratio of each sample, [N]."""
    returned, samples = trainer.loss(velocity, old_velocity, batch, level), len(velocity)
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    given = returned[:1] if is_pair and returned[1] is None else returned
    if not is_pair or not all(_is_float(values) and values.shape == (samples,) for values in given):
        should = f"it must return a `SurrogateLoss`, the loss and the ratio of each sample, of shape [N] = [{samples}]"
        _refuse(trainer, "loss", returned, should)
    if velocity.requires_grad and not returned[0].requires_grad:
        _refuse(trainer, "loss", returned, "its loss must be computed from `velocity` with gradients, and has none")
    return returned


def base_distance(
    trainer: Algorithm, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int
) -> Tensor:
    distance = trainer.base_distance(velocity, base_velocity, batch, level)
    if not _is_float(distance) or distance.shape != (len(velocity),):
        should = f"it must return the distance of each sample, of shape [N] = [{len(velocity)}]"
        _refuse(trainer, "base_distance", distance, should)
    return distance


def _is_written(algorithm: type[Algorithm], method: str) -> bool:
    return getattr(algorithm, method) is not getattr(Algorithm, method)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _refuse(trainer: Algorithm, method: str, returned: Any, should: str) -> NoReturn:
    raise ValueError(
        f"{type(trainer).__name__}.{method} returned {_described(returned)}: {should} (docs/algorithms.md)."
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        values = f" {value.tolist()}" if value.numel() <= 8 else ""
        return f"a {str(value.dtype).removeprefix('torch.')} tensor{values} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_described, value[:8])) + (", ..." if len(value) > 8 else "")
        return f"a {type(value).__name__} of {len(value)} ({inner})"
    return repr(value)
