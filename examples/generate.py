"""
A page of images: a base model and adapters on it, side by side, from the same seeds.

    python examples/generate.py --model shapes --adapter outputs/shapes \
        --prompts "a red circle on a white background" "a cyan cross on a gray background"
    python examples/generate.py --model stabilityai/stable-diffusion-3.5-medium --adapter out --adapter user/other-adapter \
        --prompts prompts.txt --seeds 3 --guidance_scale 4.5 --output grid.png

An adapter is a folder or a Hub id, with the files of diffusers or of PEFT. Images are sampled as it was trained, from the
generation_config.json beside it, but for what is set here.
"""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tqdm.auto import tqdm
from trl import TrlParser

from trl_fdfo import shapes
from trl_fdfo.lora import CALL_OPTIONS
from trl_fdfo.pictures import Panel, Section, picture, sheet
from trl_fdfo.pipeline_flow import load_pipeline
from trl_fdfo.prompt_dataset import check_prompts, load_prompts
from trl_fdfo.rewards.load_reward import RepeatableFlag


DIFFUSERS_FILE, PEFT_FILES = "pytorch_lora_weights.safetensors", ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    prompts: list[str] = field(metadata={"help": "Prompts, or one txt, json, jsonl, csv or parquet file of them."})
    adapter: list[str] = field(
        default_factory=list, metadata={"help": "Folder or Hub id. Repeat for several.", "action": RepeatableFlag}
    )
    seeds: int = field(default=3, metadata={"help": "Images per prompt and model, from the seeds 0, 1, ..."})
    output: str = field(default="grid.png", metadata={"help": "Picture to write."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Steps of the sampler."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the pipeline; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    pipeline_kwargs: str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's call, as a JSON string."}
    )


def main(args: list[str] | None = None) -> None:
    (arguments,) = TrlParser(Arguments).parse_args_and_config(args)
    prompts = read_prompts(arguments.prompts)
    output = Path(arguments.output)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output='{output}' does not end in a format of pictures: take .png.")
    if arguments.seeds < 1:
        raise ValueError(f"seeds={arguments.seeds} must be at least 1.")
    adapters = {name: find_adapter(name) for name in arguments.adapter}
    options = call_options(arguments, adapters)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = shapes.load_pipeline() if arguments.model == "shapes" else load_pipeline(arguments.model, dtype=dtype)
    unknown = options.keys() - inspect.signature(type(pipeline).__call__).parameters.keys()
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(sorted(unknown))}: leave it out.")
    pipeline.to(device).set_progress_bar_config(disable=True)

    images = {"base": sample(pipeline, prompts, arguments.seeds, options, "base")}
    for name, folder in adapters.items():
        unload = load_adapter(pipeline, folder)
        images[name] = sample(pipeline, prompts, arguments.seeds, options, name)
        unload()

    sections = []
    for n, prompt in enumerate(prompts):
        rows = [
            [Panel(image, f"{name}, seed {seed}") for seed, image in enumerate(batch[n])]
            for name, batch in images.items()
        ]
        sections.append(Section(prompt, rows))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet(sections).save(output)
    print(f"{output}: {', '.join(images)}, with {options}")


def read_prompts(prompts: list[str]) -> list[str]:
    is_file = len(prompts) == 1 and Path(prompts[0]).suffix in (".txt", ".json", ".jsonl", ".csv", ".parquet")
    dataset = load_prompts(prompts[0]) if is_file else Dataset.from_dict({"prompt": prompts})
    check_prompts(dataset, "prompt", name=f"prompts={prompts}")
    return list(dataset["prompt"])


def find_adapter(name: str) -> Path:
    """The folder of an adapter's files, downloaded where `name` is no folder."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[DIFFUSERS_FILE, *PEFT_FILES, CALL_OPTIONS]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(f"adapter='{name}' is neither a folder nor an adapter on the Hub: {error}") from None
    if not (folder / DIFFUSERS_FILE).is_file() and not all((folder / file).is_file() for file in PEFT_FILES):
        raise ValueError(
            f"adapter='{name}' has neither {DIFFUSERS_FILE} (diffusers) nor {' and '.join(PEFT_FILES)} (PEFT)."
        )
    return folder


def call_options(arguments: Arguments, adapters: dict[str, Path]) -> dict[str, Any]:
    """Arguments of the pipeline's call: those that the adapters were trained with, and over them those set here."""
    names = ("num_inference_steps", "guidance_scale", "height", "width")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        given |= json.loads(arguments.pipeline_kwargs or "{}")
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"pipeline_kwargs={arguments.pipeline_kwargs!r} is not a JSON object: {error}.") from None
    options = {"num_inference_steps": 8, "max_sequence_length": 0} if arguments.model == "shapes" else {}
    files = {name: folder / CALL_OPTIONS for name, folder in adapters.items() if (folder / CALL_OPTIONS).is_file()}
    trained = {name: json.loads(file.read_text()) for name, file in files.items()}
    for name, own in trained.items():
        for other, others in trained.items():
            differ = {k for k in own.keys() | others.keys() if own.get(k) != others.get(k)} - given.keys()
            if differ:
                raise ValueError(
                    f"{name} and {other} were trained with other {', '.join(sorted(differ))}: say which to sample with."
                )
        options |= own
    return options | given


def load_adapter(pipeline: DiffusionPipeline, folder: Path):
    """Put an adapter on the pipeline; returns what takes it off."""
    if (folder / DIFFUSERS_FILE).is_file() and hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder)
        unload = pipeline.unload_lora_weights
    elif (folder / PEFT_FILES[0]).is_file():
        unload = PeftModel.from_pretrained(pipeline.transformer, folder).unload  # in place
    else:
        raise ValueError(f"{type(pipeline).__name__} cannot load {DIFFUSERS_FILE}: use an adapter in PEFT's format.")
    if not any(isinstance(module, BaseTunerLayer) for module in pipeline.transformer.modules()):
        raise ValueError(f"{folder} has nothing for the transformer of {type(pipeline).__name__}: is it for another?")
    return unload


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline, prompts: list[str], seeds: int, options: dict[str, Any], name: str
) -> list[list[Image.Image]]:
    """Pictures of each prompt, one for each seed."""
    images = []
    for prompt in tqdm(prompts, name):
        images.append([])
        for seed in range(seeds):
            # On the CPU: the noise does not depend on the device.
            generator = torch.Generator().manual_seed(seed)
            output = pipeline(prompt=prompt, generator=generator, output_type="pt", return_dict=False, **options)
            images[-1].append(picture(output[0][0]))
    return images


if __name__ == "__main__":
    main()
