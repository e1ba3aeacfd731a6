"""Questions to a VLM about images, with the two words whose probabilities are its answer."""

import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor


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
    images: int | None = None  # number of images in the question: 1, or 2 that are compared; None: unknown

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

    def check_images(self, images: int) -> None:
        """Raise a ValueError if the question is about one image and is asked about two, or vice versa."""
        if self.images == 2 and images == 1:
            raise ValueError(
                f"The question {self.template!r} compares two images, and a score is of one. As a reward, compare the "
                "images of a prompt: `vlm_judge`, or PairwiseJudge(vlm.compare)."
            )
        if self.images == 1 and images == 2:
            raise ValueError(
                f"The question {self.template!r} is about one image, and a judge shows two: take question='comparison', "
                "or one of your own about the first and the second image."
            )


# The first question is from arXiv 2603.12893. The comparison is answered by letters, which are one token in
# vocabularies of byte-level BPE and SentencePiece; Llama's vocabulary splits digits.
QUESTIONS = {
    "alignment": Question('Does this image match the caption "{prompt}"? Answer Yes or No.', images=1),
    "quality": Question(
        "Is this image of high quality: sharp, well composed and free of artifacts such as noise, distorted shapes or "
        "wrong anatomy? Answer Yes or No.",
        images=1,
    ),
    "photorealism": Question(
        "Does this image look like a real photograph, and not like a drawing, a painting or a computer-generated image? "
        "Answer Yes or No.",
        images=1,
    ),
    "comparison": Question(
        'The first image is A, the second image is B. Which of them matches the caption "{prompt}" better? Answer A or B.',
        target="A",
        contrast="B",
        images=2,
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
    """The base class of rewards that ask a VLM a [`Question`]. Subclasses call `ask_about` and implement `log_odds`."""

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

    def ask_about(self, question: str, target: str | None, contrast: str | None) -> None:
        """Set the question, as in [`get_question`], and a name of the reward that tells presets apart."""
        self.question = get_question(question, target, contrast)
        self.__name__ = f"{type(self).__name__}_{question}" if question in QUESTIONS else type(self).__name__

    def compare(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor | Awaitable[Tensor]:
        """
        Ask the question about two images at once: N log odds that the first, which the target favours, is better than the
        second, as from `log_odds`. Judges prefer a place as well as an image: ask in both orders.
        """
        self.question.check_images(2)
        return self.log_odds(list(zip(first, second)), [self.question.ask(prompt) for prompt in prompts])

    compare.image_type = "pil"

    def log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor | Awaitable[Tensor]:
        """
        The log odds log p(target) - log p(contrast) of the answers to N questions, each about its image(s): float32 on
        the CPU, shape [N]; an awaitable from a server.
        """
        raise NotImplementedError


def _names() -> str:
    return ", ".join(repr(name) for name in QUESTIONS)
