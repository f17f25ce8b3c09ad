"""The product from a terminal: the same services as the page. Results on stdout, all else on stderr."""

import argparse
import json
import os
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

# Before the libraries are imported: a terminal wants results, not their advice to programmers.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tqdm import tqdm

from bapo.cli_jobs import add_jobs_commands
from bapo.errors import BapoError
from bapo.jobs.process import Stopped
from bapo.pair_files import read_limits
from bapo.preferences import CATALOGUE
from bapo.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 where the user has something to put right)."""
    args = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        settings = Settings.from_environment()
        if getattr(args, "base", None):
            settings = replace(settings, base=args.base)
        return args.command(args, settings)
    except BapoError as error:
        print(f"bapo: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"bapo: {error}. Free space there, or point BAPO_CACHE and BAPO_ADAPTERS elsewhere.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped):
        print("\nbapo: stopped", file=sys.stderr)
        return 130


def compare_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.comparison import Frame, compare
    from bapo.inference.decoding import Sampling
    from bapo.recording import record

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    engine = _load_engine(replace(settings, exact=settings.exact or args.exact))
    frame: Frame | None = None
    with tqdm(total=args.max_new_tokens, unit="token", desc="answering", leave=False) as bar:
        for frame in compare(engine, args.prompt, args.preference, sampling):
            bar.update(max((answer.tokens for answer in frame.answers), default=0) - bar.n)
    assert frame is not None  # compare yields at least the last frame
    if args.json:
        print(json.dumps(record(args.prompt, frame, engine), ensure_ascii=False))
        return 0
    for answer in frame.answers:
        drift = "" if answer.name == "base" else f" · drift {frame.drift(answer.name).nats:+.1f} nats"
        print(f"── {answer.name} · {answer.tokens} tokens · {answer.tokens_per_second:.1f} tokens/s{drift}")
        print(_printable(answer.text.strip()), end="\n\n")
    print(f"{frame.tokens_per_second:.1f} tokens/s together · base weights as {frame.weights}")
    return 0


def score_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.comparison import score_pairs
    from bapo.pairs import usable_pairs

    pairs = usable_pairs(args.pairs)
    engine = _load_engine(settings)
    with tqdm(unit="prompt", desc="scoring", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = score_pairs(engine, pairs, args.preference, progress)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    for method, accuracy in result["reward_accuracy"].items():
        drift = result["drift"][method]
        print(
            f"{method:5} reward accuracy {accuracy:.3f} · drift {drift['nats']:+.2f} nats a prompt, "
            f"{drift['per_token']:+.4f} a token"
        )
    return 0


def pairs_check_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.pairs import read_pairs

    report = read_pairs(args.file, columns=_columns(args.columns), wanted=args.wanted, limits=read_limits(settings))
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        print(f"{report.file}: {len(report.pairs)} pairs of {report.prompts} prompts, {len(report.problems)} problems")
        for line in (*report.problems, *report.notes):
            print(f"  {line}")
        if report.question:
            print(f"  {report.question} There are {', '.join(report.names or report.columns)}.")
    return 2 if report.problems or not report.pairs else 0


def pairs_convert_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.pairs import read_pairs, write_pairs

    report = read_pairs(args.file, columns=_columns(args.columns), wanted=args.wanted, limits=read_limits(settings))
    if report.question:
        raise BapoError(f"{report.question} There are {', '.join(report.names or report.columns)}.")
    if report.problems and not args.leave_out_faulty:
        raise BapoError(
            f"{report.faulty_rows} rows are faulty, the first: {report.problems[0]}. Add --leave-out-faulty."
        )
    write_pairs(report.pairs, args.out)
    said = {"file": str(args.out), "pairs": len(report.pairs), "left_out": report.faulty_rows}
    print(
        json.dumps(said) if args.json else f"{args.out}: {len(report.pairs)} pairs, {report.faulty_rows} rows left out"
    )
    return 0


def _columns(given: str | None) -> dict[str, str] | None:
    """`prompt=a,chosen=b,rejected=c` as a dict."""
    if given is None:
        return None
    columns = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    if set(columns) != {"prompt", "chosen", "rejected"}:
        raise BapoError("Name the columns as --columns prompt=…,chosen=…,rejected=…")
    return columns


def train_command(args: argparse.Namespace, settings: Settings) -> int:
    # Read by torch when it is imported. Training allocates and frees large tensors all the time; in huge
    # pages that costs a tenth less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from bapo.adapters import AdapterStore
    from bapo.inference.base import load_base
    from bapo.training.catalogue import missing_plans, train_all
    from bapo.training.plan import TrainingPlan
    from bapo.training.run import run

    if args.all == bool(args.preference):
        raise BapoError("Say which preference to train with --preference, or train the whole catalogue with --all.")
    given: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(TrainingPlan)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.all:
        if given:
            raise BapoError("--all trains with its own settings: leave the others out.")
        base = load_base(settings)
        store = AdapterStore(settings.adapters, base.name, base.fingerprint)
        print(f"{len(missing_plans(store))} adapters to train, the others are there", file=sys.stderr)
        with _TrainingBar() as bar:
            trained = train_all(base, store, settings, bar.show)
        cards = [json.loads((store.folder / name / "bapo.json").read_text()) for name in trained]
    else:
        plan = TrainingPlan(**given)
        plan.load_pairs()  # what is wrong with the files is said before the model is loaded
        plan.load_anchor_prompts()
        base = load_base(settings)
        store = AdapterStore(settings.adapters, base.name, base.fingerprint)
        target = store.place(plan.preference, plan.method)
        if target.exists() and not args.overwrite:
            raise BapoError(f"{target} is there already. Add --overwrite to replace it.")
        with _TrainingBar() as bar:
            folder = run(plan, base, store, settings, bar.show)
        cards = [json.loads((folder / "bapo.json").read_text())]
    if args.json:
        print(json.dumps(cards if args.all else cards[0]))
        return 0
    for card in cards:
        print(f"{store.folder / (card['preference'] + '-' + card['method'])}\n{json.dumps(card['held_out'], indent=2)}")
    return 0


SHOWN_METRICS = {"loss": "loss", "drift": "drift", "rewards/accuracies": "accuracy"}


class _TrainingBar(tqdm):
    """One line: the phase, how far it is, how long it takes, and how the training goes."""

    def __init__(self) -> None:
        super().__init__(
            dynamic_ncols=True, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        )

    def show(self, progress) -> None:
        if progress.note:
            self.write(progress.note, file=sys.stderr)
            return
        if self.desc != progress.phase:
            self.reset(progress.total)
            self.set_description_str(progress.phase, refresh=False)
        self.n = progress.done
        eta = "" if progress.eta_seconds is None else f" · {_duration(progress.eta_seconds)} left"
        known = [(SHOWN_METRICS[name], value) for name, value in progress.metrics.items() if name in SHOWN_METRICS]
        figures = "".join(f" · {name} {value:.3g}" for name, value in known)
        self.set_postfix_str(eta + figures)


def fetch_command(args: argparse.Namespace, settings: Settings) -> int:
    from bapo.inference.base import default_preset, find_folder
    from bapo.inference.fingerprint import fingerprint

    name = settings.base or default_preset(settings)
    print(f"fetching {name}, if it is not here yet …", file=sys.stderr)
    folder = find_folder(name, settings)
    print(f"{name} is ready, fingerprint {fingerprint(folder, settings.cache)[:12]}")
    return 0


def _load_engine(settings: Settings):
    from bapo.inference.engine import LocalEngine

    return LocalEngine.load(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bapo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    preferences = ", ".join(CATALOGUE)

    def command(name: str, function, text: str, parent=commands) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    def common(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--base", help="a preset, a hub id or a folder (default: BAPO_BASE, else by the machine)")
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    compare = command("compare", compare_command, "Answer a prompt as base, DPO and BAPO.")
    compare.add_argument("prompt")
    compare.add_argument("--preference", required=True, help=preferences)
    compare.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    compare.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    compare.add_argument("--top-p", type=float, default=1.0, metavar="P")
    compare.add_argument("--seed", type=int, default=0, metavar="S")
    compare.add_argument("--exact", action="store_true", help="decode with the base's weights as they are, unrounded")
    common(compare)

    score = command("score", score_command, "Log-probs of given pairs under base, DPO and BAPO.")
    score.add_argument("--pairs", type=Path, required=True, metavar="FILE")
    score.add_argument("--preference", required=True, help=preferences)
    common(score)

    train = command("train", train_command, "Train an adapter for one preference, or all of the catalogue.")
    train.add_argument("--preference", help=f"{preferences}, or a name for a taste of your own")
    train.add_argument("--all", action="store_true", help="train what is missing of the catalogue, every method")
    train.add_argument("--method", help="bapo (default) or dpo")
    train.add_argument("--pairs", metavar="FILE", help="preference pairs (default: our own for the preference)")
    train.add_argument("--anchor-prompts", metavar="FILE", help="further prompts, one a line, that only anchor")
    train.add_argument("--lambda", dest="lambda_", type=float, help="weight of the anchor")
    train.add_argument("--beta", type=float)
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--epochs", type=float)
    train.add_argument("--batch-size", type=int, help="pairs a step")
    train.add_argument("--rank", type=int, help="rank of the LoRA adapter")
    train.add_argument("--alpha", type=int, help="LoRA's scaling is alpha / rank")
    train.add_argument("--last-layers", type=int, metavar="N", help="adapt the last N layers alone (default: all)")
    train.add_argument("--max-response-tokens", type=int, help="longer responses are cut")
    train.add_argument("--held-out-share", type=float, help="share of a file's prompts kept for evaluation")
    train.add_argument("--seed", type=int)
    train.add_argument("--overwrite", action="store_true", help="replace an adapter of the same name")
    common(train)

    pairs = commands.add_parser("pairs", help="Work with files of preference pairs.")
    pairs_commands = pairs.add_subparsers(required=True, metavar="COMMAND")
    check = command("check", pairs_check_command, "Say what a file holds and what is wrong with it.", pairs_commands)
    convert = command(
        "convert", pairs_convert_command, "Write a file's pairs as the JSON lines that training reads.", pairs_commands
    )
    for sub in (check, convert):
        sub.add_argument("file", type=Path)
        sub.add_argument("--columns", metavar="prompt=A,chosen=B,rejected=C", help="where they have other names")
        sub.add_argument("--wanted", metavar="NAME", help="the preferred one, where responses go by name")
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    convert.add_argument("out", type=Path)
    convert.add_argument("--leave-out-faulty", action="store_true", help="write the sound rows of a file with faults")
    add_jobs_commands(commands, command)

    fetch = command("fetch", fetch_command, "Fetch the base's weights, so that the app starts quickly.")
    fetch.add_argument("--base", help="a preset or a hub id (default: BAPO_BASE, else by the machine)")
    return parser


def _printable(text: str) -> str:
    # A model can be talked into terminal escape sequences.
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
