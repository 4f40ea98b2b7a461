"""SIGINT and SIGTERM as a request to stop at the end of a step."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0  # seconds; timeout and some shells send a signal to a process and to its group


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM add themselves; a second one ends the program at once.

    A thread answers the user, because a handler of Python's waits for the end of a long call of torch.
    """
    caught = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in STOPPING
    }
    wakeup = signal.set_wakeup_fd(writer.fileno())
    thread = threading.Thread(target=answer_signals, args=(reader,), daemon=True)
    thread.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def answer_signals(reader: socket.socket) -> None:
    """Report the first signal, and exit at the second one. reader: gives the number of each as a byte."""
    first = None
    while received := reader.recv(1):
        number = received[0]
        if number not in STOPPING:
            continue
        if first is None:
            first = time.monotonic()
            name = signal.Signals(number).name
            line = (
                f"\n{name}: finishing this step, then saving; a second one ends at once, unsaved\n"
            )
            with suppress(OSError):  # the reader of our messages may have got it, too, and be gone
                os.write(2, line.encode())
        elif time.monotonic() - first > SAME_REQUEST:
            os._exit(128 + number)
