"""Wan beyond text to video: image to video, video to video, controls, animation, and models that were made from it."""

import torch
from diffusers import (
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from . import wan
from .conditioned import image, pictures
from .family import Family
from .ftfy_stand_in import allow_without_ftfy


allow_without_ftfy(
    ChronoEditPipeline,
    LucyEditPipeline,
    WanAnimatePipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)


SMALL = {"height": 16, "width": 16, "max_sequence_length": 16}
VIDEO = {**SMALL, "num_frames": 5}
# The transformer takes the tokens before the last 512 for those of the image.
WITH_IMAGE_ENCODER = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 512}
ANIMATE = {"height": 16, "width": 16, "segment_frame_length": 5, "max_sequence_length": 512}


def _calls(shared: dict, scale: float = 5.0) -> dict[str, dict]:
    return {
        "plain": {**shared, "guidance_scale": 1.0},
        "guided": {**shared, "guidance_scale": scale, "negative_prompt": "blurry"},
    }


def videos(count: int, frames: int = 5) -> list[list[Image.Image]]:
    """Videos of a bar that moves over a picture."""
    made = []
    for picture in pictures(count):
        made.append([picture.copy() for _ in range(frames)])
        for number, frame in enumerate(made[-1]):
            frame.paste("cyan", (3 * number, 4, 3 * number + 3, 12))
    return made


def first_and_last_image(count: int) -> dict[str, list]:
    return {"image": pictures(count), "last_image": [picture.rotate(90) for picture in pictures(count)]}


def video(count: int) -> dict[str, list]:
    return {"video": videos(count)}


def image_poses_and_faces(count: int) -> dict[str, list]:
    faces = [[frame.rotate(180) for frame in frames] for frames in videos(count)]
    return {"image": pictures(count), "pose_video": videos(count), "face_video": faces}


def scene(count: int) -> dict[str, list]:
    masks = [[Image.new("L", (16, 16), 255 if 1 < number < 4 else 0) for number in range(5)] for _ in range(count)]
    return {**image_poses_and_faces(count), "background_video": videos(count), "mask_video": masks}


def _wan(pipeline_class: type, channels: int = 4, config=(), transformer_class=WanTransformer3DModel, **parts):
    """The parts of Wan with another transformer, which `channels` go into; `config` has more of its sizes."""
    own = {name: part for name, part in wan.build().components.items() if part is not None}
    torch.manual_seed(0)
    sizes = {name: size for name, size in own["transformer"].config.items() if not name.startswith("_")}
    # Heads of 16: with heads of 12 the CPU does not compute equal samples of a batch to equal bits.
    sizes |= {"attention_head_dim": 16, "in_channels": channels, "out_channels": 4, **dict(config)}
    own["transformer"] = transformer_class.from_config(sizes)
    pipeline = pipeline_class(**{**own, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_encoder() -> dict:
    """A CLIP encoder that makes 5 tokens of an image."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.5,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


# 4 channels of the mask, one per frame that the VAE makes one latent frame of, and 4 of the image.
IMAGE_TO_VIDEO = {"channels": 4 + 4 + 4, "config": {"image_dim": 16, "added_kv_proj_dim": 32}}


def image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1: the image is read by a CLIP encoder too."""
    return _wan(WanImageToVideoPipeline, **IMAGE_TO_VIDEO, **image_encoder())


def first_and_last_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1 FLF2V: the CLIP tokens of the two images have learned positions."""
    config = {**IMAGE_TO_VIDEO["config"], "pos_embed_seq_len": 2 * 5}
    pipeline = _wan(WanImageToVideoPipeline, channels=12, config=config, **image_encoder())
    torch.nn.init.normal_(pipeline.transformer.condition_embedder.image_embedder.pos_embed, std=0.5)
    return pipeline


def small_text_to_video() -> WanPipeline:
    """Wan 2.2 5B: each token has its timestep."""
    return _wan(WanPipeline, expand_timesteps=True)


def small_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.2 5B: the first latent frame is the image, at a timestep of 0."""
    return _wan(WanImageToVideoPipeline, expand_timesteps=True)


def video_to_video() -> WanVideoToVideoPipeline:
    return _wan(WanVideoToVideoPipeline)


def vace() -> WanVACEPipeline:
    """The controls: 4 + 4 channels of the video outside and inside of the mask, 4 x 4 of the mask."""
    config = {"vace_layers": [0], "vace_in_channels": 4 + 4 + 4 * 4}
    return _wan(WanVACEPipeline, transformer_class=WanVACETransformer3DModel, config=config)


def animate() -> WanAnimatePipeline:
    """The first latent frame is the image of the person; poses are added to the others, faces are attended to."""
    config = {
        **IMAGE_TO_VIDEO["config"],
        "latent_channels": 4,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 8,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
    }
    return _wan(
        WanAnimatePipeline, 12, transformer_class=WanAnimateTransformer3DModel, config=config, **image_encoder()
    )


class Float32VAE(AutoencoderKLWan):
    """A VAE that stays in float32, as Lucy Edit's users load it: the pipeline gives it videos in no other dtype."""

    def to(self, *args, **kwargs):
        return super().to(*args, **kwargs).float()


def chrono_edit() -> ChronoEditPipeline:
    config = {"image_dim": 16, "attention_head_dim": 24, "added_kv_proj_dim": 48}
    parts = {**image_encoder(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}
    return _wan(ChronoEditPipeline, 12, config, ChronoEditTransformer3DModel, **parts)


def lucy_edit() -> LucyEditPipeline:
    """Wan 2.2 5B with the latents of a video beside its own."""
    pipeline = _wan(LucyEditPipeline, channels=4 + 4, expand_timesteps=True)
    pipeline.vae.__class__ = Float32VAE
    return pipeline


FAMILIES = {
    "Wan 2.2 5B (video)": Family(small_text_to_video, _calls(VIDEO)),
    "Wan image to video": Family(image_to_video, _calls(WITH_IMAGE_ENCODER), image),
    "Wan first and last image to video": Family(
        first_and_last_to_video, _calls(WITH_IMAGE_ENCODER), first_and_last_image
    ),
    "Wan 2.2 5B image to video": Family(small_image_to_video, _calls(VIDEO), image),
    "Wan video to video": Family(
        video_to_video,
        {
            # 8 steps, of which the last 4 are taken.
            "strength 0.5": {**SMALL, "strength": 0.5, "num_inference_steps": 8, "guidance_scale": 1.0},
            "guided": {**SMALL, "strength": 1.0, "guidance_scale": 5.0, "negative_prompt": "blurry"},
        },
        video,
    ),
    "Wan Animate (video)": Family(animate, _calls(ANIMATE), image_poses_and_faces),
    "Wan Animate, replacing a person (video)": Family(
        animate, {"replace": {**ANIMATE, "mode": "replace", "guidance_scale": 1.0}}, scene
    ),
    "Lucy Edit (video)": Family(lucy_edit, _calls(VIDEO), video),
    "ChronoEdit (video)": Family(chrono_edit, _calls(WITH_IMAGE_ENCODER), image),
    "Wan VACE (video)": Family(vace, _calls(VIDEO), video),
}
