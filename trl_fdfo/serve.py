"""`python -m trl_fdfo.serve`, the command `trl-fdfo serve`."""

from .cli.serve import main


__all__ = ["main"]

if __name__ == "__main__":
    main()
