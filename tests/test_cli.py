"""The command line: one JSON object on stdout, sentences on stderr, and the real base behind it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from peft import PeftModel

from bapo.cli import _printable, main
from bapo.inference.base import EMBEDDED, load_base
from bapo.settings import REPOSITORY, Settings
from tests.tiny import logps_apart, make_adapter, needs_shared

PROMPT = "Why do leaves change colour in autumn?"


def bapo(*arguments, **environment):
    """Run the command as a user would, in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, "-m", "bapo", *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def tiny_environment(tiny_folders, settings, monkeypatch):
    """The command line over a tiny base, with P2A adapters; returns the adapters' folder."""
    from bapo.adapters import AdapterStore

    monkeypatch.setenv("BAPO_BASE", str(tiny_folders["llama"]))
    monkeypatch.setenv("BAPO_CACHE", str(settings.cache))
    monkeypatch.setenv("BAPO_ADAPTERS", str(settings.adapters))
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    for seed, method in enumerate(("dpo", "bapo")):
        make_adapter(base, store, "P2A", method, seed)
    return store.folder


def test_compare_prints_one_json_object_and_nothing_else():
    done = bapo("compare", PROMPT, "--preference", "P2A", "--max-new-tokens", "24", "--json", BAPO_BASE=EMBEDDED)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [policy["name"] for policy in printed["policies"]] == ["base", "dpo", "bapo"]
    for policy in printed["policies"]:
        assert policy["text"].strip()
        assert 1 <= policy["tokens"] <= 24
        assert policy["tokens_per_second"] > 0
        assert policy["logps"] < 0
    assert printed["drift"].keys() == {"dpo", "bapo"}
    for drift in printed["drift"].values():
        assert drift["per_token"] == pytest.approx(drift["nats"] / printed["policies"][0]["tokens"])
    assert (printed["base"], printed["preference"]) == (EMBEDDED, "P2A")
    assert printed["seconds"] > 0


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """`bapo score` on real pairs of strangers, with the shipped literature adapters."""
    source = needs_shared("dsp.jsonl")
    file = tmp_path_factory.mktemp("score") / "pairs.jsonl"
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        responses = row["responses"]
        if max(map(len, responses.values())) < 700:
            rows += [
                {"prompt": row["prompt"], "chosen": responses["literature"], "rejected": responses[other]}
                for other in ("academy", "normal")
            ]
        if len(rows) == 16:
            break
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = bapo("score", "--pairs", str(file), "--preference", "literature", "--json", BAPO_BASE=EMBEDDED)
    assert done.returncode == 0, done.stderr
    return rows, json.loads(done.stdout)


def test_bapo_drifts_less_than_dpo_on_strangers_pairs(scored):
    rows, printed = scored
    assert [pair["prompt"] for pair in printed["pairs"]] == [row["prompt"] for row in rows]
    assert printed["drift"]["dpo"]["nats"] - printed["drift"]["bapo"]["nats"] >= 5
    wins = sum(
        pair["chosen"]["dpo"] - pair["chosen"]["base"] > pair["rejected"]["dpo"] - pair["rejected"]["base"]
        for pair in printed["pairs"]
    )
    assert printed["reward_accuracy"]["dpo"] == pytest.approx(wins / len(rows))


def test_scores_of_the_shipped_adapters_equal_stock_peft(scored, real_base):
    rows, printed = scored
    import copy

    row, pair = rows[0], printed["pairs"][0]
    prompt = real_base.encode_prompt(row["prompt"])
    responses = [real_base.encode_response(row["prompt"], row[role]) for role in ("chosen", "rejected")]
    assert responses[0][-1] == real_base.end_of_turn
    plain = copy.deepcopy(real_base.model)
    under = {"base": logps_apart(plain, prompt, responses).tolist()}
    folder = REPOSITORY / "adapters" / EMBEDDED
    policy = PeftModel.from_pretrained(plain, folder / "literature-dpo", adapter_name="dpo").eval()
    policy.load_adapter(folder / "literature-bapo", adapter_name="bapo", torch_device="cpu")
    for method in ("dpo", "bapo"):
        policy.set_adapter(method)
        under[method] = logps_apart(policy, prompt, responses).tolist()
    for i, role in enumerate(("chosen", "rejected")):
        for name, values in under.items():
            assert pair[role][name] == pytest.approx(values[i], abs=5e-3)


