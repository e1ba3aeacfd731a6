"""SIGTERM (a preempted job) and SIGINT (Ctrl-C) end a run at a place from which it can resume."""

import signal
import threading
import time
from types import FrameType

from transformers.utils import logging


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED = 1.0  # seconds within which a launcher passes on the signal that its worker already got


class Signals:
    """
    Within this context the first SIGTERM or SIGINT is remembered, and the run ends where it can. A signal that comes more
    than a second later ends it at once. (Launchers pass on to their workers a signal that these got themselves.) Outside
    the main thread, where Python has no handlers, signals act as before.

    Attributes:
        received (`signal.Signals`, *optional*): The signal that was received.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._received_at < REPEATED:
                return
            raise self.exception("a second signal ended the run")
        self.received = signal.Signals(number)
        self._received_at = now
        logger.warning(
            f"{self.received.name} received: the run ends when it can go on from there. Again, to end it at once."
        )

    def exception(self, message: str) -> BaseException:
        """KeyboardInterrupt for SIGINT; for SIGTERM SystemExit with the status 128 + signal, as shells have it."""
        if self.received is signal.SIGINT:
            return KeyboardInterrupt(message)
        logger.warning(message)
        return SystemExit(128 + self.received)
