"""The self-check of the replay: a replayed velocity must be the velocity that the rollout recorded."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .trained import trained_module


# Relative rms difference between a replayed and a recorded velocity that kernels which do not repeat to the bit may
# cause (atomics, compiled graphs, another batch size), by dtype. The wrong prompt, step or guidance is 10 to 1000 times as
# far off.
REPLAY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# A run allows this many times the difference that it measured at its start, within these multiples of the above: two valid
# roundings of 60 layers in bfloat16 differ by up to 0.02.
FLOOR_FACTOR, MIN_TOLERANCE, MAX_TOLERANCE = 4, 0.1, 5


class ReplayError(RuntimeError):
    """A replayed velocity is not the recorded one: the run would train another function than it sampled."""


def replay_error(velocity: Tensor, recorded: Tensor) -> Tensor:
    """
    Args:
        velocity (`Tensor`): A replayed velocity, taken before any optimizer step.
        recorded (`Tensor`): The one that the rollout recorded, of the same shape.

    Returns:
        `Tensor`: Rms difference relative to the rms of the recorded one, a scalar on its device: 0.0 if the kernels repeat
        to the bit.
    """
    difference = (velocity.detach().float() - recorded.float()).square().mean().sqrt()
    return difference / recorded.float().square().mean().sqrt().clamp_min(1e-12)


def default_tolerance(pipeline: DiffusionPipeline, autocast_dtype: torch.dtype | None = None) -> float:
    """[`REPLAY_TOLERANCE`] of the dtype that the pipeline's transformer computes in."""
    dtypes = (torch.float32, trained_module(pipeline).dtype, autocast_dtype)
    return max(REPLAY_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def tolerance_above(floor: float, usual: float) -> float:
    """
    Args:
        floor (`float`): Largest [`replay_error`] of replays that compute the same function in other kernels.
        usual (`float`): The [`default_tolerance`].

    Returns:
        `float`: The [`replay_error`] that a run allows.
    """
    return min(max(FLOOR_FACTOR * floor, MIN_TOLERANCE * usual), MAX_TOLERANCE * usual)


def check_replay(
    velocity: Tensor,
    recorded: Tensor,
    pipeline: DiffusionPipeline,
    level: int,
    tolerance: float | None = None,
) -> float:
    """
    Compare a replayed velocity, taken before any optimizer step, with the one that the rollout recorded.

    Args:
        velocity, recorded (`Tensor`): As in [`replay_error`].
        pipeline, level: As in [`check_replay_error`].
        tolerance (`float`, *optional*): As in [`check_replay_error`]; the [`default_tolerance`] if None.

    Returns:
        `float`: The [`replay_error`].

    Raises:
        ReplayError: As [`check_replay_error`].
    """
    error = replay_error(velocity, recorded).item()
    check_replay_error(error, level, pipeline, default_tolerance(pipeline) if tolerance is None else tolerance)
    return error


def check_replay_error(error: float, level: int, pipeline: DiffusionPipeline, tolerance: float) -> None:
    """
    Args:
        error (`float`): The [`replay_error`] of a velocity.
        level (`int`): Step of the sampler, named in the message.
        pipeline (`DiffusionPipeline`): Its name stands in the message.
        tolerance (`float`): The largest error that is allowed.

    Raises:
        ReplayError: The error is larger; names the pipeline, the difference and the likely cause.
    """
    # Written so that a NaN fails.
    if not error <= tolerance:
        raise ReplayError(
            f"The replay of {type(pipeline).__name__} is not exact: before any optimizer step, the velocity of step "
            f"{level} differs from the one recorded in the rollout by {error:.3g} of its rms (at most {tolerance:g} is "
            "allowed). Training would follow another function than the one that was sampled. Likely causes: dropout or "
            "another random layer in the transformer (set it to 0); a feature cache (`transformer.disable_cache()`); "
            "guidance that changes from call to call (turn it off in `pipeline_kwargs`); a pipeline that keeps state "
            "between its steps. If all of it is rounding, set `replay_tolerance`."
        )
