"""GLM-Image: a language model writes the tokens of a small image first, which the transformer then paints in detail."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.glm_image.processing_glm_image import GlmImageProcessor

from . import LETTERS, vae
from .family import Family
from .hunyuan_image import byt5_encoder
from .kandinsky5 import wake


SIZE = {"height": 64, "width": 64, "max_sequence_length": 16}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 1.5},
}

CODES = 32  # the first tokens of the vocabulary are those of images
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{{ part.text if part.type == 'text' else '<|image|>' }}"
    "{% endfor %}{% endfor %}"
)


class Processor(GlmImageProcessor):
    """With an image processor that does without torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|unk|>", "<|bos|>", "<|image|>", "<|grid_bos|>", "<|grid_eos|>"]
    tokens = [*(f"<|code{i}|>" for i in range(CODES)), "<|image_start|>", "<|image_end|>", *special, " ", *LETTERS]
    fast = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|unk|>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|\w+\|>|."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<|grid_bos|>",
            "grid_eos_token": "<|grid_eos|>",
        },
    )


def language_model(tokenizer: PreTrainedTokenizerFast) -> GlmImageForConditionalGeneration:
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "vision_vocab_size": CODES + 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.5,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": CODES + 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
        vq_config={"embed_dim": 16, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=CODES,
        image_end_token_id=CODES + 1,
    )
    model = GlmImageForConditionalGeneration(config)
    model.generation_config.eos_token_id = None  # it has not learned when to stop
    return model


def build(seed: int = 0) -> GlmImagePipeline:
    """64 x 64 images, latents of 8 x 8 with 4 channels, and a prior of 2 x 2 tokens."""
    torch.manual_seed(seed)
    text_tokenizer = tokenizer()
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=CODES + 2,
    )
    wake(transformer)
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=Processor(GlmImageImageProcessorPil(), text_tokenizer, chat_template=CHAT_TEMPLATE),
        text_encoder=byt5_encoder(),
        vision_language_encoder=language_model(text_tokenizer),
        vae=AutoencoderKL.from_config(
            vae(blocks=4).config, latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.5, 2.0, 1.0, 0.5]
        ),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def crops(count: int) -> dict[str, list]:
    """
    The language model draws other tokens for each prompt of a call. With a column a call has one prompt, and all its images
    get the same tokens.
    """
    return {"crops_coords_top_left": [[0, 0]] * count}


FAMILIES = {
    "GLM-Image": Family(build, CALLS, crops),
}
