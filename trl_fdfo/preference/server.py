"""
The preference server: HTTP for trainers and the page for raters, over one [`Store`].

Trainers:   POST /api/runs, /api/runs/{id}/pairs, /verdicts, /expire, /state
Raters:     GET /, /api/next, /api/past, /api/progress, /images/{id}.png;  POST /api/votes, /api/undo, /api/raters

Bodies and answers are JSON; an error is `{"error": "..."}` in words. On the loopback interface anybody on the machine may ask,
if the request names a loopback host. Elsewhere each request carries the token: trainers as `Authorization: Bearer`, the page
as a cookie that the link sets.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import io
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from .pairs import image_id
from .store import Pair, Refused, Store


PAGE = Path(__file__).with_name("page")
COOKIE = "trl_fdfo_token"
# Bytes of a request, bytes and pixels of an image, characters of a prompt and of a name, pairs of a request.
MAX_BODY, MAX_IMAGE, MAX_PIXELS, MAX_PROMPT, MAX_NAME, MAX_PAIRS = 128 * 2**20, 90 * 2**20, 64 * 2**20, 20_000, 80, 500
# Seconds that a trainer may wait for verdicts in one request.
MAX_WAIT = 30.0
_ID = re.compile(r"[0-9]{1,18}")  # of a row in SQLite
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'self'; form-action 'self'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def create_app(store: Store, token: str | None = None) -> Starlette:
    """
    The server as an ASGI application.

    Args:
        store ([`Store`]): Where everything is kept.
        token (`str`, *optional*): What requests must carry. None: the server is on the loopback interface.
    """
    server = _Server(store)
    trainer, run = "/api/runs", "/api/runs/{run:str}"
    routes = [
        Route("/", _file("index.html", "text/html")),
        Route("/page.js", _file("page.js", "text/javascript")),
        Route("/style.css", _file("style.css", "text/css")),
        Route("/images/{id:str}.png", server.image),
        Route("/api/next", server.next_pairs),
        Route("/api/past", server.past),
        Route("/api/progress", server.progress),
        Route("/api/votes", server.vote, methods=["POST"]),
        Route("/api/undo", server.undo, methods=["POST"]),
        Route("/api/raters", server.exclude, methods=["POST"]),
        Route(trainer, server.open_run, methods=["POST"]),
        Route(f"{run}/pairs", server.add, methods=["POST"]),
        Route(f"{run}/verdicts", server.verdicts, methods=["POST"]),
        Route(f"{run}/expire", server.expire, methods=["POST"]),
        Route(f"{run}/state", server.set_state, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            Refused: _refused,
            HTTPException: _refused,
            sqlite3.OperationalError: _not_kept,
            Exception: _failed,
        },
    )
    app.add_middleware(_Gate, token=token or None)
    return app


class _Server:
    def __init__(self, store: Store):
        self.store = store
        self._voted = asyncio.Condition()

    # Trainers ---------------------------------------------------------------------------------------------------------

    async def open_run(self, request: Request) -> Response:
        body = await _body(request)
        name, owner = _text(body, "name", MAX_NAME), _text(body, "owner", 200)
        votes = _whole(body, "votes_per_pair", 1, 100)
        return JSONResponse({"run": await run_in_threadpool(self.store.open_run, name, owner, votes)})

    async def add(self, request: Request) -> Response:
        run, body = _run(request), await _body(request)
        owner, rollout = _text(body, "owner", 200), _whole(body, "rollout", 0, 10**9)
        pairs = [self._pair(each) for each in _list(body, "pairs")]
        files = body.get("images", {})
        if not isinstance(files, dict):
            raise Refused(422, "'images' must map ids to PNG files in base64.")
        images = await run_in_threadpool(lambda: {id: _checked_png(id, text) for id, text in files.items()})
        new = await run_in_threadpool(self.store.add, run, owner, rollout, pairs, images)
        return JSONResponse({"added": new})

    @staticmethod
    def _pair(each: Any) -> Pair:
        if not (isinstance(each, list) and len(each) == 3 and all(isinstance(part, str) for part in each)):
            raise Refused(422, f"A pair must be [prompt, image id, image id], and one is {str(each)[:80]}.")
        if len(each[0]) > MAX_PROMPT:
            raise Refused(413, f"A prompt has {len(each[0]):,} characters, more than {MAX_PROMPT:,}.")
        if not all(_is_unicode(part) for part in each):
            raise Refused(422, f"A prompt, or the id of an image, is no valid Unicode: {str(each)[:80]!r}.")
        if each[1] == each[2]:
            raise Refused(422, "Both images of a pair are the same: there is nothing to choose.")
        return Pair(*each)

    async def verdicts(self, request: Request) -> Response:
        run, body = _run(request), await _body(request)
        owner, keys = _text(body, "owner", 200), _keys(body)
        wait = _number(body, "wait", 0, MAX_WAIT, default=0)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        # A vote between the question and the wait would be missed, but for the lock.
        async with self._voted:
            while True:
                found = await run_in_threadpool(self.store.verdicts, run, owner, keys)
                if found or not keys or loop.time() >= end:
                    break
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._voted.wait(), end - loop.time())
        idle = await run_in_threadpool(self.store.idle_seconds, run)
        return JSONResponse({"verdicts": found, "idle": idle})

    async def expire(self, request: Request) -> Response:
        run, body = _run(request), await _body(request)
        await run_in_threadpool(self.store.expire, run, _text(body, "owner", 200), _keys(body))
        return JSONResponse({})

    async def set_state(self, request: Request) -> Response:
        run, body = _run(request), await _body(request)
        state = body.get("state")
        try:  # what the page could not be sent is refused here
            size = len(json.dumps(state, allow_nan=False, ensure_ascii=False).encode())
        except ValueError as error:
            raise Refused(422, f"'state' is not valid JSON in UTF-8: {error}.") from None
        if not isinstance(state, dict) or size > 2**20:
            raise Refused(422, "'state' must be an object of at most 1 MiB.")
        await run_in_threadpool(self.store.set_state, run, _text(body, "owner", 200), state)
        return JSONResponse({})

    # Raters -----------------------------------------------------------------------------------------------------------

    async def next_pairs(self, request: Request) -> Response:
        query = request.query_params
        but_not = [int(number) for number in query.get("but_not", "").split(",") if _ID.fullmatch(number)][:100]
        count = min(10, int(query["count"])) if _ID.fullmatch(query.get("count", "")) else 1
        pairs = await run_in_threadpool(self.store.next_pairs, _rater(query), count, but_not, query.get("run") or None)
        return JSONResponse({"pairs": pairs})

    async def vote(self, request: Request) -> Response:
        body = await _body(request)
        stored = await run_in_threadpool(
            self.store.vote,
            _rater(body),
            _whole(body, "pair", 0, 2**62),
            _text(body, "choice", 20),
            _text(body, "left", 64),
            body.get("repeated") is True,
            body.get("change") is True,
        )
        await self._wake()
        return JSONResponse({"stored": stored})

    async def undo(self, request: Request) -> Response:
        body = await _body(request)
        run = _text(body, "run", MAX_NAME) if body.get("run") else None
        return JSONResponse({"pair": await run_in_threadpool(self.store.undo, _rater(body), run)})

    async def past(self, request: Request) -> Response:
        query = request.query_params
        pairs = await run_in_threadpool(self.store.past, _rater(query), 50, query.get("run") or None)
        return JSONResponse({"pairs": pairs})

    async def exclude(self, request: Request) -> Response:
        body = await _body(request)
        await run_in_threadpool(self.store.set_excluded, _rater(body), body.get("excluded") is True)
        await self._wake()
        return JSONResponse({})

    async def progress(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.store.progress, request.query_params.get("run") or None))

    async def image(self, request: Request) -> Response:
        png = await run_in_threadpool(self.store.image, request.path_params["id"])
        # An id is its content's, so what a browser has stays right.
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=31536000, immutable"})

    async def _wake(self) -> None:
        async with self._voted:
            self._voted.notify_all()


class _Gate:
    """
    Lets requests in that may ask: the host that they name, the token, and where a page that sends them is from. Refuses
    bodies that are too large before they are read.
    """

    def __init__(self, app: Callable, token: str | None = None):
        self.app, self.token = app, token

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        answer = self._refusal(request)
        if answer is not None:
            await answer(scope, receive, send)
            return
        size = 0

        async def limited() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise Refused(413, f"The request has more than {MAX_BODY // 2**20} MiB: send fewer pairs in one.")
            return message

        async def with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                new = [
                    (name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in known
                ]
                message = {**message, "headers": [*message["headers"], *new]}
            await send(message)

        await self.app(scope, limited, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that may not ask."""
        host = re.sub(r":\d+$", "", request.headers.get("host", ""))
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return _error(
                413, f"The request has {length} bytes, more than {MAX_BODY // 2**20} MiB: send fewer pairs in one."
            )
        if self.token is None:
            if host not in _LOOPBACK:
                return _error(
                    400,
                    f"This server is for its own machine, as localhost, and the request names the host {host[:80]!r}: open "
                    "http://localhost and its port (through a tunnel from another machine, ssh -L), or start it with --host "
                    "0.0.0.0, which asks for a token.",
                )
        else:
            given = request.query_params.get("token") if request.url.path == "/" else None
            if given is not None and hmac.compare_digest(given.encode(), self.token.encode()):
                answer = RedirectResponse("./", 303)  # the token leaves the address
                answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", max_age=30 * 86400)
                return answer
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            carried = bearer or request.cookies.get(COOKIE, "")
            if not hmac.compare_digest(carried.encode(), self.token.encode()):
                return _error(
                    401,
                    "The token is missing or wrong: open the link that the server printed, or give the reward its token, "
                    "token='...'.",
                )
        origin = request.headers.get("origin")
        if (
            request.method == "POST"
            and origin is not None
            and re.sub(r"^https?://", "", origin) != request.headers.get("host")
        ):
            return _error(403, f"A page of {origin[:80]} may not vote here.")
        return None


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (PAGE / name).read_text(encoding="utf-8")

    async def show(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return show


async def _body(request: Request) -> dict[str, Any]:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "The body must be JSON, content-type: application/json.")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Refused(422, f"The body must be a JSON object, and is a {type(body).__name__}.")
    return body


