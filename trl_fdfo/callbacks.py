"""Trainer callbacks: the progress bar, what the first rollout took, and the weight averaging."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from .sharding import set_values, trained_parameters, whole_values


logger = logging.get_logger(__name__)


class FDFOProgressCallback(ProgressCallback):
    """
    A bar that counts optimizer steps and shows the latest reward and the latest evaluation, and below it, while images are
    sampled, one that counts the prompts of the rollout.
    """

    SHOWN = ("reward", "reward_std")
    SHOWN_OF_EVALUATION = ("eval_reward", "eval_control", "eval_diversity")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._evaluated: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._evaluated = {}
        if self.training_bar is not None:
            self.training_bar.set_description("train")
            self.training_bar.unit = "step"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        if "reward" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in self.SHOWN if name in logs}
            rollout = round(state.global_step / args.steps_per_rollout)
            self.training_bar.set_postfix({"rollout": f"{rollout}/{args.num_rollouts}", **shown, **self._evaluated})
        elif "eval_reward" in logs:
            self._evaluated = {name: f"{logs[name]:.3g}" for name in self.SHOWN_OF_EVALUATION if name in logs}
            if logs.get("eval_alarm"):
                self._evaluated["ALARM"] = "see the log"
            self.training_bar.set_postfix(self._evaluated)
            super().on_log(args, state, control, logs=logs, **kwargs)
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)

    def rollout_bar(self, rollout: int, prompts: int) -> tqdm:
        """A bar for one rollout of `prompts` prompts on this process."""
        return tqdm(
            total=prompts,
            desc=f"rollout {rollout + 1}",
            unit="prompt",
            leave=False,
            dynamic_ncols=True,
            disable=self.training_bar is None,
        )


class FirstRolloutReport(TrainerCallback):
    """
    Prints, once per call of `train`, what the first rollout and the updates on it took, and the time that is left.

    Args:
        seconds (`Mapping[str, float]`): Since the start of `train`, in `"rollout"` and in `"reward"`, which is a part of it.
    """

    def __init__(self, seconds: Mapping[str, float]):
        self.seconds = seconds
        self._start: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._rollouts_before = state.global_step // args.steps_per_rollout

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        done, inside = divmod(state.global_step, args.steps_per_rollout)
        if inside or done != self._rollouts_before + 1 or not state.is_world_process_zero:
            return
        took = time.perf_counter() - self._start
        sampling = self.seconds["rollout"] - self.seconds["reward"]
        left = args.num_rollouts - done
        peak, where = peak_memory(args.device)
        # Not `print`, which would write into a progress bar.
        tqdm.write(
            f"After rollout {done}: peak memory {peak / 2**30:.2f} GiB {where}; {took:.1f} s per rollout (sampling "
            f"{sampling:.1f}, rewards {self.seconds['reward']:.1f}, updates {took - self.seconds['rollout']:.1f}); "
            f"{_duration(left * took)} for the {left} left"
        )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Most bytes that were taken at once, on a GPU since the last reset, and what they are."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset, "of the whole process"
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of the whole process"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


class WeightAveraging(TrainerCallback):
    """
    Exponential moving average of the trained weights over rollouts, whole on each process.

    Args:
        model (`torch.nn.Module`): The model whose trained weights are averaged; it may be sharded later.
        decay (`float`): Decay per rollout in [0, 1). It starts lower: min(decay, (1 + n) / (10 + n)) at rollout n.
    """

    FILE_NAME = "averaged_weights.safetensors"

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = model
        self.average = EMAModel(self.parameters, decay=decay)
        self._is_applied = False

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(trained_parameters(self.model).values())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_rollout == 0:
            # Diffusers averages what has gradients, and copies all else.
            self.average.step([value.requires_grad_() for value in whole_values(self.parameters)])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights in the place of the trained ones. May be nested."""
        if self._is_applied:
            yield
            return
        trained = whole_values(self.parameters)
        set_values(self.parameters, self.average.shadow_params)
        self._is_applied = True
        try:
            yield
        finally:
            set_values(self.parameters, trained)
            self._is_applied = False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the names that the trained ones have in the model."""
        return dict(zip(trained_parameters(self.model), self.average.shadow_params))

    def save(self, folder: str | Path) -> None:
        """Write the average beside a checkpoint's weights."""
        tensors = {str(i): parameter.contiguous() for i, parameter in enumerate(self.average.shadow_params)}
        save_file(tensors, Path(folder, self.FILE_NAME), metadata={"updates": str(self.average.optimization_step)})

    def load(self, folder: str | Path, updates: int) -> None:
        """Read what `save` wrote after `updates` rollouts; without it, the average starts from the weights as they are."""
        if not Path(folder, self.FILE_NAME).is_file():
            logger.warning(f"{folder} has no {self.FILE_NAME}: the average over rollouts starts from its weights.")
            self.average = EMAModel(whole_values(self.parameters), decay=self.average.decay)
            return
        tensors = load_file(Path(folder, self.FILE_NAME))
        for i, parameter in enumerate(self.average.shadow_params):
            parameter.copy_(tensors[str(i)])
        self.average.optimization_step = updates
