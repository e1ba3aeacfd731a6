"""Requests to servers that score: several URLs, bounded concurrency, timeouts, and failures that pass tried again."""

import asyncio
import itertools
import json
import random
import re
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import get_async_session


T = TypeVar("T")


class ServerError(RuntimeError):
    """
    A server refused a request, or did not answer it in any attempt.

    Attributes:
        status (`int`, *optional*): HTTP status of a refusal; None if there was no answer.
    """

    status: int | None = None


class TemporaryFailure(Exception):
    """
    A request failed for a reason that can pass, so it is tried again.

    Args:
        message (`str`): What the server did, which follows "the last with".
        retry_after (`float`): Seconds that the server asks to wait.
        advice (`str`, *optional*): What helps if the failure lasts. Default: the client's own.
    """

    def __init__(self, message: str, retry_after: float = 0.0, advice: str | None = None):
        super().__init__(message)
        self.retry_after, self.advice = retry_after, advice


@dataclass(frozen=True)
class Answer:
    """What a server answered with success. As text it is the status and the first 300 characters, without the key."""

    text: str  # of the body, as it was sent
    shown: str

    def json(self) -> Any:
        """The body as JSON; a ValueError if it is something else."""
        return json.loads(self.text)

    def __str__(self) -> str:
        return self.shown


