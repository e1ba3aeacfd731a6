"""Before and after: images of the same prompts from the same seeds, and what the rewards say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils import logging

from .diversity import load_diversity
from .pipeline_flow import repeat_each


if TYPE_CHECKING:
    from .fdfo_trainer import FDFOTrainer


logger = logging.get_logger(__name__)

# Of the first image. The seeds of the rollouts are hashes of 64 bits: these are used nowhere else.
FIRST_SEED = 1_000_000


class Comparison:
    """
    Samples of a trainer's pipeline for its model card. `trainer.comparison = Comparison(trainer)`, then `sample("before")`
    before `train` and `sample("after")` after it; a push to the Hub does by itself what is missing.

    The prompts are the first of `eval_dataset` where the trainer has one, else of the training prompts.

    Args:
        trainer ([`FDFOTrainer`]): What samples.
        num_prompts (`int`): Prompts P, or as many as the dataset has.
        images_per_prompt (`int`): Images S of each; at least 2 for their distance.
        metrics (`Callable`, *optional*): `(images, prompts) -> dict of floats`, reported beside the rewards; images
            [P S, 3, H, W] in [0, 1].
        diversity (`str` or `Callable`): A name for [`~trl_fdfo.diversity.load_diversity`], such as "clip", or a callable
            `(images [P, S, ...]) -> Tensor [P]`, reported under its `__name__`.

    Attributes:
        prompts (`list[str]`): The P prompts.
        held_out (`bool`): Whether they are those of `eval_dataset`.
        diversity (`Callable`): What measures diversity.
        images (`dict[str, Tensor]`): What was sampled under each name, on the CPU, [P, S, 3, H, W] in [0, 1]; videos
            [P, S, F, 3, H, W].
        results (`dict[str, dict[str, float]]`): Means of rewards, metrics and diversity under each name; filled on the
            main process.
    """

    def __init__(
        self,
        trainer: FDFOTrainer,
        num_prompts: int = 8,
        images_per_prompt: int = 2,
        metrics: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None,
        diversity: str | Callable[[Tensor], Tensor] = "pixels",
    ):
        self.diversity = load_diversity(diversity) if isinstance(diversity, str) else diversity
        self.held_out = trainer.eval_dataset is not None
        dataset = trainer.eval_dataset if self.held_out else trainer.train_dataset
        self._trainer, self._metrics = trainer, metrics
        self._columns = {name: repeat_each(values, images_per_prompt) for name, values in dataset[:num_prompts].items()}
        self._all_prompts = self._columns[trainer.args.dataset_prompt_column]
        self._images_per_prompt = images_per_prompt
        self.prompts = self._all_prompts[::images_per_prompt]
        self.images: dict[str, Tensor] = {}
        self.results: dict[str, dict[str, float]] = {}
        self._after_step: int | None = None

    def sample(self, name: str, **call_kwargs: Any) -> None:
        """
        Sample the images and score them. To be called by all processes.

        Args:
            name (`str`): What they are called: "before", "after", or something between for the table.
            **call_kwargs: Arguments of the pipeline's call in the place of the configured ones.
        """
        self._sample(name, **call_kwargs)
        self._score(name)

    def complete(self) -> None:
        """
        Sample what is missing: "after", of the weights as they are now, and, where nothing was sampled before training,
        the model with its adapter disabled. To be called by all processes. Warns where a reward fails.
        """
        args = self._trainer.args
        if not self.images and args.use_peft:
            with self._trainer.model.disable_adapter():
                # Another adapter may have been there before this training.
                self._sample("before" if args.adapter is None else "base model")
        if self._after_step != self._trainer.state.global_step:
            self._sample("after")
        for name in self.images.keys() - self.results.keys():
            try:
                self._score(name)
            except Exception as error:  # the user's: training is over, and the result is to be saved all the same
                logger.warning(
                    f"The images '{name}' have no rewards in the model card ({type(error).__name__}: {error})."
                )

    def forget_after(self) -> None:
        """What was sampled as "after": training goes on."""
        self.images.pop("after", None)
        self.results.pop("after", None)
        self._after_step = None

    def _sample(self, name: str, **call_kwargs: Any) -> None:
        seeds = range(FIRST_SEED, FIRST_SEED + len(self._all_prompts))
        images = self._trainer.generate(self._all_prompts, seeds, self._columns, **call_kwargs)
        self.images.pop(name, None)  # to the end of the table
        self.images[name] = images.unflatten(0, (-1, self._images_per_prompt))
        self.results.pop(name, None)
        if name == "after":
            self._after_step = self._trainer.state.global_step

    def _score(self, name: str) -> None:
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        images, prompts = self.images[name].flatten(0, 1), self._all_prompts
        results = {}
        for kind, functions in (("reward", trainer.reward_functions), ("control", trainer.control_functions)):
            if functions is None:
                continue
            rewards = functions(images, prompts, trainer.state, self._columns)
            functions.on_rollout_end()
            if kind == "reward" or len(functions.names) > 1:
                results[kind] = functions.total(rewards[:, None]).nanmean().item()
            if kind == "control" or len(functions.names) > 1:
                means = rewards.nanmean(dim=0).tolist()
                results |= {f"{kind}s/{f}/mean": mean for f, mean in zip(functions.names, means)}
        if self._metrics is not None:
            results |= self._metrics(images, prompts)
        if self._images_per_prompt > 1:
            results[self.diversity.__name__] = self.diversity(self.images[name]).mean().item()
        self.results[name] = results
