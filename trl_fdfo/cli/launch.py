"""A run in several processes: options of `accelerate launch` on the command line of `trl-fdfo train`, as `trl sft` has them."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def configs() -> list[str]:
    """The packaged configs of accelerate, by name."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@functools.cache
def options() -> dict[str, bool]:
    """Options of `accelerate launch` by name, and whether a value follows; from its source file, as importing takes seconds."""
    found = {"accelerate_config": True}
    path = Path(importlib.util.find_spec("accelerate").origin).parent / "commands" / "launch.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            has_value = getattr(given.get("action"), "value", None) not in ("store_true", "store_false", "help")
            flags = [flag.value for flag in node.args if isinstance(flag, ast.Constant)]
            found |= {flag[2:].replace("-", "_"): has_value for flag in flags if flag.startswith("--")}
    # What is launched is known.
    return {name: has_value for name, has_value in found.items() if name not in ("help", "module", "no_python")}


def split(
    args: list[str], launcher: Mapping[str, bool], parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """The arguments that the parser knows, or nothing knows, and those of the launcher."""
    own, launched = [], []
    to, has_value = own, False
    for arg in args:
        if arg.startswith("--"):
            name, is_joined, _ = arg[2:].partition("=")
            name = name.replace("-", "_")
            known = arg.partition("=")[0] in parser._option_string_actions
            to = launched if name in launcher and not known else own
            has_value = launcher.get(name, False) and not is_joined
        elif to is launched and not has_value:
            to = own
        else:
            has_value = to is own
        to.append(arg)
    return own, launched


def as_arguments(given: Mapping[str, Any]) -> list[str]:
    """The launcher's options of a recipe as it takes them."""
    switches = [f"--{name}" for name, value in given.items() if value is True]
    return switches + [f"--{name}={value}" for name, value in given.items() if not isinstance(value, bool)]


def is_launched() -> bool:
    """Whether a launcher has started this process: accelerate, or torchrun."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


def processes(launched: list[str]) -> int | None:
    """Processes that options of the launcher ask for; None if they are counted there."""
    own, _ = _parser().parse_known_args(launched)
    path = _config_file(own.accelerate_config)
    options = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    return own.num_processes or (options or {}).get("num_processes")


def launch(command: list[str], launched: list[str]) -> None:
    """
    Run a command of `trl-fdfo` in the processes that accelerate starts.

    Raises:
        ValueError: There is no such config of accelerate, or it refuses its options.
        SystemExit: A process ended with an error, or a signal ended the run.
    """
    own, launched = _parser().parse_known_args(launched)
    if own.num_processes is not None:
        launched = [*launched, "--num_processes", str(own.num_processes)]
    arguments = [*_config_arguments(own.accelerate_config), *launched, "--module", "trl_fdfo", *command]
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(arguments)
    # Accelerate takes several processes for several GPUs if it sees these; else it starts one process and says nothing.
    if (own.num_processes or 1) > 1 and not _is_distributed(options):
        if options.cpu:
            raise ValueError(
                f"--cpu with --num_processes {own.num_processes} starts one process, as accelerate has several on CPUs through MPI "
                "alone (--mpirun_hostfile). For processes without it pass --use_cpu true instead."
            )
        options.multi_gpu = True
    try:
        launch_command(options)
    except (ChildFailedError, subprocess.CalledProcessError):  # the process has said why
        sys.exit(1)
    except SignalException as error:  # which torchrun has passed on
        sys.exit(128 + error.sigval)
    except KeyboardInterrupt:  # the launcher of one process leaves it alone
        _pass_on_interrupts()
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        raise ValueError(f"accelerate launch: {error}") from error


def _is_distributed(options: argparse.Namespace) -> bool:
    """True if options of accelerate, or its config, choose a launcher of several processes."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.utils import DistributedType

    ways = ("multi_gpu", "mpirun_hostfile", "tpu", "tpu_use_cluster", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    if any(getattr(options, way) for way in ways):
        return True
    file = options.config_file or default_config_file
    return Path(file).is_file() and load_config_from_file(file).distributed_type != DistributedType.NO


def _pass_on_interrupts() -> None:
    """Pass Ctrl-C on to the process of the run, which may have it from the terminal too, and wait until it has saved itself."""
    import psutil  # which accelerate needs

    children = psutil.Process().children()
    while children:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            _, children = psutil.wait_procs(children)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-fdfo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config", "--accelerate-config", "--config_file", "--config-file")
    parser.add_argument("--num_processes", "--num-processes", type=int)
    return parser


def _config_file(config: str | None) -> Path | None:
    if config is None:
        return None
    path = Path(config) if Path(config).is_file() else CONFIGS / f"{config}.yaml"
    if not path.is_file():
        raise ValueError(f"accelerate_config='{config}' is neither a file nor one of {', '.join(configs())}.")
    return path


def _config_arguments(config: str | None) -> list[str]:
    path = _config_file(config)
    if path is None:
        return []
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    deepspeed = (options.get("deepspeed_config") or {}).get("deepspeed_config_file")
    beside = path.parent / Path(deepspeed).name if deepspeed else None
    # A packaged config names DeepSpeed's file as from the root of a clone.
    found = (
        ["--deepspeed_config_file", str(beside)]
        if beside and not Path(deepspeed).is_file() and beside.is_file()
        else []
    )
    return ["--config_file", str(path), *found]
