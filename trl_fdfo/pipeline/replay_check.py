"""The self-check of the replay: a replayed velocity must be the velocity that the rollout recorded."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .trained import trained_module


# Relative rms difference between a replayed and a recorded velocity that kernels which do not repeat to the bit may
# cause (atomics, compiled graphs). The wrong prompt, step or guidance is 10 to 1000 times as far off.
REPLAY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


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


def check_replay(
    velocity: Tensor,
    recorded: Tensor,
    pipeline: DiffusionPipeline,
    level: int,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """
    Compare a replayed velocity, taken before any optimizer step, with the one that the rollout recorded.

    Args:
        velocity, recorded (`Tensor`): As in [`replay_error`].
        pipeline, level, autocast_dtype: As in [`check_replay_error`].

    Returns:
        `float`: The [`replay_error`].

    Raises:
        ReplayError: As [`check_replay_error`].
    """
    error = replay_error(velocity, recorded).item()
    check_replay_error(error, level, pipeline, autocast_dtype)
    return error


def check_replay_error(
    error: float, level: int, pipeline: DiffusionPipeline, autocast_dtype: torch.dtype | None = None
) -> None:
    """
    Args:
        error (`float`): The [`replay_error`] of a velocity.
        level (`int`): Step of the sampler, named in the message.
        pipeline (`DiffusionPipeline`): Its name stands in the message, its dtype sets the tolerance.
        autocast_dtype (`torch.dtype`, *optional*): The dtype that the model computes in, if it is not its own.

    Raises:
        ReplayError: It is more than kernels may cause; names the pipeline, the difference and the likely cause.
    """
    dtypes = (torch.float32, trained_module(pipeline).dtype, autocast_dtype)
    tolerance = max(REPLAY_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    # Written so that a NaN fails.
    if not error <= tolerance:
        raise ReplayError(
            f"The replay of {type(pipeline).__name__} is not exact: before any optimizer step, the velocity of step "
            f"{level} differs from the one recorded in the rollout by {error:.3g} of its rms (at most {tolerance:g} is "
            "allowed). Training would follow another function than the one that was sampled. Likely causes: dropout or "
            "another random layer in the transformer (set it to 0); a feature cache (`transformer.disable_cache()`); "
            "guidance that changes from call to call (turn it off in `pipeline_kwargs`); a pipeline that keeps state "
            "between its steps."
        )
