"""`python -m trl_fdfo.preference`: the preference server, and its votes as a data set."""

from .cli import main


if __name__ == "__main__":
    main()
