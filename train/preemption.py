"""Stopping in time: SIGTERM and Ctrl-C ask the loop to save and leave."""

import logging
import signal
import threading
import types
from typing import Any

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + the signal, as shells report it


class Preemption:
    """Catches SIGTERM and SIGINT while it is entered; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def leave(self, message: str) -> None:
        """Ends the process with the signal's exit code."""
        assert self.received is not None
        logging.getLogger("scanax").warning("%s received: %s", self.received.name, message)
        raise SystemExit(EXIT_CODES[self.received])
