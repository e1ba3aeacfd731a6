"""
Judges that compare the images of a prompt. Training needs only differences of rewards within a prompt.

A judge sees two images and gives the log odds c(a, b) = log p(a is better) - log p(b is better). Judges prefer a place
as well as an image, so it is asked in both orders. Half the difference,

    p(a, b) = (c(a, b) - c(b, a)) / 2 = -p(b, a),

is free of the preference for a place. The rewards of the G branches of a prompt are the means

    R_a = (1 / G) sum_b p(a, b),

the least-squares fit to R_a - R_b = p(a, b), which is exact for G = 2.
"""

import asyncio
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reward_functions import RATES, SAMPLES, checked_rewards
from .vlm_score import VLMScore
from .vlm_server import VLMServer


class PairwiseJudge:
    """
    A reward that ranks the images of a prompt by a judge that compares two.

    An evaluation scores single images, so the reward applies to none of them.

    Args:
        compare (`Callable`): `(first, second, prompts, **columns) -> log odds that the first is better`, for M pairs of
            images and their M prompts: M numbers, or None for a pair without an opinion. The images are tensors
            [M, 3, H, W] in [0, 1], or PIL if `compare` has `image_type = "pil"`. Sync or `async`. The method `compare`
            of [`VLMScore`] and [`VLMServer`] asks a VLM.
        of (`str`): What is compared: `"images"` (videos too), `"videos"` alone, or `"audio"`, tensors [M, C, L].

    Raises:
        ValueError: `compare` takes other arguments, or `of` is something else. In a call: `compare` did not return one finite
            number (or None) per pair.
    """

    pairwise = True

    def __init__(self, compare: Callable[..., Any], of: str = "images"):
        if of not in SAMPLES:
            raise ValueError(f"of={of!r} of PairwiseJudge is nothing that a pipeline makes: name one of {SAMPLES}.")
        self.compare, self.of = compare, of
        owner = getattr(compare, "__self__", compare)  # the object, if `compare` is a method
        self.__name__ = getattr(owner, "__name__", type(owner).__name__)
        self.image_type = getattr(compare, "image_type", "pt")
        self.background = getattr(compare, "background", False)
        own = (of, "prompts", "num_generations")
        parameters = list(inspect.signature(compare).parameters.values())
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        columns = parameters[3:]
        if inspect.isclass(compare) or len(parameters) < 3 or any(p.kind not in positional for p in parameters[:3]):
            raise ValueError(
                f"PairwiseJudge compares by a callable (first, second, prompts, **columns), and {self.__name__} takes "
                f"{inspect.signature(compare)}."
            )
        taken = [column.name for column in columns if column.name in {*own, *SAMPLES}]
        if taken:
            raise ValueError(
                f"{self.__name__} has an argument '{taken[0]}', which a judge gets for another purpose: rename it."
            )
        # A reward is called with the arguments that its signature names.
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in own]
            + [p.replace(kind=max(p.kind, p.KEYWORD_ONLY)) for p in columns]
        )
        self._further = next((p.name for p in columns if p.kind is p.VAR_KEYWORD), None)
        self.on_rollout_end = getattr(owner, "on_rollout_end", lambda: None)
        if hasattr(owner, "waiting"):
            self.waiting = owner.waiting

    def __call__(self, *samples: Any, **arguments: Any) -> Any:
        """
        N rewards in log odds, which sum to 0 over each prompt; None without an opinion. An awaitable if `compare` is
        `async`. Called by `__signature__`: with N images, or what else is compared, of which the `num_generations` of a
        prompt are adjacent; N prompts; `num_generations`; and further arguments of `compare`.
        """
        columns = self.__signature__.bind(*samples, **arguments).arguments
        # All else that there is, for a judge with `**columns`.
        further = columns.pop(self._further, {})
        columns |= {name: column for name, column in further.items() if name not in SAMPLES}
        images, prompts, num_generations = map(columns.pop, (self.of, "prompts", "num_generations"))
        if num_generations < 2:
            return [None] * len(prompts)
        pairs = [
            (start + a, start + b)
            for start in range(0, len(prompts), num_generations)
            for a, b in itertools.combinations(range(num_generations), 2)
        ]
        first, second = map(list, zip(*pairs))
        # Two calls of the same shape, so that swapping the images swaps the answers to the bit.
        answers = []
        for one, other in ((first, second), (second, first)):
            whole = ("trainer_state", *RATES)
            further = {name: v if name in whole else _take(v, one) for name, v in columns.items()}
            answers.append(self.compare(_take(images, one), _take(images, other), _take(prompts, one), **further))

        def combined(answers: Sequence) -> list[float | None]:
            asked = _take(prompts, first)
            forward, backward = (checked_rewards(self.__name__, answer, asked, of="pairs") for answer in answers)
            preference = (forward - backward) / (2 * num_generations)
            rewards = torch.zeros(len(prompts), dtype=torch.float64)
            rewards.index_add_(0, torch.tensor(first), preference)
            rewards.index_add_(0, torch.tensor(second), -preference)
            return [None if value != value else value for value in rewards.tolist()]

        async def awaited() -> list[float | None]:
            return combined(await asyncio.gather(*answers))

        return awaited() if any(map(inspect.isawaitable, answers)) else combined(answers)


def vlm_judge(url: str | list[str] | None = None, question: str = "comparison", **options: Any) -> PairwiseJudge:
    """
    Log odds by which a VLM prefers one image of a prompt to the other, asked in both orders.

    Args:
        url (`str` or `list[str]`, *optional*): Server(s), as in [`VLMServer`]. Default: [`VLMScore`] in this process.
        question (`str`): Preset or template. Its target says that the first image is better.
        **options: Further arguments of [`VLMServer`] or [`VLMScore`].
    """
    vlm = VLMScore(question=question, **options) if url is None else VLMServer(url, question=question, **options)
    vlm.question.check("pair")
    judge = PairwiseJudge(vlm.compare)
    judge.__name__ = "vlm_judge"
    return judge


def unified_reward(
    url: str | list[str] | None = None, model: str = "CodeGoat24/UnifiedReward-qwen-7b", **options: Any
) -> PairwiseJudge:
    """
    UnifiedReward (arXiv 2503.05236): log odds by which it prefers one image of a prompt.

    It is a Qwen2.5-VL that was trained on people's choices, and is asked in both orders. It writes "Image 1 is better.",
    "Image 2 is better." or "Both images are equally good."; here it is given "Image " and asked for the number, so that a tie
    is log odds of 0. Its score of one image, in decimals such as 2.69, has a step where a digit changes, and is not used.

    Args:
        url (`str` or `list[str]`, *optional*): Server(s), as in [`VLMServer`]. Default: [`VLMScore`] in this process.
        model (`str`): Hub id or folder, or the name under which a server has the model.
        **options: Further arguments of [`VLMServer`] or [`VLMScore`].
    """
    judge = vlm_judge(url, question="unified_reward", model=model, **options)
    judge.__name__ = "unified_reward"
    return judge


def _take(values: Any, indices: list[int]) -> Any:
    return values[indices] if isinstance(values, Tensor) else [values[i] for i in indices]
