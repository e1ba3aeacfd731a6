"""
Plans the recipes by card, and writes the figures into the recipes and into docs/memory_plan.md:

    python benchmarks/recipe_plans.py            # prints the plans
    python benchmarks/recipe_plans.py --write    # also writes the figures

No GPU, no weights and no download: the pipelines are those of published_configs.py.
"""

import argparse
import functools
import re
import tempfile
from pathlib import Path

from datasets import Dataset

from benchmarks.published_configs import write_configs
from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.cli import recipes
from trl_fdfo.cli.arguments import RunArguments, parse
from trl_fdfo.planning.plan import RunPlan
from trl_fdfo.planning.time import CARDS
from trl_fdfo.planning.without_weights import planned


ROOT = Path(__file__).parents[1]
RECIPES, PAGE = recipes.FOLDER, ROOT / "docs" / "memory_plan.md"
# Card and number of cards of each recipe.
CARDS_OF = {
    "sd35_24gb": ("rtx4090", 1),
    "sd35_80gb": ("h100", 1),
    "sd35_8x80gb": ("h100", 8),
    "flux_dev_24gb_nf4": ("rtx4090", 1),
    "flux_dev_80gb": ("h100", 1),
    "flux_schnell_80gb": ("h100", 1),
    "qwen_image_80gb": ("h100", 1),
}
PLAN = re.compile(r"^# Plan:.*$", re.MULTILINE)
TABLE = re.compile(r"(<!-- table: made by benchmarks/recipe_plans.py -->\n).*?(<!-- end of table -->)", re.DOTALL)
# Its length matters where a pipeline encodes each prompt to its own length.
PROMPTS = Dataset.from_dict({"caption": ["a photo of a red fox in the snow at dawn, 35mm"]})


@functools.cache
def plan_of(name: str, processes: int | None = None) -> RunPlan:
    """The plan of a recipe on its cards, or on another number of them."""
    gpu, number = CARDS_OF[name]
    options = ["--config", RECIPES / f"{name}.yaml", "--gpu", gpu, "--plan_processes", processes or number]
    arguments, config = parse((RunArguments, planned(FDFOConfig)), [str(option) for option in options])
    with tempfile.TemporaryDirectory() as folder:
        model = write_configs(arguments.model, Path(folder))
        return FDFOTrainer.plan(config, model, arguments.reward, PROMPTS)


def plan_line(plan: RunPlan) -> str:
    """The line of a recipe's comment."""
    return f"# Plan: {plan.in_short()}"


def table_row(name: str, plan: RunPlan, remark: str = "") -> str:
    """The row of docs/memory_plan.md: memory, seconds by part, and the hours of the run and of its alternatives."""
    seconds = plan.seconds()
    rewards = sum(value or 0 for part, value in seconds.items() if part.startswith("reward "))
    cells = [
        seconds["sampling"],
        seconds["decoding"],
        rewards,
        seconds["training"],
        sum(filter(None, seconds.values())),
    ]
    cards = f"{plan.args.world_size} x {plan.gpu}" if plan.args.world_size > 1 else plan.gpu
    memory = f"{plan.needed_memory():.1f} of {CARDS[plan.gpu].memory}"
    hours = plan.args.num_rollouts * cells[-1] / 3600
    link = f"[{name}.yaml](../trl_fdfo/recipes/{name}.yaml){remark}"
    return " | ".join(
        [
            "| " + link,
            cards,
            memory,
            *(f"{cell:,.0f}" for cell in cells),
            f"{plan.args.num_rollouts:,}",
            f"{hours:,.0f} |",
        ]
    )


def table() -> str:
    rows = [
        "| recipe | cards | GB | sampling | decoding | rewards | training | s per rollout | rollouts | hours |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(table_row(name, plan_of(name)) for name in CARDS_OF),
        table_row("sd35_8x80gb", plan_of("sd35_8x80gb", 1), remark=" on one card"),
    ]
    return "\n".join(rows) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help="write the figures into the recipes and docs/memory_plan.md"
    )
    write = parser.parse_args(args).write
    for name in CARDS_OF:
        plan = plan_of(name)
        print(f"{name}.yaml\n{plan}\n")
        if write:
            path = RECIPES / f"{name}.yaml"
            path.write_text(PLAN.sub(lambda _: plan_line(plan), path.read_text(), count=1))  # noqa: B023
    print(plan_of("sd35_8x80gb", 1))
    print(table())
    if write:
        PAGE.write_text(TABLE.sub(lambda match: match[1] + table() + match[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
