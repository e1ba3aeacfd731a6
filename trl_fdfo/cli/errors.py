"""Errors that the user can mend, and bugs."""

import dis


def is_of_the_user(error: BaseException) -> bool:
    """
    Whether an error tells the user what to mend: one that this package raises, or a file, model or address that cannot be
    read. All others are bugs, of the package or of what it calls.
    """
    return isinstance(error, OSError) or raised_by_package(error)


def raised_by_package(error: BaseException) -> bool:
    """Whether a `raise` of this package is where an error comes from, and not an operation that failed."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    module = traceback.tb_frame.f_globals.get("__name__", "")
    operation = traceback.tb_frame.f_code.co_code[traceback.tb_lasti]
    return module.split(".")[0] == __package__.split(".")[0] and dis.opname[operation] == "RAISE_VARARGS"
