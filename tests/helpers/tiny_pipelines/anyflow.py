"""AnyFlow: a flow map from Wan, whose transformer predicts the mean velocity between two noise levels, or that of one."""

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from . import wan
from .family import Family


VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


def _calls(shared: dict) -> dict[str, dict]:
    return {
        "plain": {**shared, "guidance_scale": 1.0, "use_mean_velocity": False},
        "guided": {**shared, "guidance_scale": 5.0, "negative_prompt": "blurry", "use_mean_velocity": False},
    }


def _anyflow(pipeline_class: type, transformer_class: type, scheduler=None, **config):
    own = {name: part for name, part in wan.build().components.items() if part is not None}
    torch.manual_seed(0)
    own["transformer"] = transformer_class(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
        **config,
    )
    # That of the released model is a `FlowMapEulerDiscreteScheduler`, with nearly the same steps.
    own["scheduler"] = scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = pipeline_class(**own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build() -> AnyFlowPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels."""
    return _anyflow(AnyFlowPipeline, AnyFlowTransformer3DModel)


def with_its_scheduler() -> AnyFlowPipeline:
    return _anyflow(AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler(shift=5.0))


def causal() -> AnyFlowFARPipeline:
    """Chunk after chunk, each with a cache of the attention to those before it."""
    return _anyflow(AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, chunk_partition=(1, 1))


FAMILIES = {
    "AnyFlow (video)": Family(build, _calls(VIDEO)),
}
# AnyFlow's own scheduler belongs to the mean velocity between two noise levels, which is no flow: churn needs that of one
# level. AnyFlow FAR takes the steps of one chunk of frames after those of another, and keeps the keys and values of the chunks
# before, which calls of the transformer between the steps compute.
REFUSED = {
    "AnyFlow FAR (video)": Family(
        causal,
        _calls({**VIDEO, "use_kv_cache": True}),
        reason="chunks of frames are sampled one after the other, each with the keys and values of those before",
        error="more steps than",
    ),
    "AnyFlow by its mean velocity (video)": Family(
        with_its_scheduler,
        {"plain": {**VIDEO, "guidance_scale": 1.0}},
        reason="its own scheduler belongs to the mean velocity between two noise levels; with a `FlowMatchEulerDiscreteScheduler` and `use_mean_velocity=False` it is exact",
        error="not a flow-matching scheduler",
    ),
}
