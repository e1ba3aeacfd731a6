"""What SIGTERM (a preempted job) and SIGINT (Ctrl-C) do to a run: it ends at a place from which it can go on."""

import signal
import threading
import time
from types import FrameType

from transformers.utils import logging


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED = 1.0  # seconds within which a signal is the one before, passed on by a launcher


class Interruption:
    """
    Within its context the first SIGTERM or SIGINT is remembered, for the run to end where it can; one that comes more than
    a second later ends it at once. (Launchers pass on to their workers a signal that these got themselves.) Outside of the
    main thread, where Python has no handlers, signals do what they did.

    Attributes:
        signal (`signal.Signals`, *optional*): What has been received.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._received = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._received < REPEATED:
                return
            raise self.exception("a second signal ended the run")
        self.signal = signal.Signals(number)
        self._received = now
        logger.warning(
            f"{self.signal.name} received: the run ends when it can go on from there. Again, to end it at once."
        )

    def exception(self, message: str) -> BaseException:
        """What to raise: KeyboardInterrupt for SIGINT; else SystemExit with the status 128 + signal, as shells have it."""
        if self.signal is signal.SIGINT:
            return KeyboardInterrupt(message)
        logger.warning(message)
        return SystemExit(128 + self.signal)
