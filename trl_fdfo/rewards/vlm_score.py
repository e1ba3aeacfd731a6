"""
A vision-language model (VLM) as a reward: it answers a question about the image, such as "Does this image match the
caption?", by one of two words, such as "Yes" or "No". The score (arXiv 2603.12893) is

    100 sigmoid(log odds),    log odds = logit(target) - logit(contrast) of the first token of the answer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .learned_reward import LearnedReward, load_pretrained
from .questions import MIN_PROBABILITY, VLMReward


class VLMScore(VLMReward, LearnedReward):
    """
    The answer of a VLM to a question about each image or video: 0 to 100, higher is better.

    The score is 100 sigmoid(logit(target) - logit(contrast)) of the first token of the answer (arXiv 2603.12893). The
    image(s) come before the question, in the model's own chat template.

    The logits are the model's own: its `generation_config`, such as a repetition penalty, is ignored. The logits of the
    two words are computed in float32 for every `dtype` of the model: bfloat16 rounds logits between 16 and 32 to
    multiples of 1/8, which is 3 points of the score, and the two images of a pair would often tie.

    The presets of `question` are `"alignment"`, `"quality"` and `"photorealism"`, answered by Yes or No;
    `"comparison"` and `"unified_reward"`, which are for [`~VLMScore.compare`]; and `"edit"`, for [`EditJudge`].

    A video is shown in one question, by some of its frames as images in their order, behind which a sentence says so.

    torchvision is not needed. If it is installed, it resizes the images instead of Pillow, with the same filter.

    Args:
        model (`str`): Hub id or folder of a model with a chat template, for
            [`~transformers.AutoModelForImageTextToText`].
        question (`str`): Name of a preset, or a question. `{prompt}` is replaced by the prompt of the image.
        target (`str`, *optional*): The word that speaks for the image, one token. Use `" Yes"` if the chat template
            ends in a colon and the model continues with a space. Default: the preset's word, or `"Yes"`.
        contrast (`str`, *optional*): The word that speaks against the image, one token. Default: the preset's word, or
            `"No"`.
        dtype (`str` or `torch.dtype`): Data type of the weights. `"auto"`: the published type.
        batch_size (`int`): Questions asked at a time.
        num_frames (`int`): Most frames that are shown of a video, evenly spread from its first to its last.
        device, offload: As in [`LearnedReward`].

    Raises:
        ValueError: [`get_question`] refuses the question, a word is not one token, or the model has no chat template. In a
            call: the two words together have little probability, because the answer begins with something else.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        question: str = "alignment",
        target: str | None = None,
        contrast: str | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        num_frames: int = 8,
    ):
        self.ask_about(question, target, contrast, num_frames)
        # Check the words before the weights are loaded: errors appear in seconds.
        self.processor = load_processor(model)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        words = {"target": self.question.target, "contrast": self.question.contrast}
        self.words = [_token(tokenizer, name, word, model) for name, word in words.items()]
        if self.words[0] == self.words[1]:
            raise ValueError(
                f"target={words['target']!r} and contrast={words['contrast']!r} are the same token of {model}: the "
                "score compares how likely two answers are. Name two."
            )
        vlm = load_pretrained(AutoModelForImageTextToText, model, dtype=dtype)
        super().__init__(vlm, device=device, batch_size=batch_size, offload=offload)
        self.model.generation_config = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        head = self.model.get_output_embeddings()
        if type(head) is torch.nn.Linear:  # a subclass may be quantized
            head.register_forward_hook(self._words_in_float32)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Score N images, or N videos as lists of frames, from 0 to 100: float32 on the CPU, shape [N]."""
        self.question.check("image")
        return 100 * self.log_odds(*self.asked(prompts, images)).sigmoid()

    def log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor:
        return self.in_batches(self._log_odds, images, questions)

    def _log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor:
        conversations = []
        for shown, question in zip(images, questions):
            content = [*({"type": "image", "image": image} for image in shown), {"type": "text", "text": question}]
            conversations.append([{"role": "user", "content": content}])
        begun = self.question.answer
        if begun:
            for conversation in conversations:
                conversation.append({"role": "assistant", "content": [{"type": "text", "text": begun}]})
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=not begun,
            continue_final_message=bool(begun),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        # `generate` corrects the positions for left padding in each architecture, and computes only the last logits.
        # It is not synchronized, because processes may have different numbers of questions.
        logits = self.model.generate(**inputs, synced_gpus=False).logits[0].float()
        words = logits[:, self.words]
        probability = (words.logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
        if probability.min() < MIN_PROBABILITY:
            worst = probability.argmin()
            likeliest = logits[worst].softmax(dim=-1).topk(5)
            tokens = [self.processor.tokenizer.decode([token]) for token in likeliest.indices.tolist()]
            raise ValueError(
                f"{self.__name__}: {self.unanswered(probability[worst], dict(zip(tokens, likeliest.values.tolist())))}."
            )
        return words[:, 0] - words[:, 1]

    def _words_in_float32(self, head: torch.nn.Linear, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[self.words].float()
        logits = logits.float()
        logits[..., self.words] = F.linear(inputs[0].float(), head.weight[self.words].float(), bias)
        return logits


def load_processor(name_or_path: str) -> ProcessorMixin:
    """Load the processor of a model; without torchvision, leave out its part for videos."""
    try:
        processor = load_pretrained(AutoProcessor, name_or_path)
    except ImportError as error:
        processor_class = PROCESSOR_MAPPING[type(load_pretrained(AutoConfig, name_or_path))]
        parts = processor_class.get_attributes()
        if parts != ["image_processor", "tokenizer", "video_processor"]:
            raise

        class ImageTextProcessor(processor_class):
            @classmethod
            def get_attributes(cls) -> list[str]:
                return parts[:-1]

        try:
            processor = load_pretrained(ImageTextProcessor, name_or_path)
        except TypeError:  # the processor cannot do without its part for videos
            raise error from None
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"model={name_or_path!r} has no chat template, in which VLMScore asks its question: use an "
            "instruction-tuned VLM."
        )
    return processor


def _token(tokenizer: PreTrainedTokenizerBase, argument: str, word: str, model: str) -> int:
    """The id of a word that is one token, otherwise a ValueError that names the word's `argument`."""
    tokens = tokenizer.encode(word, add_special_tokens=False)
    if _is_token(tokenizer, word):
        return tokens[0]
    bare = word.strip()
    forms = [space + form for form in (bare, bare.lower(), bare.capitalize(), bare.upper()) for space in ("", " ")]
    known = [form for form in dict.fromkeys(forms) if form != word and _is_token(tokenizer, form)]
    raise ValueError(
        f"{argument}={word!r} is not one token of {model} but {[tokenizer.decode([token]) for token in tokens]}: the score "
        "compares first tokens of an answer. "
        + (f"One token each are {known}." if known else "Take another word, and let the question ask for it.")
    )


def _is_token(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    tokens = tokenizer.encode(word, add_special_tokens=False)
    return len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id
