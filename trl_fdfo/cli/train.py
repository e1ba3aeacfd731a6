"""
`trl-fdfo train`: post-trains a flow-matching pipeline of diffusers.

    trl-fdfo train --config shapes                                       # a laptop, minutes
    trl-fdfo train --config combined --num_processes 8                   # the paper's setting, on eight GPUs
    trl-fdfo train --config pickscore --reward pickscore --reward my_module:my_reward --reward_weights 1.0 2.0

With `--algorithm flow_grpo` it is Flow-GRPO that trains, the baseline, with options of its own.

Writes into `output_dir` the adapter, its model card README.md with before_after.png, reward_curve.png and evaluation.png,
metrics.json, and the Trainer's logs and checkpoints.
"""

import sys
from typing import Any

from . import launch
from .algorithms import ALGORITHMS
from .arguments import Parser, RunArguments, parse
from .sources import PACKAGE, module_of, reward_table, sections


EPILOG = """{rewards}

--help-all also lists the options of transformers.TrainingArguments. Options of `accelerate launch`, and
--accelerate_config with a file or one of {configs}, launch the run through it."""


def main(args: list[str] | None = None) -> None:
    """Train, or plan a run with `--plan`: in this process, or in those that options of accelerate's launcher ask for."""
    args = list(sys.argv[1:] if args is None else args)
    help_all = [arg for arg in args if arg in ("--help-all", "--help_all")]
    args = ["--help" if arg in help_all else arg for arg in args]
    # The algorithm decides which options there are.
    first = Parser(RunArguments, partial=True, add_help=False, prog="trl-fdfo train")
    script, *_ = first.parse_args_and_config(args, return_remaining_strings=True)
    launcher = launch.options()
    options: dict[str, Any] = {
        "prog": f"trl-fdfo {'plan' if script.plan else 'train'}",
        "elsewhere": launcher,
        "epilog": EPILOG.format(rewards=reward_table(), configs=", ".join(launch.configs())),
    }
    # A mistake is told now, and not after the seconds that the imports below take.
    quick = [RunArguments, *_quick_classes(script, bool(help_all))]
    parser = Parser(quick, **options)
    args, launched = launch.split(args, launcher, parser)
    parser.parse_args_and_config(args)
    if launch.is_launched():
        launched = []
    else:
        launched = launch.as_arguments(parser.passed_over) + launched
    if launched and not script.plan:
        launch.launch(["train", *args], launched)
        return

    from . import run

    script, config = parse((RunArguments, run.config_class(script)), args, **options)
    if script.plan:
        print(run.plan(script, config))
    else:
        run.train(script, config)


def _quick_classes(script: RunArguments, show_inherited: bool) -> list[type]:
    name = ALGORITHMS[script.algorithm].removesuffix("Trainer") + "Config"
    classes = sections(module_of(name), name, show_inherited)
    return [*sections(PACKAGE / "planning" / "without_weights.py", "Planned"), *classes] if script.plan else classes
