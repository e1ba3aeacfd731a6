"""Questions to a VLM about images, with the two words whose probabilities are its answer."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Question:
    """
    A question with two possible answers.

    Args:
        template (`str`): The question. `{prompt}` is replaced by the prompt of the image.
        target (`str`): The word that speaks for the image, or for the first of two.
        contrast (`str`): The word that speaks against the image, or for the second of two.
        images (`int`, *optional*): Number of images in the question: 1, or 2 that are compared. None: unknown.

    Raises:
        ValueError: The template is empty or has braces other than `{prompt}`, or the words are the same.
    """

    template: str
    target: str = "Yes"
    contrast: str = "No"
    images: int | None = None

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
    A preset, or a question of the user's own.

    Args:
        question (`str`): Name of a preset of `QUESTIONS`, or a template.
        target (`str`, *optional*): The word that speaks for the image. Default: the preset's word, or `"Yes"`.
        contrast (`str`, *optional*): The word that speaks against the image. Default: the preset's word, or `"No"`.

    Raises:
        ValueError: [`Question`] refuses the arguments, or `question` is a single word but names no preset.
    """
    if question not in QUESTIONS and re.fullmatch(r"\w+", question, re.ASCII):
        raise ValueError(
            f"question={question!r} is no preset and no question: name one of {_names()}, or ask something."
        )
    preset = QUESTIONS.get(question) or Question(question)
    return replace(
        preset,
        target=preset.target if target is None else target,
        contrast=preset.contrast if contrast is None else contrast,
    )


def check_images(question: Question, images: int) -> None:
    """
    Check that a question fits the number of images, 1 or 2, that it is asked about.

    Raises:
        ValueError: The question is about one image and is asked about two, or vice versa.
    """
    if question.images == 2 and images == 1:
        raise ValueError(
            f"The question {question.template!r} compares two images, and a score is of one. As a reward, compare the images "
            "of a prompt: `vlm_judge`, or PairwiseJudge(vlm.compare)."
        )
    if question.images == 1 and images == 2:
        raise ValueError(
            f"The question {question.template!r} is about one image, and a judge shows two: take question='comparison', or "
            "one of your own about the first and the second image."
        )


def _names() -> str:
    return ", ".join(repr(name) for name in QUESTIONS)
