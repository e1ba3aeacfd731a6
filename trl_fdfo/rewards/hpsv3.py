"""HPSv3 (arXiv 2508.03789): human preference, by a Qwen2-VL that reads the prompt and ends in a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from .learned_reward import LearnedReward, load_pretrained
from .vlm_score import load_processor
from .weights import load_weights, torch_dtype


# The question that the model was trained with, to the blank: from github.com/MizzenAI/HPSv3, whose code is MIT-licensed,
# copyright 2024 HPSv3 Team.
QUESTION = Path(__file__).with_name("hpsv3_question.txt").read_text(encoding="utf-8")
TOKEN = "<|Reward|>"  # the model's output at this token is scored
PIXELS = 256 * 28 * 28  # of every image, about

# Names in the checkpoint, which come from transformers 4.45, and their names now.
NAMES = {"visual.": "vlm.visual.", "model.": "vlm.language_model.", "rm_head.": "head."}
UNUSED = "lm_head."


class HPSv3(LearnedReward):
    """
    Human Preference Score v3 (arXiv 2508.03789): about -5 to 15, higher is better.

    Qwen2-VL-7B sees the image at about 448 x 448 pixels and reads a question about it. Linear layers map its output at the
    last token of the question to the mean of a normal distribution, which is the score, and to its spread, which is left
    out.

    Args:
        model (`str`): The published checkpoint: a file, or a Hub id or folder with a file `HPSv3.safetensors`.
        processor (`str`): Hub id or folder of the config, the tokenizer and the image processor of Qwen2-VL-7B.
        dtype (`str` or `torch.dtype`): Type of the model. Its last layers are computed in float32.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: The checkpoint or the processor does not exist.
        ValueError: The weights in the checkpoint are not exactly those of HPSv3, or the tokenizer is not Qwen2-VL's.
    """

    head_widths: ClassVar[tuple[int, int]] = (1024, 16)

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        processor: str = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        dtype: str | torch.dtype = "bfloat16",
        device: str | torch.device | None = None,
        batch_size: int = 8,
        offload: bool = False,
        frames: str = "mean",
    ):
        dtype = torch_dtype(dtype)
        self.processor = load_processor(processor)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        tokenizer.add_tokens([TOKEN], special_tokens=True)
        self.token = tokenizer.convert_tokens_to_ids(TOKEN)
        config = load_pretrained(Qwen2VLConfig, processor)
        config.text_config.vocab_size = len(tokenizer)
        vlm = self._load(model, config, dtype)
        super().__init__(vlm, device=device, batch_size=batch_size, offload=offload, frames=frames)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        vlm, head = self.model["vlm"], self.model["head"]
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": QUESTION.replace("{prompt}", prompt)},
                    ],
                }
            ]
            for image, prompt in zip(images, prompts)
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "size": {"shortest_edge": PIXELS, "longest_edge": PIXELS}},
        ).to(self.device, vlm.dtype)
        tokens = inputs["input_ids"]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = vlm(
            input_ids=tokens,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            # The model was trained with the positions of plain text, for the image too: not with Qwen2-VL's own.
            position_ids=places.expand(3, len(tokens), -1),
            use_cache=False,
        ).last_hidden_state
        # The last one: a prompt may have the token's text too.
        last = (places * (tokens == self.token)).argmax(dim=1)
        return head(hidden[torch.arange(len(tokens)), last].float())[:, 0]

    def _load(self, model: str, config: Qwen2VLConfig, dtype: torch.dtype) -> nn.ModuleDict:
        """Load the VLM in `dtype`, and the layers behind it in float32."""
        width = config.text_config.hidden_size
        first, second = self.head_widths
        # The initial weights are replaced: they take neither memory nor random numbers of the run.
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            layers = nn.Linear(width, first), nn.ReLU(), nn.Dropout(), nn.Linear(first, second), nn.ReLU()
            reward = nn.ModuleDict({"vlm": Qwen2VLModel(config), "head": nn.Sequential(*layers, nn.Linear(second, 2))})
        renamed = {}
        for name, tensor in load_weights(model, "HPSv3.safetensors").items():
            if not name.startswith(UNUSED):
                start = next((start for start in NAMES if name.startswith(start)), "")
                renamed[NAMES.get(start, "") + name.removeprefix(start)] = tensor
        try:
            reward.load_state_dict(renamed, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"'{model}' does not have the weights of HPSv3 on the Qwen2-VL of processor='{config.name_or_path}'. {error}"
            ) from error
        reward["vlm"].to(dtype)
        reward["head"].float()
        return reward
