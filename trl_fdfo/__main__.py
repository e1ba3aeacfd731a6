"""`python -m trl_fdfo`, the command `trl-fdfo`."""

from .cli.main import main


if __name__ == "__main__":
    main()
