"""The commands of `trl-fdfo vote`: serve, export, import."""

import argparse
import contextlib
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .store import Refused, Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trl-fdfo vote", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve", help="the server (the default command)")
    options = {
        "database": ("votes.sqlite", "the file of pairs and votes (default: votes.sqlite)"),
        "host": ("127.0.0.1", "other than loopback: needs a token (default: 127.0.0.1)"),
        "port": (8300, "0: a free one (default: 8300)"),
        "token": (None, "what the link and trainers carry (default: beyond loopback a random one)"),
    }
    for name, (default, help) in options.items():
        kind = int if name == "port" else str
        parser.add_argument(f"--{name}", type=kind, default=default, help=help)
        # A default here would replace what stands before the command.
        serve.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=help)
    export = commands.add_parser("export", help="write the votes as a data set of prompt, chosen, rejected")
    load = commands.add_parser("import", help="add the votes of an exported data set, so that a run asks nobody")
    for each in (export, load):
        each.add_argument("database", help="the file of pairs and votes")
        each.add_argument("folder", help="the data set's folder")
        each.add_argument("--run", help="one run of the file, or the run to import to")
    args = parser.parse_args(arguments)
    try:
        if args.command == "export":
            from .exports import export_votes

            number = export_votes(args.database, args.folder, args.run)
            print(f"{number} pairs in {args.folder}")
        elif args.command == "import":
            from .exports import import_votes

            number = import_votes(args.folder, args.database, args.run)
            print(f"{number} votes added to {args.database}")
        else:
            serve_forever(args.database, args.host, args.port, args.token)
    except (Refused, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def serve_forever(database: str | Path, host: str, port: int, token: str | None) -> None:
    """
    Print the link and serve until a signal.

    Raises:
        ValueError: The packages of the extra `human` are missing, the file is of something else, or the token has a character
            that a header cannot carry.
        OSError: The port is taken.
    """
    try:
        import uvicorn

        from .server import create_app
    except ImportError as error:
        raise ValueError(f"The server needs {error.name}: pip install 'trl_fdfo[human]'.") from None
    is_loopback = host in ("localhost", "127.0.0.1", "::1")
    if not is_loopback and not token:  # an empty one, as of a variable that is not set, would let everybody in
        token = secrets.token_urlsafe(24)
    if token and not re.fullmatch("[!-~]+", token):
        raise ValueError(f"--token {token!r} has a space, or a character beyond ASCII: no header can carry it.")
    store = Store(database)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        store.close()
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{host}:{port} cannot be listened on ({reason}): give another --port, or --host.") from None
    listening.listen(100)  # who follows the link at once waits
    port = listening.getsockname()[1]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"Vote at http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else ""), flush=True)
    try:
        # Without a log of requests, which would have the token of the link.
        config = uvicorn.Config(
            create_app(store, token), log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises Ctrl-C again when it has ended
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        store.close()
