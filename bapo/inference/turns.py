"""One model, many visitors: they take turns of some tokens each, in the order in which they came."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A fair lock that tells those who wait how many are ahead of them, and that can be passed on and come back."""

    def __init__(self) -> None:
        self._line: deque[Ticket] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def ticket(self) -> Iterator["Ticket"]:
        """Stand in line; leaving the block gives the place up, whether or not it was one's turn."""
        ticket = Ticket(self)
        with self._moved:
            self._line.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()


class Ticket:
    """A place in the line of a `Turns`."""

    def __init__(self, turns: Turns):
        self._turns = turns

    @property
    def ahead(self) -> int:
        """How many must be done first; 0 means that it is this ticket's turn."""
        with self._turns._moved:
            return self._turns._line.index(self)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is this ticket's turn, at most so long; true if it is."""
        with self._turns._moved:
            return self._turns._moved.wait_for(lambda: self._turns._line[0] is self, seconds)

    def pass_on(self) -> bool:
        """Go to the end of the line if anyone waits; true if so, and then `wait` again."""
        with self._turns._moved:
            line = self._turns._line
            if len(line) == 1:
                return False
            line.remove(self)
            line.append(self)
            self._turns._moved.notify_all()
            return True
