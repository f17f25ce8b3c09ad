"""Training on several processes, as `accelerate launch` starts them."""

import json
import os
import subprocess
import sys

import pytest

from bapo.settings import REPOSITORY
from tests.tiny import write_pairs

COLUMNS = ("logps/chosen", "logps/rejected", "logps/base", "drift", "rewards/margins", "loss/anchor", "loss/preference")


@pytest.fixture
def pairs_file(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", prompts=9)


def train(folder, base, pairs_file, *launcher):
    command = ["train", "--base", str(base), "--preference", "mine", "--pairs", str(pairs_file), "--epochs", "4"]
    command += ["--batch-size", "4", "--learning-rate", "5e-3", "--held-out-share", "0.1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "bapo", *command],
        cwd=REPOSITORY,
        env={**os.environ, "BAPO_CACHE": str(folder / "cache"), "BAPO_ADAPTERS": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = (folder / base.name / "mine-bapo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in steps], json.loads(done.stdout.splitlines()[-1])


def test_two_processes_follow_the_curve_of_one(tiny_folders, pairs_file, tmp_path):
    base = tiny_folders["llama"]
    one, card = train(tmp_path / "one", base, pairs_file)
    two, card_of_two = train(
        tmp_path / "two", base, pairs_file,
        "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--module",
    )  # fmt: skip
    assert len(one) == len(two) == 16
    for step, (alone, shared) in enumerate(zip(one, two, strict=True)):
        for column in ("loss", *COLUMNS):
            assert shared[column] == pytest.approx(alone[column], abs=1e-4), (step, column)
    assert one[-1]["loss/preference"] < one[0]["loss/preference"] - 0.1
    assert card_of_two["held_out"]["drift_nats"] == pytest.approx(card["held_out"]["drift_nats"], abs=1e-2)
