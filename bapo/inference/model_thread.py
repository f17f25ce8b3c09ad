"""The one thread of this process in which a model computes, whoever asks.

Asked from a second thread, as every visitor of a web page does, the embedded base answered about half
as fast (4 to 7 s instead of 2.4 s on two cores), and the first thread became as slow until the second
had ended. Probably OpenMP's doing, which keeps a team of workers for every thread that computes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")


def in_model_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function there and wait for what it returns or raises. It must not call this again."""
    return _THREAD.submit(function, *args, **kwargs).result()


def iterate_in_model_thread(iterator: Iterator[T]) -> Iterator[T]:
    """Its items, each computed there; between two of them the thread is free for others."""
    end: Any = object()
    try:
        while (item := in_model_thread(next, iterator, end)) is not end:
            yield item
    finally:
        if close := getattr(iterator, "close", None):
            in_model_thread(close)
