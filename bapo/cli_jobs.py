"""`python -m bapo jobs …` and `python -m bapo adapters …`: the Train and Adapters tabs from a terminal."""

import argparse
import json
import sys
import time
from pathlib import Path

from bapo.errors import BapoError
from bapo.settings import Settings

POLL_SECONDS = 1.0
# Options of `submit` that go into the plan as they are.
PLAN_OPTIONS = (
    *("description", "lambda_", "beta", "learning_rate", "epochs", "batch_size", "rank", "seed", "held_out_share"),
)


def add_jobs_commands(commands, add_command) -> None:
    """Add both families to the parser; `add_command(name, function, text, parent)` makes one command."""
    jobs = commands.add_parser("jobs", help="Train in the background: a queue that survives everything.")
    parent = jobs.add_subparsers(required=True, metavar="COMMAND")

    submit = add_command("submit", submit_command, "Queue a training on a file of pairs.", parent)
    submit.add_argument("pairs", type=Path, metavar="FILE")
    submit.add_argument("--name", required=True, help="what the taste is called")
    submit.add_argument("--method", default="bapo", choices=("bapo", "dpo", "both"), help="default: bapo")
    submit.add_argument("--description", help="what the taste means, in a sentence")
    submit.add_argument("--probe", action="append", dest="probes", metavar="PROMPT", help="answered while it trains")
    submit.add_argument("--leave-out-faulty", action="store_true", help="train on the sound rows of a file with faults")
    submit.add_argument("--wanted", metavar="NAME", help="the preferred one, where responses go by name")
    submit.add_argument("--lambda", dest="lambda_", type=float)
    submit.add_argument("--beta", type=float)
    submit.add_argument("--learning-rate", type=float)
    submit.add_argument("--epochs", type=float)
    submit.add_argument("--batch-size", type=int)
    submit.add_argument("--rank", type=int)
    submit.add_argument("--seed", type=int)
    submit.add_argument("--held-out-share", type=float)
    _base(submit)
    _json(submit)
    _json(add_command("list", list_command, "Every job, the newest first.", parent))
    for name, function, text in (
        ("show", show_command, "One job with its log."),
        ("watch", watch_command, "Follow one job to its end."),
        ("cancel", cancel_command, "Stop a job; its last checkpoint stays."),
        ("resume", resume_command, "Queue a cancelled or failed job again; it goes on from its last checkpoint."),
        ("delete", delete_command, "Remove a job with its pairs and its log."),
    ):
        one = add_command(name, function, text, parent)
        one.add_argument("id")
        _json(one)
    run = add_command("run", run_command, "Work the queue here until it is empty (the app does so by itself).", parent)
    _base(run)
    work = add_command(
        "work", work_command, "Carry out one running job in this process: what the queue starts.", parent
    )
    work.add_argument("id")

    adapters = commands.add_parser("adapters", help="List, export, import and remove adapters.")
    parent = adapters.add_subparsers(required=True, metavar="COMMAND")
    listed = add_command("list", adapters_list_command, "Every adapter of the base.", parent)
    shown = add_command("show", adapters_show_command, "An adapter's card.", parent)
    exported = add_command("export", adapters_export_command, "Write an adapter as a zip that PEFT loads.", parent)
    imported = add_command("import", adapters_import_command, "Take in a LoRA adapter for this base.", parent)
    removed = add_command("remove", adapters_remove_command, "Delete an adapter.", parent)
    for one in (shown, exported, removed):
        one.add_argument("name", help="such as P2A-bapo")
    exported.add_argument("file", type=Path, metavar="FILE.zip")
    imported.add_argument("path", type=Path, metavar="FILE.zip|FOLDER")
    imported.add_argument("--name", required=True, help="what the taste is called")
    imported.add_argument("--method", default="bapo", choices=("bapo", "dpo"))
    for one in (listed, shown, exported, imported, removed):
        _base(one)
        _json(one)


