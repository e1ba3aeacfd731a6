"""Questions to a VLM about images, with the two words whose probabilities are its answer."""

import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from ..media import evenly_spread


@dataclass(frozen=True)
class Question:
    """
    A question with two possible answers.

    Raises:
        ValueError: The template is empty or has braces other than `{prompt}`, or the words are the same.
    """

    template: str  # the question; `{prompt}` is replaced by the prompt of the image
    target: str = "Yes"  # the word that speaks for the image, or for the first of two
    contrast: str = "No"  # the word that speaks against the image, or for the second of two
    about: str | None = None  # "image"; "pair", two that are compared; "edit", an image and what it was; None: unknown
    answer: str = ""  # how the answer begins, in front of the word; the VLM is given it

    def __post_init__(self):
        if not self.template.strip():
            raise ValueError(f"question={self.template!r} is empty: ask something, or name one of {_names()}.")
        if re.search("[{}]", self.template.replace("{prompt}", "")):
            raise ValueError(
                f"question={self.template!r} has other braces than {{prompt}}, the one part that is filled in: leave them "
                "out."
            )
        if self.target == self.contrast:
            raise ValueError(
                f"target={self.target!r} and contrast={self.contrast!r} are the same word: the score compares how likely "
                "two answers are. Name two."
            )

    def ask(self, prompt: str) -> str:
        """The question about the image(s) of this prompt."""
        return self.template.replace("{prompt}", prompt)

    def check(self, about: str) -> None:
        """Raise a ValueError if the question is about something else than what it is asked about, as in `about`."""
        if self.about not in (None, about):
            (is_about, _, reward), (_, shown, _) = _KINDS[self.about], _KINDS[about]
            preset = next(name for name, question in QUESTIONS.items() if question.about == about)
            raise ValueError(
                f"The question {self.template!r} {is_about}, and {shown}: take {reward} for it, or here "
                f"question='{preset}' or one of your own."
            )


# What a question is about; what a reward shows; and the rewards that do.
_KINDS = {
    "image": ("is about one image", "a score is of one", "VLMScore or VLMServer"),
    "pair": ("compares two images", "a judge shows two", "`vlm_judge` or PairwiseJudge(vlm.compare)"),
    "edit": ("is about an edit", "a judge of edits shows the image before it too", "`vlm_edit` or EditJudge(vlm)"),
}


# The first question is from arXiv 2603.12893. The comparison is answered by letters, which are one token in
# vocabularies of byte-level BPE and SentencePiece; Llama's vocabulary splits digits. UnifiedReward (arXiv 2503.05236) was
# trained on its question, which github.com/CodeGoat24/UnifiedReward gives, and answers "Image 1 is better."
QUESTIONS = {
    "alignment": Question('Does this image match the caption "{prompt}"? Answer Yes or No.', about="image"),
    "quality": Question(
        "Is this image of high quality: sharp, well composed and free of artifacts such as noise, distorted shapes or "
        "wrong anatomy? Answer Yes or No.",
        about="image",
    ),
    "photorealism": Question(
        "Does this image look like a real photograph, and not like a drawing, a painting or a computer-generated image? "
        "Answer Yes or No.",
        about="image",
    ),
    "comparison": Question(
        'The first image is A, the second image is B. Which of them matches the caption "{prompt}" better? Answer A or B.',
        target="A",
        contrast="B",
        about="pair",
    ),
    "unified_reward": Question(
        "You are given a text caption and two generated images based on that caption. Your task is to evaluate and compare "
        "these images based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well each image aligns with the provided caption. Consider the accuracy "
        "of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail preservation, color "
        "accuracy, and overall aesthetic appeal.\n"
        "Compare both images using the above criteria and select the one that better aligns with the caption while exhibiting "
        "superior visual quality.\n"
        'Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both images are equally good."\n'
        "Your task is provided as follows:\nText Caption: [{prompt}]",
        target="1",
        contrast="2",
        about="pair",
        answer="Image ",
    ),
    "edit": Question(
        'The last image was made from what comes before it, by the instruction "{prompt}". Does it show what the instruction '
        "asks for, and is everything else as it was? Answer Yes or No.",
        about="edit",
    ),
}