def test_compare_in_words(tiny_environment, capsys):
    assert main(["compare", "why?", "--preference", "P2A", "--max-new-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert [line.split(" ")[1] for line in output.splitlines() if line.startswith("──")] == ["base", "dpo", "bapo"]


def test_control_characters_of_the_model_do_not_reach_the_terminal():
    assert _printable("a\x1b[31mb\x07\n\tc é") == "a[31mb\n\tc é"


def test_temperature_and_seed_decide_the_answer(tiny_environment, capsys):
    def text(seed):
        command = ["compare", "why?", "--preference", "P2A", "--max-new-tokens", "8", "--temperature", "1", "--json"]
        assert main([*command, "--seed", str(seed)]) == 0
        return [policy["text"] for policy in json.loads(capsys.readouterr().out)["policies"]]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_train_writes_an_adapter_that_compare_uses(tiny_environment, tmp_path, capsys):
    pairs = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    command = ["train", "--preference", "mine", "--method", "dpo", "--pairs", str(pairs), "--epochs", "1", "--json"]
    assert main([*command, "--lambda", "2", "--held-out-share", "0.25"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["preference"], card["method"], card["hyperparameters"]["lambda_"]) == ("mine", "dpo", 2)
    assert main(["compare", "why?", "--preference", "mine", "--max-new-tokens", "4", "--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)["policies"]] == ["base", "dpo"]
    assert main(command) == 2
    assert "Add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_pairs_check_reports_and_fails_on_faults(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}')
    assert main(["pairs", "check", str(file)]) == 2
    assert (
        "pairs.jsonl: 1 pairs of 1 prompts, 1 problems\n  row 2, column 'rejected': is missing"
        in capsys.readouterr().out
    )
    assert main(["pairs", "check", str(file), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == [
        {"row": 2, "column": "rejected", "expected": "is missing"}
    ]
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}')
    assert main(["pairs", "check", str(file)]) == 0


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["compare", "", "--preference", "P2A"], "prompt is empty"),
        (["compare", "why?", "--preference", "P1B"], "no adapter for the preference 'P1B'"),
        (["compare", "why?", "--preference", "P2A", "--temperature", "9"], "temperature must lie"),
        (["compare", "why?", "--preference", "P2A", "--base", "nowhere"], "There is no base 'nowhere'"),
        (["score", "--pairs", "absent.jsonl", "--preference", "P2A"], "absent.jsonl does not exist"),
        (["train", "--preference", "mine"], "--pairs FILE"),
        (["train", "--preference", "P2A", "--method", "ppo"], "no method 'ppo'"),
    ],
)
def test_what_a_user_can_put_right_is_a_sentence(tiny_environment, capsys, command, sentence):
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("bapo: ")
    assert sentence in captured.err


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BAPO_PORT", "http", "whole number"),
        ("BAPO_PRECISION", "int4", "'nf4' or 'bf16'"),
        ("BAPO_PORT", "-1", "1 or more"),
    ],
)
def test_settings_that_make_no_sense(monkeypatch, capsys, name, value, sentence):
    monkeypatch.setenv(name, value)
    assert main(["fetch"]) == 2
    assert sentence in capsys.readouterr().err


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BAPO_CACHE", str(tmp_path))
    monkeypatch.setenv("BAPO_PORT", "8000")
    settings = Settings.from_environment()
    assert (settings.cache, settings.port, settings.precision) == (tmp_path, 8000, "nf4")