def _base(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--base", help="a preset, a hub id or a folder (default: BAPO_BASE, else by the machine)")


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────
def submit_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR
    from bapo.pair_files import read_limits
    from bapo.pairs import read_pairs
    from bapo.training.plan import TrainingPlan

    report = read_pairs(args.pairs, wanted=args.wanted, limits=read_limits(settings))
    if report.question:
        raise BapoError(f"{args.pairs.name}: {report.question} See: python -m bapo pairs convert --help")
    if report.problems and not args.leave_out_faulty:
        raise BapoError(
            f"{report.faulty_rows} of {report.rows} rows of {args.pairs.name} are faulty, the first: "
            f"{report.problems[0]}. Mend them, or add --leave-out-faulty."
        )
    methods = ("dpo", "bapo") if args.method == "both" else (args.method,)
    given = {name: getattr(args, name) for name in PLAN_OPTIONS if getattr(args, name) is not None}
    if "rank" in given:
        given["alpha"] = 2 * given["rank"]
    plan = TrainingPlan(preference=args.name, **given)
    job = _jobs(settings).submit(OPERATOR, report.pairs, plan, methods, args.probes or ())
    if args.json:
        print(json.dumps(job.as_dict()))
    else:
        print(f"{job.id} is queued, place {job.place}. It runs in the app, or here with: python -m bapo jobs run")
    return 0


def list_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.store import JobStore

    jobs = JobStore(settings.data).jobs()
    if args.json:
        print(json.dumps([job.as_dict() for job in jobs]))
    for job in () if args.json else jobs:
        print(f"{job.id}  {_line(job)}")
    return 0


def show_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR

    jobs = _jobs(settings)
    job = jobs.get(OPERATOR, args.id)
    if args.json:
        print(json.dumps({**job.as_dict(), "log": jobs.log(OPERATOR, args.id)}))
    else:
        print(f"{_line(job)}\n\n{jobs.log(OPERATOR, args.id)}", end="")
    return 0


def watch_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR
    from bapo.jobs.store import FINISHED, QUEUED, RUNNING

    jobs = _jobs(settings)
    said = ""
    while True:
        job = jobs.get(OPERATOR, args.id)
        if not args.json and _line(job) != said:
            said = _line(job)
            print(said, flush=True)
        if job.state not in (QUEUED, RUNNING):
            break
        time.sleep(POLL_SECONDS)
    if args.json:
        print(json.dumps(job.as_dict()))
    return 0 if job.state == FINISHED else 2


def cancel_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR

    return _said(args, _jobs(settings).cancel(OPERATOR, args.id))


def resume_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR

    return _said(args, _jobs(settings).resume(OPERATOR, args.id))


def delete_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.service import OPERATOR

    _jobs(settings).delete(OPERATOR, args.id)
    print(json.dumps({"deleted": args.id}) if args.json else f"{args.id} is deleted")
    return 0


def run_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.runner import Runner
    from bapo.jobs.store import JobStore

    print("Working the queue; stop with Ctrl-C, which keeps the last checkpoint.", file=sys.stderr)
    Runner(JobStore(settings.data), settings).run_until_empty()
    return 0


def work_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.jobs.process import be_a_child

    be_a_child()
    from bapo.jobs.child import work  # seconds of imports, during which it can be stopped already

    return 0 if work(args.id, settings) else 1


def _jobs(settings: Settings):
    from bapo.jobs.service import Jobs

    return Jobs(settings, _store(settings))


def _line(job) -> str:
    progress = job.progress
    where = {
        "queued": f"place {job.place}",
        "running": f"{progress.method}: {progress.phase} {progress.done}/{progress.total}",
    }.get(job.state, job.error)
    return f"{job.request.name} ({', '.join(job.methods)}) · {job.request.pairs} pairs · {job.state}" + (
        f" · {where}" if where else ""
    )


def _said(args: argparse.Namespace, job) -> int:
    print(json.dumps(job.as_dict()) if args.json else _line(job))
    return 0


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────
def _store(settings: Settings):
    from bapo.adapters import AdapterStore
    from bapo.inference.base import identify

    found = identify(settings)
    return AdapterStore(settings.adapters, found.name, found.fingerprint)


def adapters_list_command(args: argparse.Namespace, settings: Settings) -> int:
    store = _store(settings)
    if args.json:
        print(json.dumps({"adapters": [_card(one) for one in store.adapters()], "refused": store.refused()}))
        return 0
    for adapter in store.adapters():
        held_out = adapter.card.held_out
        figures = f"accuracy {held_out.reward_accuracy:.3f} · drift {held_out.drift_nats:+.1f}" if held_out else ""
        print(f"{adapter.name:24} {adapter.card.training_pairs:6} pairs  {figures}")
    for name, fault in store.refused().items():
        print(f"{name:24} cannot be used: {fault}")
    return 0


def adapters_show_command(args: argparse.Namespace, settings: Settings) -> int:
    print(json.dumps(_card(_store(settings).named(args.name)), indent=None if args.json else 2))
    return 0


def adapters_export_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.adapter_files import export_zip

    export_zip(_store(settings).named(args.name), args.file)
    print(json.dumps({"file": str(args.file)}) if args.json else f"{args.file} is written")
    return 0


def adapters_import_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.adapter_files import import_adapter
    from bapo.inference.base import identify

    adapter = import_adapter(args.path, _store(settings), identify(settings).folder, args.name, args.method)
    print(json.dumps(_card(adapter)) if args.json else f"{adapter.name} is in place")
    return 0


def adapters_remove_command(args: argparse.Namespace, settings: Settings) -> int:
    store = _store(settings)
    store.remove(store.named(args.name))
    store.empty_bin()
    print(json.dumps({"removed": args.name}) if args.json else f"{args.name} is removed")
    return 0


def _card(adapter) -> dict:
    from dataclasses import asdict

    return {"name": adapter.name, "sha256": adapter.sha256, **asdict(adapter.card)}
