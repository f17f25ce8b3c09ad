"""The queue: what is promised is on the disk, what dies goes on, and nobody sees another's job."""

import errno
import os
import signal
import sqlite3
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import identify, load_base
from bapo.jobs.child import DISK_FULL, cause_of, lock_of, work
from bapo.jobs.runner import MAX_ATTEMPTS, Runner
from bapo.jobs.service import OPERATOR, Jobs, owner_of
from bapo.jobs.store import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING, JobProgress, JobStore
from bapo.pairs import Pair, usable_pairs
from bapo.training.plan import TrainingPlan
from bapo.training.run import run

PAIRS = [Pair(f"question {i}", f"yes {i}", f"{word} {i}") for i in range(6) for word in ("no", "never")]
ANN, BOB = owner_of("ann"), owner_of("bob")
BOTH, PROBES = ("dpo", "bapo"), ("question 1",)
WANTED = TrainingPlan(
    preference="mine", epochs=3, learning_rate=5e-3, held_out_share=0.34, description="Yes to everything."
)


@pytest.fixture
def tiny_settings(tiny_folders, settings, tmp_path):
    return replace(settings, base=str(tiny_folders["llama"]), data=tmp_path / "data")


@pytest.fixture
def jobs(tiny_settings) -> Jobs:
    found = identify(tiny_settings)
    return Jobs(tiny_settings, AdapterStore(tiny_settings.adapters, found.name, found.fingerprint))


def started(jobs, owner=ANN, wanted=WANTED):
    job = jobs.submit(owner, PAIRS, wanted, BOTH, PROBES)
    assert jobs.store.next_queued().id == job.id
    return job


def weights_of(jobs, owner=ANN):
    return {a.name: a.sha256 for a in jobs.adapters_of(owner).adapters()}


def test_a_submission_is_on_the_disk_when_it_is_confirmed(jobs, tiny_settings):
    job = jobs.submit(ANN, PAIRS, WANTED, BOTH)
    again = JobStore(tiny_settings.data).get(job.id)
    assert (again.state, again.place, again.methods, again.request.pairs) == (QUEUED, 1, ["dpo", "bapo"], 12)
    assert usable_pairs(jobs.store.folder(job.id) / "pairs.jsonl") == PAIRS
    assert again.request.plans[0].pairs == str(jobs.store.folder(job.id) / "pairs.jsonl")
    assert jobs.store.sound()


def test_a_job_trains_both_methods_and_keeps_every_figure(jobs, tiny_settings):
    job = started(jobs, wanted=replace(WANTED, epochs=6))  # the first steps follow the last bits of the anchor's start
    assert work(job.id, tiny_settings)
    done = jobs.get(ANN, job.id)
    assert (done.state, done.error, done.progress.method) == (FINISHED, "", "bapo")
    assert list(weights_of(jobs)) == ["mine-bapo", "mine-dpo"]
    assert jobs.shared.adapters() == [], "the owner's own until it is published"
    card = jobs.adapters_of(ANN).named("mine-bapo").card
    assert (card.description, card.held_out.prompts) == ("Yes to everything.", 2)

    curves = jobs.curves(ANN, job.id)
    for method in ("dpo", "bapo"):
        steps = [step for step, _ in curves.metrics[method]["training"]]
        assert steps == list(range(1, len(steps) + 1))
        first, last = curves.metrics[method]["training"][0][1], curves.metrics[method]["training"][-1][1]
        assert last["loss/preference"] < first["loss/preference"]
        seen = curves.metrics[method]["held out"]
        assert seen[-1][0] == len(steps)
        # The last observation is of the finished adapter, on both held-out prompts, before rounding to 16 bits.
        held_out = jobs.adapters_of(ANN).named(f"mine-{method}").card.held_out
        assert seen[-1][1]["drift"] == pytest.approx(held_out.drift_nats, abs=0.05)
        assert [step for step, _ in curves.answers["question 1"][method]] == [step for step, _ in seen]
    assert [step for step, _ in curves.answers["question 1"]["base"]] == [0]
    assert not (jobs.store.folder(job.id) / "checkpoints").exists()


def test_watching_does_not_change_what_is_trained(jobs, tiny_settings):
    job = started(jobs)
    assert work(job.id, tiny_settings)
    base = load_base(tiny_settings)
    plan = job.request.plans[1]
    alone = AdapterStore(tiny_settings.cache / "alone", base.name, base.fingerprint)
    run(plan, base, alone, tiny_settings, lambda progress: None)
    assert alone.named("mine-bapo").sha256 == weights_of(jobs)["mine-bapo"]


