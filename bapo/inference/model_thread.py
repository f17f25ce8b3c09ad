"""The one thread of this process in which a model computes, whoever asks.

OpenMP keeps a team of workers for every thread that computes. As soon as the teams together have more
members than there are cores, GNU's runtime lets them sleep between two products instead of waiting
awake, in all teams, and each of a step's some 200 products pays for waking them: asked from a second
thread, as every visitor of a web page does, the embedded base answered less than half as fast.
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
