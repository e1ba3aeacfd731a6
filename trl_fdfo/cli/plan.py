"""`trl-fdfo plan`: what a run of `trl-fdfo train` with the same options would do and take."""

import sys

from . import train


def main(args: list[str] | None = None) -> None:
    train.main(["--plan", *(sys.argv[1:] if args is None else args)])
