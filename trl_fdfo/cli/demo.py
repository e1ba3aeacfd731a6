"""`trl-fdfo demo`: repairs the tiny pipeline of the package, which paints wrong colours. It takes the options of `train`."""

import sys

from . import train


def main(args: list[str] | None = None) -> None:
    train.main(["--config", "shapes", *(sys.argv[1:] if args is None else args)])
