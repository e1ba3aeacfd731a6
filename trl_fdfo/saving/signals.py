"""SIGTERM (a preempted job) and SIGINT (Ctrl-C) end a run at a place from which it can resume."""

import os
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

    Args:
        saves (`bool`): The run saves a checkpoint before it ends, as the message says.

    Attributes:
        received (`signal.Signals`, *optional*): The signal that was received in this context.
    """

    def __init__(self, saves: bool):
        self._saves = saves
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
        self.received = None  # what comes after the run, such as a push, is not told to end

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._received_at < REPEATED:
                return
            raise self.exception("a second signal ended the run")
        self.received = signal.Signals(number)
        self._received_at = now
        what = "saves a checkpoint when it can go on from there, and ends" if self._saves else "ends soon, unsaved"
        message = f"{self.received.name} received: the run {what}. Again, to end it at once."
        if self._saves and "TORCHELASTIC_RUN_ID" in os.environ:
            seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            message += f" Its launcher kills it after {seconds} s; TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes that."
        logger.warning(message)

    def exception(self, message: str) -> BaseException:
        """KeyboardInterrupt for SIGINT; for SIGTERM SystemExit with the status 128 + signal, as shells have it."""
        if self.received is signal.SIGINT:
            return KeyboardInterrupt(message)
        logger.warning(message)
        return SystemExit(128 + self.received)