class RetryingClient:
    """
    Asks one of several servers, and again, at the next URL and after a wait that doubles each time, if a failure can be
    temporary: no connection, no answer in time, an error of the server (408, 429, 5xx), or an answer that its reader
    calls a [`TemporaryFailure`].

    ```python
    client = RetryingClient(["http://one:8000", "http://two:8000"], owner="Judge", advice="Is it up?")
    async with client.session() as session:
        requests = [client.post(session, "/score", {"text": text}, read) for text in texts]
        scores = await all_or_none(requests)
    ```

    Args:
        url (`str` or `list[str]`): Base URL(s), which take turns.
        owner (`str`): Name of the class that asks, in errors about the arguments.
        advice (`str`): Says in an error what to look at if a server does not answer.
        refusal_advice (`str`): Says what to check if a server refuses a request; `{url}` stands for the server.
        error (`type`): Class of the errors, a subclass of [`ServerError`].
        default_path (`str`): Path of a base URL that has none, such as `"/v1"`.
        max_concurrency (`int`): Requests in flight at a time, at most 100, over all calls on an event loop.
        timeout (`float`): Seconds to wait for an answer to a request.
        max_retries (`int`): Number of retries of a request.
        backoff (`float`): Seconds before the first retry. The wait doubles with each retry, up to a minute.
        api_key (`str`): Sent as a bearer token if it is not empty. No error shows it.

    Raises:
        ValueError: An argument is out of range.
    """

    no_effect = ("max_concurrency", "timeout", "max_retries", "backoff")

    def __init__(
        self,
        url: str | list[str],
        *,
        owner: str,
        advice: str = "Is it up?",
        refusal_advice: str = "Check {url}.",
        error: type[ServerError] = ServerError,
        default_path: str = "",
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        api_key: str = "",
    ):
        example = f"http://localhost:8000{default_path}"
        self.urls = []
        for each in [url] if isinstance(url, str) else url:
            parts = urlsplit(each)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(f"url={each!r} of {owner} must be a base URL such as {example}.")
            self.urls.append(each.rstrip("/") + ("" if parts.path.strip("/") else default_path))
        if not self.urls:
            raise ValueError(f"url=[] of {owner} names no server: give one, such as {example}.")
        if not 1 <= max_concurrency <= 100:
            raise ValueError(
                f"max_concurrency={max_concurrency} of {owner} must be between 1 and 100, the connections of a client."
            )
        if not (timeout > 0 and max_retries >= 0 and backoff >= 0):
            raise ValueError(
                f"timeout={timeout}, max_retries={max_retries}, backoff={backoff} of {owner}: the timeout must be more "
                "than 0 seconds, the others at least 0."
            )
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self._advice, self._refusal_advice, self._error = advice, refusal_advice, error
        self._api_key = api_key.strip()
        self._turns = itertools.count()
        self._semaphores: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        # A separate generator, which is not seeded by the training run.
        self._random = random.Random()

    def session(self) -> Any:
        """An asynchronous context manager of connections, for the requests of one call."""
        # The Hub's client brings its HTTP library (httpx or httpx2, by its version). Its hooks are removed: they forbid
        # requests if HF_HUB_OFFLINE is set, as on nodes that reach their own server but not the Hub.
        session = get_async_session()
        session.event_hooks = {}
        return session

    async def post(
        self,
        session: Any,
        path: str,
        body: bytes | dict | Callable[[], bytes | dict],
        read: Callable[[Answer], T],
    ) -> T:
        """
        Send a body until it is answered, and read the answer.

        Args:
            session: From [`~RetryingClient.session`].
            path (`str`): Follows the base URL, such as `"/score"`.
            body (`bytes`, `dict` or `Callable`): A dict is sent as JSON, bytes as `application/octet-stream`. A callable
                makes either, in a thread, when the request's turn has come: bodies that wait then take no memory.
            read (`Callable`): Makes the result of an [`Answer`]. It raises a [`TemporaryFailure`] to ask again; any other
                error is passed on.

        Raises:
            ServerError: The server refused the request, or did not answer in `max_retries + 1` attempts.
        """
        return await self._until_answered(session, "POST", path, body, read)

    async def get(self, session: Any, path: str, read: Callable[[Answer], T]) -> T:
        """Ask until there is an answer, and read it; arguments and errors are as in `post`."""
        return await self._until_answered(session, "GET", path, b"", read)

    async def _until_answered(self, session: Any, method: str, path: str, body: Any, read: Callable[[Answer], T]) -> T:
        turn = next(self._turns)
        start = asyncio.get_running_loop().time()
        content, failure = None, TemporaryFailure("nothing")
        for attempt in range(self.max_retries + 1):
            if attempt > 0:
                wait = min(60, self.backoff * 2 ** (attempt - 1))
                await asyncio.sleep(max(wait * self._random.uniform(0.5, 1), failure.retry_after))
            url = self.urls[(turn + attempt) % len(self.urls)]
            async with self._semaphore():
                if content is None:
                    content = await asyncio.to_thread(_content, body)
                try:
                    return read(await self._answer(session, method, f"{url}{path}", *content))
                except TemporaryFailure as error:
                    failure = error
                except _Refused as error:
                    advice = self._refusal_advice.replace("{url}", url)
                    refusal = self._error(f"{url} refused a request with {error}. {advice}")
                    refusal.status = error.status
                    raise refusal from None
        seconds = asyncio.get_running_loop().time() - start
        raise self._error(
            f"{url} did not answer: {attempt + 1} attempts in {seconds:.1f} s"
            + (f" over {len(self.urls)} URLs" if len(self.urls) > 1 else "")
            + f", the last with {failure}. "
            + (
                failure.advice
                or f"{self._advice} Does it keep up with timeout={self.timeout:g} s and "
                f"max_concurrency={self.max_concurrency}?{_proxy_in_the_way(url)}"
            )
        )

    async def _answer(self, session: Any, method: str, address: str, content: bytes, content_type: str) -> Answer:
        headers = {"content-type": content_type}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        request = session.request(method, address, content=content, headers=headers, timeout=None)
        try:
            response = await asyncio.wait_for(request, self.timeout)
        except TimeoutError:
            raise TemporaryFailure(f"no answer within {self.timeout:g} s") from None
        except Exception as error:  # the classes depend on the HTTP library
            raise TemporaryFailure(self._redacted(f"{type(error).__name__}: {error}")) from None
        redirected = f" of {response.url}, to which it redirects" if response.history else ""
        shown = f"HTTP {response.status_code}{self._redacted(redirected)}: {self._redacted(response.text)[:300]}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise TemporaryFailure(shown, _seconds(response.headers.get("retry-after")))
        if not response.is_success:
            raise _Refused(shown, response.status_code)
        return Answer(response.text, shown)

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        for other in list(self._semaphores):
            if other.is_closed():
                self._semaphores.pop(other, None)
        return self._semaphores.setdefault(loop, asyncio.Semaphore(self.max_concurrency))

    def _redacted(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


class _Refused(Exception):
    """A server's answer to a request that it will never grant, with its status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def _content(body: bytes | dict | Callable[[], bytes | dict]) -> tuple[bytes, str]:
    """The bytes of a body and their content type."""
    body = body() if callable(body) else body
    if isinstance(body, dict):
        return json.dumps(body).encode(), "application/json"
    return body, "application/octet-stream"


async def all_or_none(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of requests in their order. After a failure or a cancellation, none of them is left running."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header, at most ten minutes; a date is left to the usual wait."""
    try:
        return min(600.0, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0


def _proxy_in_the_way(url: str) -> str:
    """A hint if the environment sends requests for this URL through a proxy."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc):
        return ""
    proxy = re.sub("//[^/]*@", "//", proxy)  # without a user's name and password
    return f" Requests go through the proxy {proxy} of the environment: for a server of yours, add {parts.hostname} to NO_PROXY."
