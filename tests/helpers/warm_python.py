"""
A Python that has imported torch, transformers, diffusers and this package already, for tests that launch programs:

    with WarmPython() as python:
        subprocess.run([python.path, "-m", "torch.distributed.run", ...], env={**os.environ, **python.environment})

To import them takes a core eight seconds, and most of these programs compute for less. A server that has imported them forks
itself for each start. The program at `path` is a client of this server: it hands over its arguments, environment, folder
and standard streams, passes signals on, and ends as the forked process ends. `environment` makes torchrun and `accelerate
launch` start their processes by it too.

On CPUs alone, because CUDA does not survive a fork. What a library reads from the environment when it is imported is as
it was at the start of the server, so a program that depends on such a variable needs a Python of its own.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path


ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WarmPython:
    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="warm-python-")
        address = str(Path(self._folder.name, "socket"))
        self.path = str(Path(self._folder.name, "python"))
        self.environment = {"PYTHON_EXEC": self.path, **ON_CPUS}
        Path(self.path).write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-ESs", __file__, address])} "$@"\n')
        Path(self.path).chmod(0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)  # clients wait until the libraries are imported
            number = listener.fileno()
            # The server ends when this process does, which closes the pipe.
            self._server = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(number)],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                start_new_session=True,  # an interrupt by keys is for the tests
                env={**os.environ, **ON_CPUS},
            )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._folder.cleanup()


# The server ------------------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    import_libraries()
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in readable:
            return
        if listener in readable:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                watch(connection)
            connection.close()


def import_libraries() -> None:
    import gc

    import tiny_runs  # first: it sets the environment before torch is imported  # isort: skip
    import matplotlib.figure  # of the curves in a model card
    import tiny_pipelines
    import torch.distributed.launcher  # what torchrun and `accelerate launch` import

    import trl_fdfo.cli.arguments  # what a command imports

    assert tiny_runs and matplotlib and tiny_pipelines and torch and trl_fdfo
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  accelerate would import it in every run
    # The collection at the start of each run skips what is imported.
    gc.collect()
    gc.freeze()


def watch(connection: socket.socket) -> None:
    """Start the program that a client asks for, and tell the client how it ends; end it if the client is gone."""
    message, streams = receive(connection)
    begin, began = os.pipe()
    program = os.fork()
    if program == 0:
        connection.close()
        os.close(began)
        if not os.read(begin, 1):
            os._exit(1)
        run(streams, **message)
    connection.sendall(f"{program}\n".encode())
    # Not before the client passes signals on, which would be ended by one itself.
    with contextlib.suppress(ConnectionResetError):
        os.write(began, connection.recv(1))
    os.close(began)

    def end_without_client():
        # Returns when the client has ended, or fails if it did so with unread answers.
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)

    threading.Thread(target=end_without_client, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    return json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)), streams


def run(streams: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Become the program: as `python ARGUMENTS` does, but for what is imported already."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdout.reconfigure(line_buffering=True)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = environment.get("PYTHON_EXEC", sys.executable)  # for `accelerate launch` of one process
        os.chdir(folder)
        import datasets
        import torch

        # A fork has no threads. The first to compute makes the new pool, and two at a time would fail.
        torch.set_num_threads(torch.get_num_threads())

        # Its cache is one of the variables that are read by the import.
        datasets.config.HF_DATASETS_CACHE = environment.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
        if arguments[0] == "-u":
            del arguments[0]
        if arguments[0] == "-m":
            sys.path[0], sys.argv = folder, arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if code < 0:
            end_by(-code)
        # The threads of gloo do not survive an orderly exit of a forked process.
        os._exit(code)


# The client ------------------------------------------------------------------------------------------------------------


def ask(address: str, arguments: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        message = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        message = json.dumps(message).encode()
        socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(message)
        with connection.makefile() as answers:
            program = int(answers.readline())
            for number in PASSED_ON:
                signal.signal(number, lambda number, frame: os.kill(program, number))
            connection.sendall(b"!")
            code = int(answers.readline())
    if code < 0:
        end_by(-code)
    sys.exit(code)


def end_by(number: int) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[1], sys.argv[2:])
