"""
Adapters merged into their base model: as a pipeline of diffusers, as a checkpoint in the layout of the model's authors, or
as one LoRA file, for ComfyUI and WebUIs (docs/sharing.md).

    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --output merged
    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --format checkpoint \
        --original sd3.5_medium.safetensors --output merged.safetensors
    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --format lora \
        --output lora.safetensors
"""

from .arguments import MergeArguments, parse


def main(args: list[str] | None = None) -> None:
    (arguments,) = parse(MergeArguments, args, prog="trl-fdfo merge", epilog=None)
    from .merging import merge  # which takes seconds

    merge(arguments)
