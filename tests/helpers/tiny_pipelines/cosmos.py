"""Cosmos: worlds from text and video. 2.5 is a flow; 1 and 2 sample in noise levels of EDM, far above 1."""

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    Cosmos3OmniPipeline,
    CosmosControlNetModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
from diffusers.utils import is_torchvision_available

from . import t5_encoder, t5_tokenizer, wan
from .conditioned import image
from .family import Family
from .qwen_image import qwen_text_encoder, qwen_tokenizer
from .wan_video import video, videos


SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>"
    "{% endfor %}"
)
SMALL = {"height": 16, "width": 16, "max_sequence_length": 64}
VIDEO = {**SMALL, "num_frames": 5}
CONTINUED = {**VIDEO, "num_latent_conditional_frames": 1}
CONTROLLED = {**SMALL, "num_frames_per_chunk": 5}


def _calls(shared: dict, scale: float = 7.0, plain: float = 1.0) -> dict[str, dict]:
    return {
        "plain": {**shared, "guidance_scale": plain},
        "guided": {**shared, "guidance_scale": scale, "negative_prompt": "blurry"},
    }


if not is_torchvision_available():
    # The models resize the mask of the padding by torchvision.
    resize = lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size=tuple(size))
    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    transformer_cosmos.transforms = controlnet_cosmos.transforms = transforms


class EverythingIsSafe:
    """In the place of the guardrail, which is another package with models of its own."""

    def to(self, *args, **kwargs):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def controls(count: int) -> dict[str, list]:
    return {"controls": videos(count)}


def _transformer(**config) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        **{
            "in_channels": 4 + 1,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "mlp_ratio": 1.0,
            "text_embed_dim": 32,
            "adaln_lora_dim": 8,
            "max_size": (8, 8, 8),
            **config,
        }
    )
    if transformer.learnable_pos_embed is not None:
        for parameter in transformer.learnable_pos_embed.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return transformer


def _pipeline(pipeline_class: type, **parts):
    pipeline = pipeline_class(**{"vae": wan.build().vae, **parts}, safety_checker=EverythingIsSafe())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _of_2_5(pipeline_class: type, transformer: CosmosTransformer3DModel, **parts):
    tokenizer = qwen_tokenizer(SYSTEM)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(1)
    return _pipeline(
        pipeline_class,
        tokenizer=tokenizer,
        text_encoder=qwen_text_encoder(tokenizer),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            use_karras_sigmas=True,
            sigma_max=200.0,
            sigma_min=0.01,
        ),
        **parts,
    )


# The hidden states of all layers of the text encoder, 2 x 16 channels.
OF_2_5 = {
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 32,
    "encoder_hidden_states_channels": 32,
}


def predict_2_5() -> Cosmos2_5_PredictBasePipeline:
    """The first latent frames may be those of a video, at a timestep of 0.0001."""
    return _of_2_5(Cosmos2_5_PredictBasePipeline, _transformer(**OF_2_5))


def transfer_2_5() -> Cosmos2_5_TransferPipeline:
    """
    A ControlNet reads a video of edges or depths. Without the tokens of an image, which the pipeline leaves zero: what asks
    for them has no say, but for rounding.
    """
    torch.manual_seed(2)
    controlnet = CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=4 + 4 + 1,
        latent_channels=4 + 1 + 1,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=1.0,
        text_embed_dim=32,
        adaln_lora_dim=8,
        max_size=(8, 8, 8),
        **OF_2_5,
    )
    transformer = _transformer(**OF_2_5, controlnet_block_every_n=1)
    return _of_2_5(Cosmos2_5_TransferPipeline, transformer, controlnet=controlnet)


def _of_1_and_2(pipeline_class: type, scheduler, config: dict, **parts):
    tokenizer = t5_tokenizer()
    torch.manual_seed(1)
    return _pipeline(
        pipeline_class,
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        transformer=_transformer(**config),
        scheduler=scheduler,
        **parts,
    )


def text_to_image_2() -> Cosmos2TextToImagePipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return _of_1_and_2(Cosmos2TextToImagePipeline, scheduler, {"in_channels": 4})


def video_to_world_2() -> Cosmos2VideoToWorldPipeline:
    return _of_1_and_2(Cosmos2VideoToWorldPipeline, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {})


def _of_1(pipeline_class: type, config: dict):
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(4,),
        resolution=16,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return _of_1_and_2(pipeline_class, EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0), config, vae=vae)


def text_to_world() -> CosmosTextToWorldPipeline:
    return _of_1(CosmosTextToWorldPipeline, {"in_channels": 4})


def video_to_world() -> CosmosVideoToWorldPipeline:
    return _of_1(CosmosVideoToWorldPipeline, {})


def omni_3() -> Cosmos3OmniPipeline:
    """One transformer reads the tokens of the prompt and denoises the frames, and sound and actions where it has them."""
    tokenizer = qwen_tokenizer(SYSTEM)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}<|im_start|>"
    )
    torch.manual_seed(0)
    transformer = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=16,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=(4, 2, 2),
        vocab_size=len(tokenizer),
    )
    pipeline = Cosmos3OmniPipeline(
        transformer=transformer,
        text_tokenizer=tokenizer,
        vae=wan.build().vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=10.0),
        enable_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Cosmos 2.5 Predict (video)": Family(predict_2_5, _calls(VIDEO)),
    "Cosmos 2.5 Predict from a video": Family(predict_2_5, _calls(CONTINUED), video),
    "Cosmos 2.5 Transfer (video)": Family(transfer_2_5, _calls(CONTROLLED, 3.0), controls),
    "Cosmos 3 (video)": Family(
        omni_3,
        {
            "plain": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "use_system_prompt": False},
            "guided": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 6.0, "use_system_prompt": False},
        },
    ),
}
# Their samples are x_0 + sigma eps with sigma from 80 to 0.002, not (1 - t) x_0 + t eps with t in [0, 1].
REFUSED = {
    "Cosmos 2 text to image": Family(
        text_to_image_2,
        _calls(SMALL),
        reason="no flow: its samples are x_0 + sigma eps, with sigma from 80 down to 0",
        error="reach 80",
    ),
    "Cosmos 2 video to world": Family(
        video_to_world_2,
        _calls(VIDEO),
        image,
        reason="no flow: its samples are x_0 + sigma eps, with sigma from 80 down to 0",
        error="reach 80",
    ),
}
