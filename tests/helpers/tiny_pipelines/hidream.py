"""HiDream-I1: four text encoders (two CLIP, T5, Llama), mixture of experts, one sign flip."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import LETTERS, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, vae
from .family import Family


CALLS = {
    # The distilled models (Dev, Fast) are called like this.
    "plain": {"height": 16, "width": 16, "guidance_scale": 0.0, "max_sequence_length": 16},
    "guided": {
        "height": 16,
        "width": 16,
        "guidance_scale": 5.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    },
}


def llama_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<|begin_of_text|>", "<|eot_id|>", "<unk>", " ", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        unk_token="<unk>",
        model_max_length=16,
    )


def llama_encoder(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build(seed: int = 0) -> HiDreamImagePipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    torch.manual_seed(seed)
    tokenizers = [clip_tokenizer(), clip_tokenizer(), t5_tokenizer(), llama_tokenizer()]
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_encoder(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_encoder(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder(tokenizers[2]),
        tokenizer_3=tokenizers[2],
        text_encoder_4=llama_encoder(tokenizers[3]),
        tokenizer_4=tokenizers[3],
        # In training mode it returns patches instead of an image.
        transformer=transformer.eval(),
    )
    # The pipeline scales every size to this area, in latents.
    pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def usual_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


FAMILIES = {
    "HiDream": Family(build, CALLS),
}
