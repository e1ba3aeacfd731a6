"""
`trl-fdfo evaluate`: a table of rewards and diversity, a base model and adapters on it, on the same prompts from the same seeds.

    trl-fdfo evaluate --model shapes --adapter outputs/shapes \
        --reward trl_fdfo.shapes:reward --reward trl_fdfo.shapes:strict --diversity pixels
    accelerate launch -m trl_fdfo evaluate --model stabilityai/stable-diffusion-3.5-medium --adapter out \
        --adapter user/other-adapter --prompts drawbench --reward pickscore --reward hpsv2 --reward clip --reward vlm

Adapters are named and sampled as by `trl-fdfo generate`. Writes into `output` results.json, with the values of every prompt,
all settings and versions, and grid.png, with the images of the first prompts. Results that are there already are refused, unless
`overwrite` is set. Processes share the prompts, and give the same results as one.
"""

from . import quick
from .arguments import EvaluationArguments, parse


def main(args: list[str] | None = None) -> None:
    (arguments,) = parse(EvaluationArguments, args, prog="trl-fdfo evaluate")
    for name, least in (("images_per_prompt", 2), ("first_seed", 0), ("batch_size", 1), ("grid_prompts", 1)):
        if getattr(arguments, name) < least:
            why = ": diversity is a distance between images of a prompt" if name == "images_per_prompt" else ""
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least {least}{why}.")
    quick.check_rewards(arguments.reward)
    if arguments.prompts and len(arguments.prompts) == 1:
        quick.check_prompts(arguments.prompts[0], "prompt", "prompts")
    from .table import evaluate  # which takes seconds

    evaluate(arguments)