def get_question(question: str, target: str | None = None, contrast: str | None = None) -> Question:
    """
    A preset of `QUESTIONS` by its name, or a question of the user's own, with other words if they are given.

    Raises:
        ValueError: [`Question`] refuses the arguments, or `question` is a single word but names no preset.
    """
    if question not in QUESTIONS and re.fullmatch(r"\w+", question, re.ASCII):
        raise ValueError(
            f"question={question!r} is no preset and no question: name one of {_names()}, or ask something."
        )
    words = {name: word for name, word in (("target", target), ("contrast", contrast)) if word is not None}
    return replace(QUESTIONS.get(question) or Question(question), **words)


# The least probability of the two words together. Below it an answer begins with something else, such as "<think>".
MIN_PROBABILITY = 0.01


class VLMReward:
    """
    The base class of rewards that ask a VLM a [`Question`]. Subclasses call `ask_about` and implement `log_odds`. A video, a
    list of PIL frames, is shown by some of its frames, which a sentence before the question explains.
    """

    image_type = "pil"

    def unanswered(self, probability: float, likeliest: dict[str, float]) -> str:
        """Why an answer says nothing, from the probability of its words and of the likeliest first tokens."""
        said = ", ".join(f"{token!r} ({likely:.3g})" for token, likely in likeliest.items())
        return (
            f"{self.question.target!r} and {self.question.contrast!r} together have a probability of {probability:.2g} as the "
            f"first token of an answer, and the likeliest tokens are {said}. A score of the rest would be noise. Let the "
            "`question` ask for its words alone, name the model's own words in `target` and `contrast`, or turn off its "
            "thinking (of a server: extra_body={'chat_template_kwargs': {'enable_thinking': False}})"
        )

    def ask_about(self, question: str, target: str | None, contrast: str | None, num_frames: int) -> None:
        """
        Set the question, as in [`get_question`], the most frames that are shown of a video, and a name of the reward that
        tells presets apart.
        """
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"num_frames={num_frames!r} of {type(self).__name__}: show at least one frame of a video.")
        self.question, self.num_frames = get_question(question, target, contrast), num_frames
        self.__name__ = f"{type(self).__name__}_{question}" if question in QUESTIONS else type(self).__name__

    def asked(
        self, prompts: Sequence[str], *samples: Sequence[Any], before: Sequence[list[Image.Image]] | None = None
    ) -> tuple[list[list[Image.Image]], list[str]]:
        """
        The images that N questions show, and the questions.

        Args:
            prompts (`Sequence[str]`): N prompts.
            *samples (`Sequence`): N images or videos each, in the order in which they are shown.
            before (`Sequence[list]`, *optional*): N lists of images that are shown before all others.
        """
        shown, questions = [], []
        for number, (prompt, *each) in enumerate(zip(prompts, *samples)):
            images, notes = list(before[number]) if before is not None else [], []
            for sample in each:
                video = sample if isinstance(sample, (list, tuple)) else [sample]
                places = evenly_spread(len(video), self.num_frames)
                images += [video[place] for place in places]
                if len(places) > 1:
                    numbers = f"{len(images) - len(places) + 1} to {len(images)}"
                    notes.append(f"Images {numbers} are frames of one video in their order: they count as one image. ")
            shown.append(images)
            questions.append("".join(notes) + self.question.ask(prompt))
        return shown, questions

    def compare(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor | Awaitable[Tensor]:
        """
        Ask the question about two images, or videos, at once: N log odds that the first, which the target favours, is
        better than the second, as from `log_odds`. Judges prefer a place as well as an image: ask in both orders.
        """
        self.question.check("pair")
        return self.log_odds(*self.asked(prompts, first, second))

    compare.image_type = "pil"

    def log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor | Awaitable[Tensor]:
        """
        The log odds log p(target) - log p(contrast) of the answers to N questions, each about its image(s): float32 on
        the CPU, shape [N]; an awaitable from a server.
        """
        raise NotImplementedError


def _names() -> str:
    return ", ".join(repr(name) for name in QUESTIONS)
