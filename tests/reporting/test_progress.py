"""Progress bars."""

import io

from tqdm.auto import tqdm

from trl_fdfo.reporting.progress import show_waiting


def test_a_bar_that_waits_is_shown_again_when_the_number_changes():
    """A run may wait for people all night, and its bar may go to a file."""
    file = io.StringIO()
    with tqdm(total=4, file=file, leave=False) as bar:
        for number in (0, *[3] * 1000, 2, 0):
            show_waiting(bar, {"human": number, "other": 0})
    assert file.getvalue().count("human waits for") == 2 and file.getvalue().count("\r") < 9
    assert "human waits for 3" in file.getvalue() and "human waits for 2" in file.getvalue()
    show_waiting(tqdm(disable=True), {"human": 3})