def _text(body: Any, name: str, limit: int) -> str:
    value = body.get(name)
    # Joiners, without which some names and emoji cannot be written, are not printable by themselves.
    if not (
        isinstance(value, str) and 0 < len(value.strip()) <= limit and re.sub("[\u200c\u200d]", "", value).isprintable()
    ):
        raise Refused(422, f"{name!r} must be 1 to {limit} printable characters, and is {str(value)[:80]!r}.")
    return value.strip()


def _rater(body: Any) -> str:
    return _text(body, "rater", MAX_NAME)


def _number(body: dict[str, Any], name: str, low: float, high: float, default: float | None = None) -> Any:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Refused(422, f"{name!r} must be a number from {low:g} to {high:g}, and is {str(value)[:80]!r}.")
    return value


def _whole(body: dict[str, Any], name: str, low: int, high: int) -> int:
    value = _number(body, name, low, high)
    if not isinstance(value, int):
        raise Refused(422, f"{name!r} must be a whole number, and is {value}.")
    return value


def _run(request: Request) -> int:
    number = request.path_params["run"]
    if not _ID.fullmatch(number):
        raise Refused(404, f"{number[:80]!r} is not the number of a run.")
    return int(number)


def _keys(body: dict[str, Any]) -> list[str]:
    keys = _list(body, "keys")
    for key in keys:
        if not (isinstance(key, str) and _is_unicode(key)):
            raise Refused(422, f"'keys' must be text, and one is {str(key)[:80]!r}.")
    return keys


