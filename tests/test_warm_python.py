"""tests/helpers/warm_python.py: a program that it starts runs and ends as one that Python starts."""

import os
import signal
import subprocess

import pytest


PROGRAM = """
import os, signal, sys, time

print(__name__, sys.argv[1:], os.getcwd(), os.environ["COLOUR"], sys.stdin.read(), "torch" in sys.modules)
print("an error", file=sys.stderr)
if sys.argv[1] == "raises":
    raise ValueError("a bad day")
if sys.argv[1] == "waits":
    if "handler" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *signal: sys.exit(7))
    print("ready")
    time.sleep(60)
sys.exit({"ends": None, "three": 3, "words": "not today"}[sys.argv[1]])
"""


@pytest.fixture
def start(warm_python, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(*arguments):
        environment = {**os.environ, "COLOUR": "red"}
        command = [warm_python.path, "program.py", *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    return start


@pytest.mark.parametrize(
    ("how", "code", "errors"),
    [("ends", 0, ""), ("three", 3, ""), ("words", 1, "not today\n"), ("raises", 1, "ValueError: a bad day\n")],
)
def test_a_program_runs_and_ends(start, tmp_path, how, code, errors):
    process = start(how, "b c")
    printed, told = process.communicate("typed")
    assert printed == f"__main__ ['{how}', 'b c'] {tmp_path} red typed True\n"
    assert told.startswith("an error\n") and told.endswith(errors) and process.returncode == code


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        ((), signal.SIGTERM, -signal.SIGTERM),
        (("handler",), signal.SIGTERM, 7),
        ((), signal.SIGINT, -signal.SIGINT),
        ((), signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_signal_reaches_the_program(start, arguments, number, code):
    process = start("waits", *arguments)
    process.stdin.close()
    process.stdin = None
    while process.stdout.readline() != "ready\n":
        pass
    process.send_signal(number)
    # The pipes end with the program, also where its client cannot pass the signal on.
    process.communicate(timeout=30)
    assert process.returncode == code
