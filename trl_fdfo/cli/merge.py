"""
Adapters merged into their base model: as a pipeline of diffusers, as a checkpoint in the layout of the model's authors, or
as one LoRA file, for ComfyUI and WebUIs (docs/sharing.md).

    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --output merged
    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --format checkpoint \
        --original sd3.5_medium.safetensors --output merged.safetensors
    trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium --adapter out --format lora \
        --output lora.safetensors
"""

from dataclasses import dataclass, field
from pathlib import Path

from .arguments import RepeatableFlag, parse


FORMATS = ("pipeline", "checkpoint", "lora")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    adapter: list[str] = field(
        metadata={
            "help": "Folder or .safetensors file of an adapter, or its place on the Hub. Repeat for several, which are merged "
            "one after the other.",
            "action": RepeatableFlag,
        },
    )
    output: str = field(metadata={"help": "Folder of the pipeline, or .safetensors file, to write."})
    format: str = field(
        default="pipeline",
        metadata={
            "help": "`pipeline`: all of it, for `DiffusionPipeline.from_pretrained`. `checkpoint`: the file `original` with "
            "the adapters in it. `lora`: the adapters as one LoRA of scale 1, with the names of `original`, or with "
            "diffusers' names if that is not given.",
            "choices": FORMATS,
        },
    )
    original: str | None = field(
        default=None,
        metadata={"help": "The model's .safetensors file in the layout of its authors, as ComfyUI loads it."},
    )
    component: str | None = field(
        default=None,
        metadata={"help": "The transformer that a file is of, if the pipeline has several. Default: `transformer`."},
    )
    scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "How much of the adapters is merged: one number, or one for each.", "action": RepeatableFlag},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights: that of the model's files by default, float32 for a LoRA.",
            "choices": DTYPES,
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an output that exists."})

    def __post_init__(self):
        for name in ("adapter", "scale"):
            value = getattr(self, name)
            setattr(self, name, value if isinstance(value, list) else [value])  # a YAML file may have it so
        if not self.adapter:
            raise ValueError("adapter=[] leaves nothing to merge: name at least one.")
        if len(self.scale) not in (1, len(self.adapter)):
            raise ValueError(
                f"scale={self.scale} must be one number, or one for each of the {len(self.adapter)} adapters."
            )
        if self.format == "checkpoint" and self.original is None:
            raise ValueError(
                "format='checkpoint' changes a copy of the model's own file: name it in `original`, such as the one that "
                "ComfyUI loads."
            )
        if self.format == "pipeline" and self.original is not None:
            raise ValueError(
                f"original='{self.original}' is not read for format='pipeline'. Set format='checkpoint' for that file with "
                "the adapters in it, or 'lora' for a LoRA with its names."
            )
        if self.format == "checkpoint" and self.dtype is not None:
            raise ValueError(
                f"dtype={self.dtype} was given, and a checkpoint keeps the dtype of its original: leave it out."
            )
        self._check_output()

    def _check_output(self) -> None:
        output = Path(self.output)
        is_file = self.format != "pipeline"
        if is_file and output.suffix != ".safetensors":
            raise ValueError(f"output='{output}' is a file for format='{self.format}': end its name in .safetensors.")
        if not output.exists():
            return
        for name in ("original", "model"):
            source = getattr(self, name)
            if source is not None and Path(source).exists() and output.samefile(source):
                raise ValueError(f"output='{output}' is the {name} itself: take another name.")
        if not self.overwrite:
            raise ValueError(f"output='{output}' exists: take another name, or set `overwrite`.")
        if output.is_file() != is_file or not (is_file or (output / "model_index.json").is_file()):
            kind = "file" if is_file else "folder of a pipeline"
            raise ValueError(f"output='{output}' is no {kind}: it is not overwritten.")


def main(args: list[str] | None = None) -> None:
    (arguments,) = parse(Arguments, args, prog="trl-fdfo merge", epilog=None)
    from .merging import merge  # which takes seconds

    merge(arguments)
