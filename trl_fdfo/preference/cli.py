"""The commands of `trl-fdfo vote`: serve, export, import."""

import argparse
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from .store import Refused, Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trl-fdfo vote", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve", help="the server (the default command)")
    for each in (parser, serve):
        each.add_argument(
            "--database", default="votes.sqlite", help="the file of pairs and votes (default: %(default)s)"
        )
        each.add_argument(
            "--host", default="127.0.0.1", help="other than loopback: needs a token (default: %(default)s)"
        )
        each.add_argument("--port", type=int, default=8300, help="0: a free one (default: %(default)s)")
        each.add_argument("--token", help="what the link and trainers carry (default: beyond loopback a random one)")
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
            print(f"{number} pairs in {args.database}")
        else:
            serve_forever(args.database, args.host, args.port, args.token)
    except (Refused, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def serve_forever(database: str | Path, host: str, port: int, token: str | None) -> None:
    """
    Print the link and serve until a signal.

    Raises:
        ValueError: The packages of the extra `human` are missing.
        OSError: The port is taken.
    """
    try:
        import uvicorn

        from .server import create_app
    except ImportError as error:
        raise ValueError(f"The server needs {error.name}: pip install 'trl_fdfo[human]'.") from None
    is_loopback = host in ("localhost", "127.0.0.1", "::1")
    if not is_loopback and token is None:
        token = secrets.token_urlsafe(24)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on ({error.strerror}): give another --port.") from None
    port = listening.getsockname()[1]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"Vote at http://{name}:{port}/" + (f"?token={token}" if token else ""), flush=True)
    store = Store(database)
    try:
        # Without a log of requests, which would have the token of the link.
        config = uvicorn.Config(
            create_app(store, token), log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        store.close()
