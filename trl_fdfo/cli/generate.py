"""
`trl-fdfo generate`: a page of images, a base model and adapters on it side by side, from the same seeds.

    trl-fdfo generate --model shapes --adapter outputs/shapes \
        --prompts "a red circle on a white background" "a cyan cross on a gray background"
    trl-fdfo generate --model stabilityai/stable-diffusion-3.5-medium --adapter out --adapter user/other-adapter \
        --prompts prompts.txt --seeds 3 --guidance_scale 4.5 --output grid.png

An adapter is a folder, a file or a place on the Hub (docs/sharing.md), in the format of diffusers or of PEFT. Images are
sampled as the adapter was trained, by the generation_config.json beside it, unless an option here says otherwise; so is a whole
pipeline that was trained or merged. For an adapter without that file set the steps and the guidance.

Videos and sounds are files of their own beside the page, grid_0_1_2.mp4 (or .webp) and .wav: of the first prompt, by the first
adapter (0 is the base model), from seed 2. A pipeline that is given images gets them from the columns of a file of prompts:

    trl-fdfo generate --model folder --adapter out --prompts edits.jsonl --pipeline_columns image
"""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from .arguments import InferenceArguments, parse
from .quick import check_prompts, prompt_set_table


@dataclass
class Arguments(InferenceArguments):
    seeds: int = field(default=3, metadata={"help": "Images per prompt and model, from the seeds 0, 1, ..."})
    output: str = field(default="grid.png", metadata={"help": "Picture to write."})


def main(args: list[str] | None = None) -> None:
    (arguments,) = parse(Arguments, args, prog="trl-fdfo generate", epilog=prompt_set_table())
    from PIL import Image

    output = Path(arguments.output)
    try:  # PIL has formats that it only opens
        Image.new("RGB", (8, 8)).save(BytesIO(), Image.registered_extensions().get(output.suffix.lower()))
    except (KeyError, OSError, ValueError):
        raise ValueError(
            f"output='{output}' does not end in a format of pictures that can be written: take .png."
        ) from None
    if arguments.seeds < 1:
        raise ValueError(f"seeds={arguments.seeds} must be at least 1.")
    if len(arguments.prompts) == 1:
        check_prompts(arguments.prompts[0], "prompt", "prompts")
    # Below, as these take seconds and a mistake in an option is told before.
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from ..evaluation.evaluator import read_rows
    from ..media import unbind
    from ..reporting.clips import save_clips
    from ..reporting.sheets import Panel, Section, picture, save_sheet, sheet
    from .models import BASE, call_options, each_model, find_adapters, made_by_first_row, open_flow, read_prompts

    columns = arguments.pipeline_columns
    dataset = read_prompts(arguments.prompts, columns)
    adapters = find_adapters(arguments.adapter)
    options = call_options(arguments, adapters)
    flow = open_flow(arguments.model, options, adapters, PartialState().device)

    outputs = made_by_first_row(flow, dataset, columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    sections = [Section(prompt, []) for prompt in dataset["prompt"]]
    for model, name in enumerate(each_model(flow.pipeline, adapters)):
        for number, section in enumerate(tqdm(sections, name)):
            row = read_rows(dataset, [number], ["prompt", *columns], "prompts")
            prompt = row.pop("prompt")
            images = [unbind(flow.generate(prompt, [seed], row))[0] for seed in range(arguments.seeds)]
            section.rows.append([Panel(picture(image), f"{name}, seed {seed}") for seed, image in enumerate(images)])
            for seed, image in enumerate(images):
                save_clips(image, output.with_name(f"{output.stem}_{number}_{model}_{seed}"), outputs)
        written = save_sheet(sheet(sections), output)  # anew after each model: what is there is there
    print(f"{written}: {', '.join([BASE, *adapters])}, with {options}")
