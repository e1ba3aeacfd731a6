"""LTX-2 with images and videos: as the first frame, at other frames, as references; HDR; and drafts with keyframes."""

import inspect

import torch
from diffusers import (
    DiffusionPipeline,
    LTX2ConditionPipeline,
    LTX2DFRPipeline,
    LTX2DFRTemporalRefinePipeline,
    LTX2HDRPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTXEulerAncestralRFScheduler,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image

from . import ltx2
from .conditioned import pictures
from .family import Family


FIRST, LAST = pictures(2)
VIDEO = [FIRST] * 5


def image(count: int) -> dict[str, list[Image.Image]]:
    return {"image": pictures(count)}


# Images are not compressed first, which needs PyAV.
CALLS_IMAGE = {name: {**call, "image_crf": 0} for name, call in ltx2.CALLS.items()}
CALLS_CONDITIONS = {
    **ltx2.CALLS,
    "first and last frame": {
        **ltx2.CALLS["guided"],
        "conditions": [LTX2VideoCondition(FIRST, 0, 1.0, crf=0), LTX2VideoCondition(LAST, -1, 0.5, crf=0)],
    },
}
CALLS_IN_CONTEXT = {
    **ltx2.CALLS,
    "reference": {**ltx2.CALLS["guided"], "reference_conditions": [LTX2ReferenceCondition(VIDEO, 1.0)]},
    "weak reference": {
        **ltx2.CALLS["plain"],
        "reference_conditions": [LTX2ReferenceCondition(VIDEO, 0.8)],
        "conditioning_attention_strength": 0.5,
    },
}
CALLS_HDR = {
    "plain": ltx2.SHARED,
    "guided": {**ltx2.SHARED, "guidance_scale": 3.0, "guidance_rescale": 0.7, "negative_prompt": "blurry"},
    "reference": {**ltx2.SHARED, "reference_conditions": [LTX2HDRReferenceCondition(VIDEO, 1.0)]},
}
# No number of steps: the noise levels themselves.
CALLS_KEYFRAMES = {
    "plain": {**ltx2.SHARED, "sigmas": [1.0, 0.9, 0.6, 0.2]},
    "without keyframes": {**ltx2.SHARED, "sigmas": [1.0, 0.9, 0.6, 0.2], "generate_slots": False},
}


def _build(pipeline_class: type, **transformer_options) -> DiffusionPipeline:
    torch.manual_seed(0)
    pipeline = pipeline_class(**ltx2.components(**transformer_options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_to_video() -> LTX2ImageToVideoPipeline:
    """The first of the 3 latent frames is the image's, and is not denoised."""
    return _build(LTX2ImageToVideoPipeline)


def condition() -> LTX2ConditionPipeline:
    return _build(LTX2ConditionPipeline)


def in_context() -> LTX2InContextPipeline:
    return _build(LTX2InContextPipeline)


def hdr() -> LTX2HDRPipeline:
    """Of the sound nothing is denoised or decoded."""
    return _build(LTX2HDRPipeline)


def keyframes() -> LTX2DFRPipeline:
    """Keyframes are denoised beside the video's own tokens."""
    pipeline = _build(LTX2DFRPipeline, use_keyframes_abs_pos_embedding=True)
    # New, it is zero.
    torch.nn.init.normal_(pipeline.transformer.keyframes_abs_pos_embedding, std=0.3)
    pipeline.scheduler.register_to_config(use_dynamic_shifting=False, shift_terminal=None)
    return pipeline


def temporal_refinement() -> LTX2DFRTemporalRefinePipeline:
    parts = dict(ltx2.build().components)
    names = inspect.signature(LTX2DFRTemporalRefinePipeline.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in names}
    return LTX2DFRTemporalRefinePipeline(
        **{**parts, "scheduler": LTXEulerAncestralRFScheduler(), "temporal_latent_upsampler": None}
    )


FAMILIES = {
    "LTX-2 image to video (video and audio)": Family(image_to_video, CALLS_IMAGE, image),
    "LTX-2 with frames (video and audio)": Family(condition, CALLS_CONDITIONS),
    "LTX-2 in context (video and audio)": Family(in_context, CALLS_IN_CONTEXT),
    "LTX-2 HDR (video)": Family(hdr, CALLS_HDR),
    "LTX-2 with keyframes (video and audio)": Family(keyframes, CALLS_KEYFRAMES),
}
REFUSED = {
    "LTX-2 temporal refinement (video and audio)": Family(
        temporal_refinement,
        {"plain": ltx2.SHARED},
        reason="refines a video of an earlier stage tile by tile, each in a loop of its own that adds new noise",
        error="LTXEulerAncestralRFScheduler is not a flow-matching scheduler",
    ),
}
