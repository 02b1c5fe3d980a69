"""Batches made ahead of the loop by a thread, and how long the loop has to wait for them."""

import queue
import threading
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

_END = object()


class Prefetch(Generic[T]):
    """An iterator over `items` that a thread is ahead of by up to `ahead`. What goes wrong in the
    thread is raised by `next`. `waited` is in seconds, since the beginning."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._queue: queue.Queue[object] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(
            target=self._work, args=(items,), name="bertfast-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:
            self._put(_Failed(error))

    def _put(self, item: object) -> bool:
        """False once nobody waits for more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        begun = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - begun
        if item is _END:
            self._queue.put(_END)
            raise StopIteration
        if isinstance(item, _Failed):
            raise item.error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error
