"""What runs on CUDA alone, against the CPU or against stock PEFT there. By hand, on a machine that has a device:

    BAPO_TEST_CUDA=1 python -m pytest -v tests/test_cuda.py

Other tests compare with float32 on the CPU, and see no device.
"""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from bapo.adapters import AdapterStore
from bapo.inference.base import load_base
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.engine import LocalEngine
from bapo.inference.policies import Policies
from bapo.inference.scoring import policy_logps, response_logps
from bapo.training.plan import TrainingPlan
from bapo.training.run import run
from tests.test_packing import ROLES, apart, gradients, packed, policy_of, rows_of
from tests.tiny import ARCHITECTURES, byte_tokenizer, logps_apart, make_adapter, tiny_model, write_pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and BAPO_TEST_CUDA=1")

WIDTH = 128  # of the models: flex attention wants heads of 16 numbers, nf4 blocks of 64
PROMPT = list(range(40, 60))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every model compiles flex attention for its own shapes, of which torch keeps but a few."""
    torch._dynamo.reset()


@pytest.fixture
def folder(architecture, tmp_path):
    tokenizer = byte_tokenizer(architecture)
    for part in (tiny_model(architecture, tokenizer, width=WIDTH), tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base(folder, settings, monkeypatch):
    """The base in float32 on the device, where numbers can be compared closely."""
    monkeypatch.setattr(
        "bapo.inference.base.load_arguments", lambda *args: {"dtype": torch.float32, "device_map": {"": 0}}
    )
    return load_base(replace(settings, base=str(folder)))


@pytest.fixture
def store(base, settings):
    """Two adapters of the base, of different ranks."""
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    for seed, method in enumerate(("dpo", "bapo")):
        make_adapter(base, store, "P2A", method, seed, rank=2 + seed)
    return store


def test_a_packed_pass_equals_its_triples_on_the_cpu(base, norms_in_double):
    """Loss, log-probs and gradients: flex attention in float32 against padded triples in float64."""
    policy = policy_of(base)
    twin = copy.deepcopy(policy).cpu().double()
    # The second length takes Phi-3 beyond its short rotary factors, and all beyond one block of flex attention.
    for rows in (rows_of([4, 1, 2], [6, 11, 3, 1, 14]), rows_of([2], [30, 261, 140, 263, 70])):
        (loss, logps), (twin_loss, twin_logps) = packed(policy, rows), apart(twin, rows)
        assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-4)
        for role, one, other in zip(ROLES, logps, twin_logps, strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-3, msg=role)
        own, others = gradients(policy, loss), gradients(twin, twin_loss)
        largest = max(gradient.abs().max().item() for gradient in others.values())
        for name, gradient in own.items():
            close = {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(gradient.cpu().double() / largest, others[name] / largest, **close, msg=name)


def test_policies_score_as_stock_peft_does(base, store, settings):
    chosen = [None, *map(store.named, ("P2A-dpo", "P2A-bapo"))]
    responses = [[9, 8, 7], [33], list(range(60, 200))]
    plain = copy.deepcopy(base.model)
    found = policy_logps(Policies(base, 2**20, settings.cache), chosen, PROMPT, responses)
    expected = [logps_apart(under(one, plain), PROMPT, responses) for one in chosen]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-3)


def under(adapter, plain):
    """The base as it is, or with an adapter by stock PEFT."""
    model = copy.deepcopy(plain)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter.folder, torch_device="cuda")


@pytest.fixture
def repeated(monkeypatch):
    """Grows with every step that a CUDA graph takes."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: found.append(1) or replay(self))
    return found


def test_recorded_steps_decode_as_the_model_does(base, store, settings, caplog, repeated):
    """Base, two adapters, and two rows that follow the base."""
    base.stop_ids = frozenset()
    plain = copy.deepcopy(base.model)
    adapters = [None, *map(store.named, ("P2A-dpo", "P2A-bapo"))]
    rows = [*map(Row, adapters), *(Row(one, 0) for one in adapters[1:])]
    policies = Policies(base, 2**20, settings.cache)
    steps = list(decode(policies, PROMPT, rows, Sampling(max_new_tokens=50)))
    assert not caplog.records and len(repeated) >= 48
    for row, one in enumerate([*adapters, *adapters[1:]]):
        own = [step[row].token_id for step in steps]
        expected = logps_apart(under(one, plain), PROMPT, [own])[0].item()
        assert sum(step[row].logp for step in steps) == pytest.approx(expected, abs=1e-2)
        if row < len(adapters):
            assert own == greedy(under(one, plain), len(own))


@pytest.mark.parametrize("architecture", ["phi3"])
def test_a_recorded_step_changes_the_rotary_factors_where_the_model_does(base, store, settings, caplog, repeated):
    """Beyond 256 positions: longrope chooses by the position, which in a graph is a tensor."""
    base.stop_ids = frozenset()
    rows = [Row(None), Row(store.named("P2A-dpo")), Row(store.named("P2A-bapo"), 0)]
    policies, found = Policies(base, 2**20, settings.cache), []
    for _ in range(2):
        found.append(list(decode(policies, PROMPT * 12, rows, Sampling(max_new_tokens=40))))
        policies._step = None
    assert not caplog.records and len(repeated) >= 38
    for ours, plain in zip(*found, strict=True):
        assert [token.token_id for token in ours] == [token.token_id for token in plain]
        assert [token.logp for token in ours] == pytest.approx([token.logp for token in plain], abs=1e-3)


@torch.no_grad()
def greedy(model, count):
    """So many tokens after the prompt, without a cache."""
    ids = torch.tensor([PROMPT], device="cuda")
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_training_learns_and_its_adapter_is_served(folder, settings, tmp_path, precision):
    """From the file of pairs to an answer, with the precisions that a device is given."""
    at = replace(settings, base=str(folder), precision=precision)
    base = load_base(at)
    assert base.numerics == {"bf16": "bfloat16", "nf4": "nf4"}[precision]
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    plan = TrainingPlan(
        preference="mine", pairs=str(pairs), learning_rate=1e-2, epochs=6, batch_size=8, held_out_share=0.2
    )
    told = []
    run(plan, base, store, at, told.append, probes=["question 3"])
    losses = [progress.metrics["loss/preference"] for progress in told if progress.metrics]
    assert all(progress.observation.answers for progress in told if progress.observation)
    assert losses[0] == pytest.approx(0.693, abs=0.3) and sum(losses[-4:]) / 4 < 0.3 * losses[0]
    adapter = store.named("mine-bapo")
    assert adapter.card.held_out.reward_accuracy == 1.0
    engine = LocalEngine(load_base(at), store, at)
    steps = list(engine.decode("question 3", [None, adapter], [None, None], Sampling(max_new_tokens=20)))
    assert len(steps) > 1
    responses = [[9, 8, 7, 6], [33, 34]]
    found = torch.tensor(engine.score("question 3", responses, [None, adapter]))
    fresh = load_base(at)
    prompt = fresh.encode_prompt("question 3")
    expected = [response_logps(fresh.model, fresh.model, prompt, responses)]
    policy = PeftModel.from_pretrained(fresh.model, adapter.folder, torch_device="cuda")
    expected.append(response_logps(policy, policy, prompt, responses))
    torch.testing.assert_close(found, torch.stack(expected).cpu(), rtol=0.05, atol=0.1)
    assert (expected[1] - expected[0]).abs().max() > 1, "the adapter changes what is compared"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param
