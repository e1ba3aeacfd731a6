"""`python -m trl_fdfo.preference`, the command `trl-fdfo vote`."""

from .cli import main


if __name__ == "__main__":
    main()
