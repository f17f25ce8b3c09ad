"""How a job's process behaves towards the machine and the app. Light to import: it takes effect at once."""

import ctypes
import logging
import os
import signal

NICENESS = 19  # a job takes what answering leaves
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """The process was asked to stop; the last checkpoint stays."""


def be_a_child() -> None:
    """Give way to everything else, end when asked to, and end with the app."""
    signal.signal(signal.SIGTERM, _stop)
    os.nice(NICENESS)
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        logger.info("this system is not Linux: the job goes on where the app is killed")


def _stop(*_) -> None:
    raise Stopped
