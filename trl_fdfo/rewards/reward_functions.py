"""Calls a user's reward functions and checks what they return."""

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import TrainerState


RewardFunction = Callable[..., Any]

# What every reward can have, beside the columns of the dataset.
ARGUMENTS = ("images", "prompts", "trainer_state")


class RewardFunctions:
    """
    One or several reward functions as one.

    Args:
        functions (`Callable` or `list[Callable]`): Rewards as described in [`trl_fdfo.rewards`].
        weights (`list[float]`, *optional*): Weight of each in the sum; 1 each by default.

    Raises:
        ValueError: No reward, something that is not callable or whose arguments cannot be known, an unknown `image_type`,
            or another number of weights than of rewards.
    """

    def __init__(self, functions: RewardFunction | list[RewardFunction], weights: list[float] | None = None):
        self.functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not self.functions:
            raise ValueError("reward_fn is empty: give at least one reward function.")
        for function in self.functions:
            if not callable(function):
                raise ValueError(
                    f"reward_fn={function!r} is a {type(function).__name__}, not a callable "
                    "`(images, prompts, **columns) -> one float per image`."
                )
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.functions)} reward function(s): give one each."
            )
        self.weights = torch.tensor(weights if weights is not None else [1.0] * len(self.functions))
        self.names = _unique([_attribute(f, "__name__", type(f).__name__) for f in self.functions])
        for name, function in zip(self.names, self.functions):
            image_type = _attribute(function, "image_type", "pt")
            if image_type not in ("pt", "pil"):
                raise ValueError(f"Reward '{name}' has image_type={image_type!r}; it must be 'pt' or 'pil'.")
            _parameters(name, function)

    def check_columns(self, columns: Sequence[str], dataset: str = "train_dataset") -> None:
        """
        Raises:
            ValueError: A reward needs an argument that no column of the dataset has, or a column has the name of an
                argument that every reward gets.
        """
        taken = [column for column in columns if column in ARGUMENTS]
        if taken:
            raise ValueError(
                f"{dataset} has a column '{taken[0]}', a name that rewards get something else by: rename it."
            )
        known = [*ARGUMENTS, *columns]
        for name, function in zip(self.names, self.functions):
            for parameter in _parameters(name, function):
                variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                if not variable and parameter.default is parameter.empty and parameter.name not in known:
                    raise ValueError(
                        f"Reward '{name}' needs the argument '{parameter.name}', and {dataset} has no such column. A "
                        f"reward can have: {', '.join(known)}."
                    )

    def __call__(
        self, images: Tensor, prompts: Sequence[str], trainer_state: TrainerState, columns: dict[str, Sequence]
    ) -> Tensor:
        """
        Reward of each image by each function.

        Args:
            images (`Tensor`): Floats in [0, 1], shape [N, 3, H, W].
            prompts (`Sequence[str]`): N prompts.
            trainer_state (`TrainerState`): State of the trainer.
            columns (`dict[str, Sequence]`): Columns of the dataset, N values each.

        Returns:
            `Tensor`: Rewards on the CPU, shape [N, number of functions]; NaN where a function does not apply.

        Raises:
            ValueError: A function returned something else than one finite number (or None) per image.
        """
        arguments = {**columns, "images": images, "prompts": list(prompts), "trainer_state": trainer_state}
        results = [self._call(*named, arguments) for named in zip(self.names, self.functions)]
        results = _awaited(results)
        return torch.stack([_checked(name, result, prompts) for name, result in zip(self.names, results)], dim=1)

    def total(self, rewards: Tensor) -> Tensor:
        """
        Weighted sum over the functions.

        Args:
            rewards (`Tensor`): Rewards of P prompts x G branches by each of R functions, shape [P, G, R], NaN where a
                function does not apply.

        Returns:
            `Tensor`: Shape [P, G]. A function that does not apply to every branch of a prompt is left out there; where
            none applies all branches are NaN.
        """
        applies = rewards.isfinite().all(dim=1, keepdim=True)
        total = (rewards * self.weights.to(rewards)).where(applies, 0).sum(dim=-1)
        return total.where(applies.any(dim=-1), torch.nan)

    def _call(self, name: str, function: RewardFunction, arguments: dict[str, Any]) -> Any:
        if _attribute(function, "image_type", "pt") == "pil":
            arguments = {**arguments, "images": _to_pil(arguments["images"])}
        parameters = _parameters(name, function)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
        try:
            return function(**arguments)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"Raised by the reward '{name}'.")
            raise


def load_reward(path: str) -> RewardFunction:
    """
    The callable that `"module:name"` names, from the Python path or the working directory.

    Raises:
        ValueError: `path` has another form, or no such module or name is found.
    """
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise ValueError(f"reward '{path}' is not of the form module:callable, such as my_rewards:sharpness.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward '{path}': there is no module '{error.name}' on the Python path or in the working directory."
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"reward '{path}': module '{module_name}' has no '{name}'.")
    return getattr(module, name)


def _attribute(function: RewardFunction, name: str, default: Any) -> Any:
    """An attribute of a callable, or of what `functools.partial` or a decorator has wrapped."""
    while function is not None:
        if hasattr(function, name):
            return getattr(function, name)
        function = getattr(function, "func", getattr(function, "__wrapped__", None))
    return default


def _parameters(name: str, function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ValueError(
            f"Reward '{name}' does not say which arguments it takes. Wrap it: `def {name}(images, prompts): ...`."
        ) from None


def _awaited(results: list[Any]) -> list[Any]:
    """The results, those of async rewards awaited at the same time."""
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not pending:
        return results

    async def gather():
        return await asyncio.gather(*(results[i] for i in pending))

    # Another thread, because a notebook has an event loop running in this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for i, result in zip(pending, pool.submit(asyncio.run, gather()).result()):
            results[i] = result
    return results


def _checked(name: str, result: Any, prompts: list[str]) -> Tensor:
    """The rewards as float32 on the CPU, NaN for None."""
    if isinstance(result, Tensor) and result.ndim > 1:
        raise ValueError(
            f"Reward '{name}' returned a tensor of shape {list(result.shape)} for {len(prompts)} images: it must return "
            f"one float per image, shape [{len(prompts)}]."
        )
    values = result.detach().cpu().tolist() if isinstance(result, Tensor) else result
    try:
        values = list(values)
    except TypeError:
        raise ValueError(
            f"Reward '{name}' returned {values!r}, a {type(result).__name__}: it must return one float per image."
        ) from None
    if len(values) != len(prompts):
        raise ValueError(
            f"Reward '{name}' returned {len(values)} values for {len(prompts)} images: it must return one float per "
            "image, in their order."
        )
    rewards = []
    for value, prompt in zip(values, prompts):
        try:
            reward = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"Reward '{name}' returned {value!r}, which is not a number, for the prompt {prompt!r}."
            ) from None
        if value is not None and not math.isfinite(reward):
            raise ValueError(
                f"Reward '{name}' returned {reward} for the prompt {prompt!r}: a reward must be finite. Return None where "
                "it does not apply."
            )
        rewards.append(reward)
    return torch.tensor(rewards)


def _to_pil(images: Tensor) -> list:
    """N images, or N lists of the frames of a video."""
    if images.ndim == 5:
        return [_to_pil(frames) for frames in images]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


def _unique(names: list[str]) -> list[str]:
    """The names, numbered where one occurs again (two lambdas, two instances of a class)."""
    return [name if names.index(name) == i else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
