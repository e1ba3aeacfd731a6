"""The average of the trained weights over rollouts."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.utils import logging

from .sharded_weights import set_values, trained_parameters, whole_values


logger = logging.get_logger(__name__)


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
