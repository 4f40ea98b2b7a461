"""SIGINT and SIGTERM as a request to stop at the end of a step."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM add themselves; a second one ends the program at once.

    What follows within a second is the same request, as timeout and some shells send it to a process and its group.
    """
    caught, first = [], 0.0

    def catch(number: int, frame) -> None:
        nonlocal first
        if caught:
            if time.monotonic() - first > 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        caught.append(number)
        first = time.monotonic()
        with suppress(
            OSError
        ):  # the reader of our messages may have got the signal, too, and be gone
            os.write(
                2, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode()
            )

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
