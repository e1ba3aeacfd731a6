"""The command `trl-fdfo`. A command is a module with `main(args)`, imported when it is called: most take seconds."""

import importlib
import os
import signal
import sys
import time

from .errors import details, is_of_the_user


# Of each command its module and a line of help.
COMMANDS = {
    "demo": (".demo", "repair a tiny pipeline that comes with the package: minutes on two CPU cores"),
    "train": (".train", "train a pipeline on rewards, by a recipe, options or both"),
    "plan": (".plan", "print what a run would do, and its memory and hours, without weights or a GPU"),
    "generate": (".generate", "make a page of images: a base model beside adapters"),
    "evaluate": (".evaluate", "make a table of rewards and diversity: a base model and adapters"),
    "merge": (".merge", "put adapters into a pipeline, a checkpoint for ComfyUI, or one LoRA"),
    "recipes": (".recipes", "list the packaged recipes, show one or copy one"),
    "vote": ("..preference.cli", "serve the page where people vote on images; votes as a data set"),
    "serve": (".serve", "serve rewards to training processes on other machines"),
}
DEBUG = "TRL_FDFO_DEBUG"  # set in the environment, for the processes of a run too


def main(args: list[str] | None = None) -> None:
    """
    Run a command. What its user can mend is printed without a traceback.

    Args:
        args (`list[str]`, *optional*): The command and its options. Default: those of the command line.
    """
    args = _without_debug(sys.argv[1:] if args is None else args)
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        from .. import __version__

        print(f"trl-fdfo {__version__}")
        return
    if name not in COMMANDS:
        _exit(f"trl-fdfo has no command '{name}': it has {', '.join(COMMANDS)}.", 2)
    try:
        importlib.import_module(COMMANDS[name][0], __package__).main(rest)
    except KeyboardInterrupt as interrupt:
        if DEBUG in os.environ:
            raise
        _exit(f"trl-fdfo {name}: {str(interrupt) or 'ended by Ctrl-C.'}", 128 + signal.SIGINT)
    except Exception as error:
        if DEBUG in os.environ or not is_of_the_user(error):
            raise
        # The names of the package's own kinds of a wrong value say nothing to the user.
        is_plain = isinstance(error, ValueError) and type(error).__module__.startswith(__package__.split(".")[0])
        kind = "error" if type(error) in (ValueError, FileNotFoundError) or is_plain else type(error).__name__
        message = str(error) if str(error).startswith("trl-fdfo ") else f"trl-fdfo {name}: {kind}: {error}"
        _exit(
            "\n".join([message, *details(error)]) + f"\n(trl-fdfo --debug {name} ... shows where)",
            2 if isinstance(error, (ValueError, OSError)) else 1,
        )


def _exit(message: str, code: int) -> None:
    # All processes of a run have most errors together: the first prints, and its end ends the others before they do.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
        message = f"process {os.environ['RANK']}: {message}"
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _without_debug(args: list[str]) -> list[str]:
    """Without a bare `--debug`; one with a value is the Trainer's."""
    kept = []
    for place, arg in enumerate(args):
        is_bare = place == 0 or place + 1 == len(args) or args[place + 1].startswith("--")
        if arg == "--debug" and is_bare:
            os.environ[DEBUG] = "1"
        else:
            kept.append(arg)
    return kept


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-fdfo COMMAND [options]",
            "",
            *lines,
            "",
            "trl-fdfo COMMAND --help lists the options of a command. --debug shows the traceback of an error.",
        ]
    )
