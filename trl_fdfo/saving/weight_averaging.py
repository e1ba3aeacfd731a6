"""Averages of the trained weights over rollouts: of the result, and of the policy that samples."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.utils import logging

from ..pipeline.adapter_files import AVERAGED_WEIGHTS_NAME
from .sharded_weights import set_values, trained_parameters, whole_values


logger = logging.get_logger(__name__)


class WeightAveraging(TrainerCallback):
    """
    Exponential moving average of the trained weights over rollouts, whole on each process, in float32.

    Args:
        model (`torch.nn.Module`): The model whose trained weights are averaged; it may be sharded later.
        decay (`float`): Decay per rollout in [0, 1). It starts lower: 0 at rollout 1, then min(decay, n / (n + 9)) at rollout n,
            so that 0.9 is reached at rollout 81 and 0.99 at rollout 891.
    """

    FILE_NAME = AVERAGED_WEIGHTS_NAME

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.start()
        self._is_applied = False

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(trained_parameters(self.model).values())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_rollout == 0:
            # Diffusers averages what has gradients, and copies all else.
            self.average.step([value.requires_grad_() for value in whole_values(self.parameters)])

    def start(self) -> None:
        """Make the weights as they are the average."""
        # In 16 bits the small share of the trained weights would be rounded away.
        self.average = EMAModel([value.float() for value in whole_values(self.parameters)], decay=self.decay)

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
        tensors = {name: parameter.contiguous() for name, parameter in self.state_dict().items()}
        save_file(tensors, Path(folder, self.FILE_NAME), metadata={"updates": str(self.average.optimization_step)})

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote; without it, the average starts from the weights as they are."""
        file = Path(folder, self.FILE_NAME)
        if not file.is_file():
            logger.warning(f"{folder} has no {self.FILE_NAME}: the average over rollouts starts from its weights.")
            self.start()
            return
        tensors = load_file(file)
        for number, (name, parameter) in enumerate(self.state_dict().items()):
            parameter.copy_(tensors[name if name in tensors else str(number)])  # of an older version by number
        with safe_open(file, "pt") as opened:  # the average may be younger than the run
            self.average.optimization_step = int(opened.metadata()["updates"])


class OldPolicy(WeightAveraging):
    """
    The weights that sample the rollouts, in float32: after rollout i they become eta_i old + (1 - eta_i) trained.

    Args:
        model (`torch.nn.Module`): As in [`WeightAveraging`].
        decay (`Callable[[int], float]`): eta_i in [0, 1) after i >= 1 rollouts; 0 puts the trained weights in their place.
    """

    FILE_NAME = "old_policy.safetensors"

    def __init__(self, model: torch.nn.Module, decay: Callable[[int], float]):
        super().__init__(model, 0.0)
        self.decay_after = decay

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # a run before may have ended inside a rollout
            self.start()

    def on_step_end(self, args, state, control, **kwargs):
        rollouts, inside = divmod(state.global_step, args.steps_per_rollout)
        if not inside:
            for old, trained in zip(self.average.shadow_params, whole_values(self.parameters)):
                old.lerp_(trained.to(old), 1 - self.decay_after(rollouts))
            self.average.optimization_step = rollouts
