"""
`trl-fdfo train`: post-trains a flow-matching pipeline of diffusers.

    trl-fdfo train --config shapes                                       # a laptop, minutes
    trl-fdfo train --config combined --num_processes 8                   # the paper's setting, on eight GPUs
    trl-fdfo train --config pickscore --reward pickscore --reward my_module:my_reward --reward_weights 1.0 2.0

`--algorithm` takes another algorithm, such as flow_grpo, the baseline. Each has options of its own.

Writes into `output_dir` the adapter, its model card README.md with before_after.png, reward_curve.png and evaluation.png,
results.json (before and after), metrics.jsonl (over time), pictures/, and checkpoints.
"""

import dataclasses
import sys
from typing import Any

from . import launch, quick
from .algorithms import CONFIGS
from .arguments import PACKAGED_SIZE, Parser, RunArguments, check_model, parse


EPILOG = """{rewards}

{prompt_sets}

--help-all also lists the options of transformers.TrainingArguments. Options of `accelerate launch`, and
--accelerate_config with a file or one of {configs}, launch the run through it."""


def main(args: list[str] | None = None) -> None:
    """Train, or plan a run with `--plan`: in this process, or in those that options of accelerate's launcher ask for."""
    args = list(sys.argv[1:] if args is None else args)
    show_inherited = any(arg in ("--help-all", "--help_all") for arg in args)
    args = ["--help" if arg in ("--help-all", "--help_all") else arg for arg in args]
    # The algorithm decides which options there are.
    first = Parser(RunArguments, partial=True, add_help=False, prog="trl-fdfo train")
    script, *_ = first.parse_args_and_config(args, return_remaining_strings=True)
    options: dict[str, Any] = {
        "prog": f"trl-fdfo {'plan' if script.plan else 'train'}",
        "elsewhere": launch.options(),
        "owners": _owners,
        "defaults": PACKAGED_SIZE if script.model == "shapes" else {},
        "epilog": EPILOG.format(
            rewards=quick.reward_table(), prompt_sets=quick.prompt_set_table(), configs=", ".join(launch.configs())
        ),
    }
    config_class = quick.config_class(CONFIGS[script.algorithm], script.plan)
    parser = Parser([RunArguments, *quick.sections(config_class, show_inherited)], **options)
    args, launched = launch.split(args, launch.options(), parser)
    script, *sections = parser.parse_args_and_config(args)
    launched = [] if launch.is_launched() else launch.as_arguments(parser.passed_over) + launched
    values = {name: value for each in sections for name, value in vars(each).items()}
    if script.plan and launched:  # a plan is for processes that are not launched
        values["plan_processes"] = launch.processes(launched) or values["plan_processes"]
        args, launched = [*args, "--plan_processes", str(values["plan_processes"])], []
    _check(config_class, script, values, launched)
    if launched:
        launch.launch(["train", *args], launched)
        return

    from . import run  # which takes seconds

    script, config = parse((RunArguments, run.config_class(script)), args, **options)
    if script.plan:
        print(run.plan(script, config))
    else:
        run.train(script, config)


def _owners() -> dict[str, str]:
    """The options of the algorithms and of the plan, and where each belongs."""
    classes = {f"--algorithm {name}": quick.config_class(config) for name, config in CONFIGS.items()}
    classes["`trl-fdfo plan`"] = quick.config_class(next(iter(CONFIGS.values())), is_plan=True)
    owners: dict[str, str] = {}
    for owner, config in classes.items():
        for field in dataclasses.fields(config):
            owners.setdefault(field.name, owner)
    return owners


def _check(config_class: type, script: RunArguments, values: dict[str, Any], launched: list[str]) -> None:
    """Tell a mistake now, and not after the seconds that the imports of a run take."""
    processes = launch.processes(launched) if launched else None
    if processes or not launched:  # otherwise the launcher counts the GPUs, and each process checks
        quick.check(config_class, values, processes)
    check_model(script.model)
    # A plan loads no reward, which may be on another machine.
    quick.check_rewards([*script.reward, *(script.eval_reward or ())], has_modules=not script.plan)
    if script.metrics is not None and not script.plan:
        quick.check_object(script.metrics, "metrics")
    weights = values["reward_weights"]
    if weights is not None and len(weights) != len(script.reward):
        raise ValueError(
            f"reward_weights has {len(weights)} values for {len(script.reward)} reward function(s): give one each."
        )
    quick.check_prompts(values["dataset_name"], values["dataset_prompt_column"])