def _is_unicode(text: str) -> bool:
    """Whether a text can be sent and kept in UTF-8: JSON may have halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list(body: dict[str, Any], name: str) -> list:
    value = body.get(name)
    if not isinstance(value, list) or len(value) > MAX_PAIRS:
        raise Refused(422, f"{name!r} must be a list of at most {MAX_PAIRS}.")
    return value


def _checked_png(id: str, text: Any) -> bytes:
    try:
        png = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Refused(422, "An image is not base64.") from None
    if len(png) > MAX_IMAGE:
        raise Refused(413, f"An image has {len(png):,} bytes, more than {MAX_IMAGE:,}.")
    if image_id(png) != id:
        raise Refused(422, f"The image {id[:12]!r} has another content: an id is the SHA-256 of its file.")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            pixels = image.width * image.height
            image.verify()  # of a file that was cut off a browser would show a part, or nothing
    except Exception:  # whatever a forged file makes of the decoder
        raise Refused(422, f"The image {id[:12]} is not a PNG file, or not a whole one.") from None
    if pixels > MAX_PIXELS:
        raise Refused(413, f"The image {id[:12]} has {pixels:,} pixels, more than {MAX_PIXELS:,}.")
    return png


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


async def _refused(request: Request, error: Refused | HTTPException) -> Response:
    if isinstance(error, HTTPException):
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    return _error(error.status, str(error))


async def _not_kept(request: Request, error: sqlite3.OperationalError) -> Response:
    return _error(
        503,
        f"The file of the votes cannot be read or written ({error}): look after its disk and its permissions. Nothing of this "
        "request is kept; send it again.",
    )


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, f"The server failed: {type(error).__name__}. Its log says more.")
