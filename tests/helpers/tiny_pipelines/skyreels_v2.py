"""SkyReels V2: after Wan; diffusion forcing gives each latent frame a scheduler of its own."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from . import wan
from .conditioned import image
from .family import Family
from .ftfy_stand_in import allow_without_ftfy
from .wan_video import IMAGE_TO_VIDEO, VIDEO, WITH_IMAGE_ENCODER, image_encoder, video


allow_without_ftfy(
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
)

# One part, after the last frame of the video.
CONTINUED = {**VIDEO, "base_num_frames": 5, "overlap_history": 1}


def _calls(shared: dict, scale: float) -> dict[str, dict]:
    return {
        "plain": {**shared, "guidance_scale": 1.0},
        "guided": {**shared, "guidance_scale": scale, "negative_prompt": "blurry"},
    }


def _skyreels(pipeline_class: type, channels: int = 4, config=(), scheduler=None, **parts):
    own = {name: part for name, part in wan.build().components.items() if part is not None}
    torch.manual_seed(0)
    own["transformer"] = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
        **dict(config),
    )
    own["scheduler"] = scheduler or FlowMatchEulerDiscreteScheduler(shift=8.0)
    pipeline = pipeline_class(**own, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build() -> SkyReelsV2Pipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels."""
    return _skyreels(SkyReelsV2Pipeline)


def image_to_video() -> SkyReelsV2ImageToVideoPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return _skyreels(SkyReelsV2ImageToVideoPipeline, **IMAGE_TO_VIDEO, **image_encoder(), scheduler=scheduler)


def _forcing(pipeline_class: type):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return _skyreels(pipeline_class, scheduler=scheduler)


def forcing() -> SkyReelsV2DiffusionForcingPipeline:
    return _forcing(SkyReelsV2DiffusionForcingPipeline)


def forcing_image_to_video() -> SkyReelsV2DiffusionForcingImageToVideoPipeline:
    return _forcing(SkyReelsV2DiffusionForcingImageToVideoPipeline)


def forcing_video_to_video() -> SkyReelsV2DiffusionForcingVideoToVideoPipeline:
    return _forcing(SkyReelsV2DiffusionForcingVideoToVideoPipeline)


FAMILIES = {
    "SkyReels V2 (video)": Family(build, _calls(VIDEO, 6.0)),
    "SkyReels V2 image to video": Family(image_to_video, _calls(WITH_IMAGE_ENCODER, 5.0), image),
    # Each latent frame has a copy of the scheduler, and with `ar_step` above 0 a noise level of its own.
    "SkyReels V2 diffusion forcing (video)": Family(forcing, _calls(VIDEO, 6.0)),
    "SkyReels V2 diffusion forcing, image to video": Family(forcing_image_to_video, _calls(VIDEO, 5.0), image),
    "SkyReels V2 diffusion forcing, video to video": Family(forcing_video_to_video, _calls(CONTINUED, 6.0), video),
}
