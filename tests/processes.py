"""Copies of this process by fork: they start at once, as all is imported and patched, and may be killed."""

import os
import traceback
from collections.abc import Callable


def start_in_fork(function: Callable[[], object]) -> int:
    """Start a function in a forked copy of this process, and return the copy's id.

    A fork must not compute gradients where this process has exported to ONNX, whose threads torch doesn't carry over.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            code = int(function() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # nothing of pytest runs here
    return child


def wait_for(child: int) -> int:
    """Return the exit code of a forked copy, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_fork(function: Callable[[], object]) -> int:
    """Run a function in a forked copy of this process, and return its exit code, or minus the signal that ended it."""
    return wait_for(start_in_fork(function))
