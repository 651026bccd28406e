"""Run a function in a forked process: to kill it, or to give it limits of its own."""

import os
import signal
import time
import traceback
from collections.abc import Callable


def start(work: Callable[[], None]) -> int:
    """The process id of a child in a group of its own; it ends with 0, or 1 after an exception."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_after(child: int, seconds: float, number: int = signal.SIGKILL) -> bool:
    """Signal a child after a while; whether it was still running."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.001, seconds))
    os.kill(child, number)
    os.waitpid(child, 0)
    return True


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
