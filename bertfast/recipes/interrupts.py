"""SIGTERM and Ctrl-C as a wish that a run grants at the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any

# The exit status of a command that one of them ended.
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Interrupts:
    """SIGTERM and SIGINT as a wish to stop. The second SIGINT is Python's own."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