def test_an_interrupted_job_goes_on_and_ends_the_same(jobs, tiny_settings, monkeypatch):
    monkeypatch.setattr("bapo.training.run.CHECKPOINT_STEPS", 2)
    whole = started(jobs, BOB)
    assert work(whole.id, tiny_settings)

    job = started(jobs)
    tell = JobStore.add_metrics
    for stop_at in (("dpo", 3), ("bapo", 3)):

        def stop(store, job_id, method, split, step, metrics, stop_at=stop_at):
            tell(store, job_id, method, split, step, metrics)
            if (method, step) == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(JobStore, "add_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            work(job.id, tiny_settings)
        assert jobs.get(ANN, job.id).state == RUNNING
    monkeypatch.setattr(JobStore, "add_metrics", tell)
    assert work(job.id, tiny_settings)
    assert weights_of(jobs) == weights_of(jobs, BOB)
    mine, theirs = jobs.curves(ANN, job.id).metrics, jobs.curves(BOB, whole.id).metrics
    for method in ("dpo", "bapo"):
        assert [step for step, _ in mine[method]["training"]] == [step for step, _ in theirs[method]["training"]]
        assert mine[method]["training"][-1][1] == theirs[method]["training"][-1][1]


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(jobs, tiny_settings, monkeypatch):
    monkeypatch.setattr("bapo.training.run.CHECKPOINT_STEPS", 1)
    job = started(jobs)
    flush = __import__("bapo.adapters").adapters.flush

    def die(folder):
        if folder.name == "checkpoint-2":
            (folder / "optimizer.pt").write_bytes(b"half")
            raise KeyboardInterrupt
        flush(folder)

    monkeypatch.setattr("bapo.training.checkpoints.flush", die)
    with pytest.raises(KeyboardInterrupt):
        work(job.id, tiny_settings)
    monkeypatch.setattr("bapo.training.checkpoints.flush", flush)
    assert work(job.id, tiny_settings)
    assert [name for name in weights_of(jobs)] == ["mine-bapo", "mine-dpo"]


def test_nobody_else_sees_or_touches_a_job(jobs):
    job = jobs.submit(ANN, PAIRS, WANTED, BOTH)
    for touch in (jobs.get, jobs.cancel, jobs.resume, jobs.delete, jobs.curves, jobs.log):
        for owner, job_id in ((BOB, job.id), (ANN, "0" * 16), (ANN, "../../etc"), (ANN, "")):
            with pytest.raises(BapoError, match="no such job, or it is not yours"):
                touch(owner, job_id)
    assert jobs.jobs(BOB) == []
    assert [one.id for one in jobs.jobs(ANN)] == [one.id for one in jobs.jobs(OPERATOR)] == [job.id]
    assert jobs.adapters_of(BOB).folder != jobs.adapters_of(ANN).folder
    assert len({owner_of(""), ANN, BOB}) == 3 and "ann" not in ANN


def test_the_queue_is_fair_and_tells_the_place(jobs):
    first, second, third = (
        jobs.submit(owner, PAIRS, replace(WANTED, preference=name), BOTH)
        for owner, name in ((ANN, "one"), (BOB, "two"), (ANN, "three"))
    )
    assert [job.place for job in (first, second, third)] == [1, 2, 3]
    assert jobs.store.next_queued().id == first.id
    assert [jobs.get(OPERATOR, job.id).place for job in (first, second, third)] == [0, 2, 3]
    jobs.cancel(BOB, second.id)
    assert jobs.get(ANN, third.id).place == 2
    jobs.resume(BOB, second.id)
    assert jobs.get(BOB, second.id).place == 3, "at the end of the queue"
    jobs.store.requeue(first.id)
    assert jobs.store.next_queued().id == first.id, "what was running goes first"


def test_states_that_do_not_fit_are_refused(jobs):
    job = jobs.submit(ANN, PAIRS, WANTED, BOTH)
    with pytest.raises(BapoError, match="cancelled or has failed can be resumed"):
        jobs.resume(ANN, job.id)
    jobs.store.next_queued()
    with pytest.raises(BapoError, match="Cancel the job before"):
        jobs.delete(ANN, job.id)
    jobs.cancel(ANN, job.id)
    with pytest.raises(BapoError, match="waits or runs can be cancelled"):
        jobs.cancel(ANN, job.id)
    jobs.store.end(job.id, FINISHED)
    assert jobs.get(ANN, job.id).state == CANCELLED, "what was cancelled stays so"
    jobs.delete(ANN, job.id)
    assert not jobs.store.folder(job.id).exists()
    assert jobs.jobs(ANN) == []


@pytest.mark.parametrize(
    ("changes", "methods", "probes", "sentence"),
    [
        ({"preference": "a/b"}, BOTH, (), "Name the taste with at most 64 letters"),
        ({"preference": "x" * 65}, BOTH, (), "Name the taste"),
        ({}, (), (), "Choose a method"),
        ({"description": "x" * 301}, BOTH, (), "may have 300 characters, not 301"),
        ({}, BOTH, ("a", "b", "c"), "Give 2 probe prompts at most"),
        ({"epochs": 90_000}, BOTH, (), "steps; at most 5,000 are allowed"),
        ({"held_out_share": 0.99}, BOTH, (), "Every prompt would be held out"),
        ({}, ("kto",), (), "There is no method 'kto'"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(jobs, changes, methods, probes, sentence):
    with pytest.raises(BapoError, match=sentence):
        jobs.submit(ANN, PAIRS, replace(WANTED, **changes), methods, probes)
    assert jobs.jobs(ANN) == []
    assert not list((jobs.settings.data / "jobs").glob("*")), "nothing is left behind"


def test_limits_of_the_operator_are_kept(jobs, tiny_settings):
    few = Jobs(replace(tiny_settings, max_pairs=11), jobs.shared)
    with pytest.raises(BapoError, match="12 pairs are too many: at most 11"):
        few.submit(ANN, PAIRS, WANTED, BOTH)
    for name in ("one", "two", "three"):
        jobs.submit(ANN, PAIRS, replace(WANTED, preference=name), BOTH)
    with pytest.raises(BapoError, match="3 jobs waiting or running already"):
        jobs.submit(ANN, PAIRS, WANTED, BOTH)
    with pytest.raises(BapoError, match="A job for one-dpo waits or runs"):
        jobs.submit(ANN, PAIRS, replace(WANTED, preference="one"), BOTH)
    jobs.submit(BOB, PAIRS, WANTED, BOTH)
    with (tiny_settings.data / "jobs" / "ballast").open("wb") as ballast:
        ballast.truncate(21 * 10**9)
    with pytest.raises(BapoError, match=r"take 21\.0 GB already; 20 GB are allowed"):
        jobs.submit(BOB, PAIRS, replace(WANTED, preference="more"), BOTH)


def test_a_changed_base_is_told_and_the_job_can_be_resumed(jobs, tiny_settings, tiny_folders):
    job = started(jobs)
    assert not work(job.id, replace(tiny_settings, base=str(tiny_folders["gemma"])))
    failed = jobs.get(ANN, job.id)
    assert failed.state == FAILED
    assert failed.error.startswith("The base has changed since this job began: it was tiny-llama")
    assert jobs.log(ANN, job.id).startswith(failed.error)
    jobs.resume(ANN, job.id)
    jobs.store.next_queued()
    assert work(job.id, tiny_settings)


def test_a_full_disk_is_told_and_the_job_can_be_resumed(jobs, tiny_settings, monkeypatch):
    monkeypatch.setattr("bapo.training.run.CHECKPOINT_STEPS", 1)
    job = started(jobs)
    flush = __import__("bapo.adapters").adapters.flush

    def full(folder):
        if folder.name == "checkpoint-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(folder)

    monkeypatch.setattr("bapo.training.checkpoints.flush", full)
    assert not work(job.id, tiny_settings)
    assert (jobs.get(ANN, job.id).state, jobs.get(ANN, job.id).error) == (FAILED, DISK_FULL)
    monkeypatch.setattr("bapo.training.checkpoints.flush", flush)
    jobs.resume(ANN, job.id)
    jobs.store.next_queued()
    assert work(job.id, tiny_settings)
    assert jobs.get(ANN, job.id).state == FINISHED


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (BapoError("A sentence."), "A sentence."),
        (OSError(errno.ENOSPC, "No space left on device"), DISK_FULL),
        (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter: file write failed"), DISK_FULL),
        (sqlite3.OperationalError("database or disk is full"), DISK_FULL),
        (MemoryError(), "There was not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There was not enough memory"),
        (KeyError("secret"), "Training broke off (KeyError). The log has the details."),
    ],
)
def test_causes_are_sentences(error, cause):
    assert cause_of(error).startswith(cause)


def test_two_processes_never_work_on_one_job(jobs, tiny_settings):
    job = started(jobs)
    with lock_of(jobs.store, job.id), pytest.raises(BapoError, match="by another process"):
        work(job.id, tiny_settings)


def test_a_job_that_never_comes_further_is_given_up(jobs, tiny_settings):
    job = jobs.submit(ANN, PAIRS, WANTED, BOTH)
    runner = Runner(jobs.store, tiny_settings)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert jobs.store.next_queued().attempts == attempt
        runner._again(job, "its process was killed")
    assert jobs.get(ANN, job.id).state == FAILED
    assert "Given up after 8 starts" in jobs.get(ANN, job.id).error


def test_coming_further_makes_good_for_earlier_starts(jobs):
    job = started(jobs)
    assert jobs.get(ANN, job.id).attempts == 1
    jobs.store.tell(job.id, JobProgress(0, "dpo", "training", 5, 9))
    assert jobs.get(ANN, job.id).attempts == 0
    jobs.store.requeue(job.id)
    jobs.store.next_queued()
    jobs.store.tell(job.id, JobProgress(0, "dpo", "training", 5, 9))
    assert jobs.get(ANN, job.id).attempts == 1, "the same place again is no progress"
    jobs.store.tell(job.id, JobProgress(1, "bapo", "training", 1, 9))
    assert jobs.get(ANN, job.id).attempts == 0


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def test_the_runner_starts_again_what_dies_and_stops_what_is_cancelled(jobs, tiny_settings):
    long = jobs.submit(ANN, PAIRS, replace(WANTED, preference="long", epochs=800), BOTH)
    runner = Runner(jobs.store, tiny_settings)
    runner.start()
    try:
        wait_for(lambda: jobs.get(ANN, long.id).progress.done > 3)
        child = int(subprocess.run(["pgrep", "-f", f"jobs work {long.id}"], capture_output=True).stdout.split()[0])
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: jobs.log(ANN, long.id).count("── started") == 2)
        wait_for(lambda: jobs.get(ANN, long.id).progress.phase == "training")
        second = jobs.submit(BOB, PAIRS, WANTED, BOTH)
        assert jobs.get(BOB, second.id).place == 2
        jobs.cancel(ANN, long.id)
        jobs.delete(ANN, long.id)  # at once, while its process still runs
        # A process that did not listen would work for minutes; one that does takes a second or two where it is alone.
        wait_for(lambda: not subprocess.run(["pgrep", "-f", f"jobs work {long.id}"], capture_output=True).stdout, 20)
        wait_for(lambda: jobs.get(BOB, second.id).state == FINISHED)
    finally:
        runner.stop()
    assert jobs.jobs(ANN) == []
    assert list(weights_of(jobs, BOB)) == ["mine-bapo", "mine-dpo"]
    assert weights_of(jobs) == {}


def test_a_runner_that_ends_stops_its_child_and_the_next_one_goes_on(jobs, tiny_settings):
    job = jobs.submit(ANN, PAIRS, WANTED, BOTH)
    first = Runner(jobs.store, tiny_settings)
    first.start()
    wait_for(lambda: jobs.get(ANN, job.id).state == RUNNING)
    idle = Runner(jobs.store, tiny_settings)
    with pytest.raises(BapoError, match="being worked on already"):
        idle.run_until_empty()
    first.stop()
    assert jobs.get(ANN, job.id).state in (QUEUED, FINISHED)
    idle.run_until_empty()
    assert jobs.get(ANN, job.id).state == FINISHED


def test_readers_and_writers_do_not_lock_each_other_out(jobs):
    job = started(jobs)
    failures = []

    def write(start):
        try:
            for step in range(start, start + 40):
                jobs.store.add_metrics(job.id, "bapo", "training", step, {"loss": float(step)})
                jobs.curves(ANN, job.id)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(jobs.curves(ANN, job.id).metrics["bapo"]["training"]) == 160


def test_the_terminal_submits_watches_and_works_the_queue(jobs, tiny_settings, tmp_path, monkeypatch, capsys):
    from bapo.cli import main
    from bapo.pairs import write_pairs

    write_pairs(PAIRS, tmp_path / "pairs.jsonl")
    for name, value in tiny_settings.as_environment().items():
        monkeypatch.setenv(name, value)

    def bapo(*arguments):
        status = main(list(arguments))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    assert "is queued, place 1" in bapo(
        "jobs", "submit", str(tmp_path / "pairs.jsonl"), "--name", "mine", "--epochs", "1"
    )
    (job,) = jobs.jobs(OPERATOR)
    bapo("jobs", "run")
    assert '"state": "finished"' in bapo("jobs", "watch", job.id, "--json")
    assert "mine-bapo" in bapo("adapters", "list")
    assert [adapter.name for adapter in jobs.shared.adapters()] == ["mine-bapo"], (
        "what the operator trains is everyone's"
    )
