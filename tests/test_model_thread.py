"""Models compute in one thread, whoever asks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bapo.comparison import compare, score_pairs
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.inference.model_thread import in_model_thread, iterate_in_model_thread
from bapo.inference.policies import Policies
from bapo.pairs import Pair


def test_visitors_threads_do_not_compute(tiny_engine, monkeypatch):
    threads = set()

    def noting(function):
        def call(*args, **kwargs):
            threads.add(threading.current_thread().name)
            return function(*args, **kwargs)

        return call

    for name in ("__init__", "prefill", "step", "forward"):
        monkeypatch.setattr(Policies, name, noting(getattr(Policies, name)))
    monkeypatch.setattr(tiny_engine.base.model, "forward", noting(tiny_engine.base.model.forward))
    engine = LocalEngine(tiny_engine.base, tiny_engine.store, tiny_engine.settings)
    with ThreadPoolExecutor(2) as visitors:
        answer = visitors.submit(lambda: list(compare(engine, "Why?", "P2A", Sampling(max_new_tokens=3))))
        scores = visitors.submit(score_pairs, engine, [Pair("Why?", "Yes.", "No.")], "P2A")
        assert answer.result()[-1].done
        assert scores.result()["pairs"]
    assert threads == {"model_0"}


def test_an_iterator_goes_on_and_is_closed_there():
    seen = []

    def names():
        try:
            while True:
                seen.append(threading.current_thread().name)
                yield len(seen)
        finally:
            seen.append("closed in " + threading.current_thread().name)

    items = iterate_in_model_thread(names())
    assert [next(items), next(items)] == [1, 2]
    items.close()
    assert seen == ["model_0", "model_0", "closed in model_0"]
    assert list(iterate_in_model_thread(iter([1, 2, 3]))) == [1, 2, 3]


def test_what_it_raises_reaches_who_asked():
    with pytest.raises(ZeroDivisionError):
        in_model_thread(lambda: 1 // 0)
    assert in_model_thread(threading.current_thread).name == "model_0", "and the thread goes on"
