"""Every row's logits are those of plain transformers + PEFT with that adapter alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.activations import GELUTanh

from bapo.adapters import WEIGHTS, AdapterStore, Mix
from bapo.errors import BapoError
from bapo.inference.base import load_base
from bapo.inference.kernels import LARGEST_WEIGHT, SHARES, attend, gate, multiply, normalise
from bapo.inference.lora_weights import read_lora
from bapo.inference.mixed_lora import MixedLinear, MixedModel
from bapo.inference.policies import Policies
from bapo.inference.products import (
    COMPACT,
    EXACT_WAYS,
    FEW,
    LINEAR,
    MANY,
    ONE_PASS,
    SEVERAL,
    TRANSPOSED,
    Lora,
    Product,
    choose_ways,
)
from bapo.inference.roomy_cache import roomy_cache
from bapo.inference.scoring import policy_logps
from tests.tiny import logps_apart, make_adapter

PROMPT = [5, 17, 3, 80, 41, 9]
STEPS = [[7, 8, 9, 10, 11, 12], [60, 50, 40, 30, 20, 10], [1, 2, 3, 4, 5, 6]]  # one token for each of six rows
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def fresh(tiny_folders, architecture, settings, dtype):
    """A base that nothing was put into, in a dtype."""
    base = load_base(replace(settings, base=str(tiny_folders[architecture])))
    base.model.to(dtype)
    return base


def plain_logits(base, folder, ids, dtype):
    model = base.model
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).to(dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    if folder is not None:
        model.unload()
    return logits


def take_ways(policies, *ways):
    """Let the model's products take these ways in turn, whatever the number of rows."""
    for number, layer in enumerate(policies._model.layers):
        if way := ways[number % len(ways)]:
            if way == COMPACT:
                layer.product.make_compact()
            layer.product.exact_ways = layer.product.ways = [way] * (MANY + 1)


@pytest.mark.parametrize(
    ("dtype", "way"), [(torch.float32, ONE_PASS), (torch.float32, TRANSPOSED), (torch.float64, None)]
)
def test_rows_equal_plain_peft_through_prefill_decoding_and_leaving(
    tiny_engine, tiny_folders, architecture, settings, dtype, way
):
    store = tiny_engine.store
    names = [None, "P2A-dpo", "literature-bapo", None, "P2A-dpo", "literature-dpo"]  # ranks 2, 5 and 4, none, repeats
    base = fresh(tiny_folders, architecture, settings, dtype)
    policies = Policies(base, 2**20, settings.cache, exact=True)
    take_ways(policies, way)
    rows = policies.gather([name and store.named(name) for name in names])
    staying = [0, 1, 2, 3, 4, 5]
    sequences = [list(PROMPT) for _ in names]
    cache = roomy_cache(base.model, 20)
    with torch.inference_mode():
        found = [policies.forward(rows, input_ids=torch.tensor(sequences), past_key_values=cache).logits]
        for step, tokens in enumerate(STEPS):
            if step == 1:
                staying = [5, 2, 0]  # rows leave, and the others change places
                cache.batch_select_indices(torch.tensor(staying))
                rows = rows.select(staying)
            for row in staying:
                sequences[row].append(tokens[row])
            ids = torch.tensor([tokens[row] for row in staying])
            found.append(policies.step(rows, True, ids, cache)[:, None])
    assert (policies._step is not None) == (dtype == torch.float32), "in float64 every step is transformers' own"
    if policies._step:
        assert (policies._step._in_one_pass(6, True) is not None) == (way == ONE_PASS), "or it is written out twice"
    plain = fresh(tiny_folders, architecture, settings, dtype)
    for row, name in enumerate(names):
        expected = plain_logits(plain, name and store.folder / name, sequences[row], dtype)
        own = [found[0][row], found[1][row]] + [part[staying.index(row)] for part in found[2:] if row in staying]
        torch.testing.assert_close(torch.cat(own), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("ways", "tolerance"),
    # Where inputs are rounded to integers, their last bit decides which integer is the nearest.
    [((ONE_PASS,), 1e-4), ((COMPACT,), 1e-3), ((ONE_PASS, COMPACT, COMPACT, ONE_PASS), 1e-3)],
)
def test_the_layers_in_one_call_equal_the_layers_one_by_one(tiny_engine, settings, ways, tolerance, monkeypatch):
    policies = Policies(tiny_engine.base, 2**20, settings.cache)
    take_ways(policies, *ways)
    chosen = [None, *tiny_engine.store.adapters()]
    tokens, found = torch.tensor([7, 8, 9, 10, 11]), []
    for one_call in (True, False):
        if not one_call:
            monkeypatch.setattr(policies._step, "_in_one_pass", lambda rows, exact: None)
        with torch.inference_mode():
            rows, _, cache = policies.prefill(chosen, PROMPT, 10)
            assert (policies._step._in_one_pass(5, False) is not None) == one_call
            steps = [policies.step(rows, False, tokens + step, cache) for step in range(4)]
        found.append(torch.stack(steps))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)
    assert (found[0][:, 0] - found[0][:, 1]).abs().max() > 0.1, "the adapter must change something"


@pytest.mark.parametrize(
    "leaders", [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 3, 4], [0, 0, 2, 3, 4], [0, 0, 1, 3, 3], None]
)
def test_rows_that_follow_are_computed_once_before_the_first_adapted_layer(tiny_base, settings, leaders):
    store = AdapterStore(settings.adapters, tiny_base.name, tiny_base.fingerprint)
    for seed, method in enumerate(("dpo", "bapo")):
        make_adapter(tiny_base, store, "late", method, seed, layers=[1])
    policies = Policies(tiny_base, 2**20, settings.cache, exact=True)
    chosen = [None, *(store.named(name) for name in ("late-dpo", "late-bapo", "late-dpo", "late-bapo"))]
    found = []
    for given in (leaders, [0, 1, 2, 3, 4]):
        fed = torch.tensor([[7, 8, 9, 10, 11], [30, 20, 10, 5, 4], [1, 2, 3, 4, 5]])[:, leaders or [0, 1, 2, 3, 4]]
        with torch.inference_mode():
            rows, _, cache = policies.prefill(chosen, PROMPT, 10)
            logits = [policies.step(rows, True, tokens, cache, given) for tokens in fed]
            staying = [0, 1, 3]  # and now nobody says who follows whom: the cache must be whole
            cache.batch_select_indices(torch.tensor(staying))
            logits.append(policies.step(rows.select(staying), True, fed[0][staying], cache))
        found.append(logits)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (found[0][0][0] - found[0][0][3]).abs().max() > 0.1, "row 3 has an adapter, even where it follows row 0"


def test_the_longest_context(tiny_engine, tiny_folders, architecture, settings):
    base = tiny_engine.base
    longest = base.model.config.max_position_embeddings
    ids = [(7 * i) % 97 for i in range(longest)]
    policies = Policies(base, 2**20, settings.cache, exact=True)
    cache = roomy_cache(base.model, longest)
    with torch.inference_mode():
        rows = policies.gather([tiny_engine.store.named("P2A-dpo")])
        policies.forward(rows, input_ids=torch.tensor([ids[:-2]]), past_key_values=cache)
        for token in ids[-2:]:
            last = policies.step(rows, True, torch.tensor([token]), cache)[0]
    plain = fresh(tiny_folders, architecture, settings, torch.float32)
    expected = plain_logits(plain, tiny_engine.store.folder / "P2A-dpo", ids, torch.float32)[-1]
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-4)


def test_a_mix_equals_the_merged_weights(tiny_engine, tiny_folders, architecture, settings):
    store, weights = tiny_engine.store, {"P2A-dpo": 0.7, "literature-bapo": -0.4, "literature-dpo": 0.2}
    mix = Mix(tuple((store.named(name), weight) for name, weight in weights.items()))
    ids = torch.tensor([PROMPT] * 3)
    with torch.inference_mode():
        policies = tiny_engine._policies
        mixed = policies.forward(policies.gather([None, mix, store.named("P2A-bapo")]), input_ids=ids).logits[1]
    merged = fresh(tiny_folders, architecture, settings, torch.float32).model
    with torch.no_grad():
        for name, weight in weights.items():
            lora = read_lora(store.folder / name, torch.float32, merged.device)
            for module, (a, b) in lora.matrices.items():
                merged.get_submodule(module).weight += weight * (a.T @ b).T
        expected = merged(input_ids=ids[:1]).logits[0]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-4)


def test_scoring_under_many_policies_at_once_equals_one_by_one(tiny_engine, tiny_folders, architecture, settings):
    store = tiny_engine.store
    responses = [[7, 8, 9, 4], [60], [3, 3, 3, 3, 3, 3, 3]]
    policies = [store.named("literature-dpo"), None, Mix(((store.named("P2A-dpo"), 1.0),))]
    together = policy_logps(tiny_engine._policies, policies, PROMPT, responses)
    assert together.shape == (3, 3)
    for row, name in enumerate(("literature-dpo", None, "P2A-dpo")):
        base = fresh(tiny_folders, architecture, settings, torch.float32)
        model = PeftModel.from_pretrained(base.model, store.folder / name).eval() if name else base.model
        torch.testing.assert_close(together[row], logps_apart(model, PROMPT, responses), rtol=0, atol=1e-3)


def test_the_base_called_directly_is_the_base(tiny_engine):
    model, ids = tiny_engine.base.model, torch.tensor([PROMPT])
    before = model(input_ids=ids).logits
    with torch.inference_mode():
        rows = tiny_engine._policies.gather([tiny_engine.store.named("P2A-dpo")])
        assert (tiny_engine._policies.forward(rows, input_ids=ids).logits - before).abs().max() > 0.1
    assert torch.equal(model(input_ids=ids).logits, before)


def test_layers_of_one_input_share_a_product(llama_base):
    layers = MixedModel.of(llama_base.model).layers
    assert sorted(len(layer.parts) for layer in layers) == [1] * 5 + [2] * 2 + [3] * 2
    assert ("model.layers.0.self_attn.k_proj", 32, 48) in layers[1].parts
    assert sum(isinstance(module, MixedLinear) for module in llama_base.model.modules()) == len(layers)


@pytest.mark.parametrize("rows", [*range(1, FEW + 1), SEVERAL - 1, SEVERAL])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("width", [50, 200])
def test_the_kernel_equals_the_product_written_plainly(rows, kind, rank, width):
    random = np.random.default_rng(rows)
    weight = (random.normal(size=(37, width)) * (1 if kind is np.float32 else 2000)).astype(kind)
    scale = random.uniform(0.5, 2, 37).astype(np.float32) / (1 if kind is np.float32 else 2000)
    x = random.integers(-32767, 32768, (rows, width)).astype(np.float32) / 2**13
    x[:, 5] = 32767 / 2**13  # as the largest it makes of all others integers that are not rounded
    a, b = (random.normal(size=(3, rank, size)).astype(np.float32) for size in (width, 37))
    places, spans = random.integers(-1, 3, rows), np.tile([0, 37], (3, rank, 1))
    if rank:  # one line of each matrix holds something in some columns only, and one nothing
        b[:, 0, :9], b[:, 0, 20:], b[:, 2], spans[:, 0], spans[:, 2] = 0, 0, 0, (9, 20), 0
    out = np.empty((rows, 37), np.float32)
    multiply(weight, scale, x, a, b, spans, places, out, 3)
    wide = x.astype(np.float64)
    expected = wide @ weight.T.astype(np.float64) * scale
    for m, place in enumerate(places):
        if place >= 0:
            expected[m] += wide[m] @ a[place].T @ b[place]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def integer_product(weight, x):
    none, nowhere = np.empty((0, 0, 0), np.float32), np.empty(0, np.int64)
    scale, out = np.ones(len(weight), np.float32), np.empty((len(x), len(weight)), np.float32)
    multiply(weight, scale, x, none, none, nowhere.reshape(0, 0, 2), nowhere, out, SHARES)
    return out


def test_the_largest_integers_do_not_overflow():
    signs = np.random.default_rng(0).choice([-1, 1], (2, 1, 1000))
    signs[0] = 1
    weight = np.concatenate([signs[0], signs[1]] * 3).astype(np.int16) * np.int16(LARGEST_WEIGHT)
    x = 3 * signs[:, 0].astype(np.float32)
    np.testing.assert_allclose(integer_product(weight, x), x @ weight.T.astype(np.float32), rtol=1e-6)


def test_what_is_no_number_is_not_hidden_by_rounding():
    weight, x = np.ones((4, 40), np.int16), np.ones((4, 40), np.float32)
    x[0], x[1, 7], x[2, 30] = 0, np.inf, np.nan
    out = integer_product(weight, x)
    assert (out[0] == 0).all() and not np.isfinite(out[1:3]).any()
    np.testing.assert_allclose(out[3], 40, rtol=1e-6)


def test_the_norm_kernel_equals_the_formula():
    x = torch.randn(5, 50)
    out = torch.empty_like(x)
    weight = torch.rand(50)
    normalise(x.numpy(), weight.numpy(), 1e-5, out.numpy())
    torch.testing.assert_close(out, x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * weight)


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, GELUTanh()])
def test_the_gate_kernel_equals_the_activation_and_stays_finite_far_out(activation):
    left, right = torch.randn(3, 50), torch.randn(3, 50)
    left[:, :6] = torch.tensor([-1e4, -100, -88.5, 88.5, 100, 1e4])
    left[0, 6] = torch.nan
    out = torch.empty(3, 50)
    gelu = isinstance(activation, GELUTanh)
    gate(torch.cat([left, right], 1).numpy(), gelu, out.numpy(), SHARES)
    torch.testing.assert_close(out, activation(left) * right, equal_nan=True)


@pytest.mark.parametrize("position", [*range(2, 11), 95])
def test_the_attention_kernel_equals_the_library(position):
    rows, groups, shared, width = 2, 2, 3, 16
    keys, values = torch.randn(2, rows, groups, position + 3, width)
    query = 3 * torch.randn(rows, groups * shared, 1, width)
    new = torch.randn(2, rows, groups, width)
    states = torch.cat([query.flatten(1), *new.flatten(2)], 1)
    still = torch.ones(rows, width), torch.zeros(rows, width)  # cosine and sine of no rotation
    starts = torch.tensor([0, 2])
    out = torch.empty(rows, groups * shared * width)
    arrays = [one.numpy() for one in (states, *still, keys, values)]
    attend(*arrays, position, starts.numpy(), 0.25, out.numpy())
    torch.testing.assert_close(torch.stack([keys[:, :, position], values[:, :, position]]), new)
    seen = (torch.arange(position + 3) >= starts[:, None]) & (torch.arange(position + 3) <= position)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, seen[:, None, None], scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.flatten(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 1, 48), (2, 3, 48), (4, 10, 48), (3, 48), (5, 60, 48)])
def test_every_way_gives_the_same_product(bias, shape):
    linear = torch.nn.Linear(48, 20, bias=bias)
    places = np.array([1, -1, 0, 1, 1])[: shape[0]]
    whole = np.tile([0, 20], (2, 2, 1))
    x, lora = torch.randn(shape), Lora(torch.randn(2, 2, 48), torch.randn(2, 2, 20), whole, places)
    product = Product(linear.weight.detach(), linear.bias.detach() if bias else None)
    with torch.no_grad():
        expected = linear(x)
        for m, place in enumerate(places):
            if place >= 0:
                expected[m] += x[m] @ lora.a[place].T @ lora.b[place]
        torch.testing.assert_close(product(x, lora), expected, rtol=0, atol=1e-4)
        for way in EXACT_WAYS:
            torch.testing.assert_close(product.by(way, x, lora), expected, rtol=0, atol=1e-4)


def test_rounded_weights_are_near_and_asked_for():
    weight = torch.randn(30, 64)
    weight[3] = 0
    product = Product(weight, None)
    product.make_compact()
    product.ways = [COMPACT] * (MANY + 1)
    x = torch.randn(3, 64)
    exact, rounded = product(x), product(x, exact=False)
    torch.testing.assert_close(exact, x @ weight.T)
    assert not torch.equal(exact, rounded)
    # Half a step of the row's largest ÷ 8191 on every weight, of ÷ 32767 on every input, and the sums' own rounding.
    of_weights = x.abs().sum(1, keepdim=True) * weight.abs().amax(1) / 8191 / 2
    of_inputs = x.abs().amax(1, keepdim=True) / 32767 / 2 * weight.abs().sum(1)
    bound = of_weights + 1.001 * of_inputs + 1e-5
    assert ((exact - rounded).abs() <= bound).all()


@pytest.mark.parametrize("settings_of_peft", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3, "down_proj": 40}}])
def test_scales_are_those_of_peft(llama_base, tmp_path, settings_of_peft):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "up_proj"], **settings_of_peft)
    model = get_peft_model(llama_base.model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    lora = read_lora(tmp_path, torch.float32, torch.device("cpu"))
    assert len(lora.matrices) == 6
    for module, (a, b) in lora.matrices.items():
        own = model.base_model.model.get_submodule(module)
        torch.testing.assert_close((a.T @ b).T, own.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_more_than_lora_is_refused_in_a_sentence(tiny_engine, settings, change, sentence):
    adapter = tiny_engine.store.named("P2A-dpo")
    file = adapter.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    policies = Policies(tiny_engine.base, 2**20, settings.cache)
    with pytest.raises(BapoError, match=f"more than LoRA on linear layers.*{sentence}"):
        policies.require([adapter])


def test_an_adapter_of_the_vocabulary_projection_is_refused(tiny_engine, settings):
    from safetensors.torch import load_file, save_file

    adapter = tiny_engine.store.named("P2A-dpo")
    size = len(tiny_engine.base.tokenizer)
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(shape) for part, shape in
            (("A", (1, 32)), ("B", (size, 1)))}  # fmt: skip
    save_file(load_file(adapter.folder / WEIGHTS) | head, adapter.folder / WEIGHTS)
    policies = Policies(tiny_engine.base, 2**20, settings.cache)
    with pytest.raises(BapoError, match="it changes lm_head, which is no linear layer of the decoder"):
        policies.require([adapter])


def test_an_adapter_of_another_shape_is_refused(tiny_engine, settings):
    from safetensors.torch import load_file, save_file

    adapter = tiny_engine.store.named("P2A-dpo")
    tensors = load_file(adapter.folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("down_proj.lora_A.weight"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, adapter.folder / WEIGHTS)
    policies = Policies(tiny_engine.base, 2**20, settings.cache)
    with pytest.raises(BapoError, match="does not fit the base: it changes .*down_proj"):
        policies.require([adapter])


def test_ways_are_timed_once_and_remembered(tmp_path, monkeypatch):
    alike = [Product(torch.randn(512, 256), None) for _ in range(2)]
    small = Product(torch.randn(8, 8), None)
    choose_ways([*alike, small], tmp_path, compact=True)
    assert alike[0].ways == alike[1].ways and len(alike[0].ways) == MANY + 1
    assert set(alike[0].ways[SEVERAL + 1 :]) <= set(EXACT_WAYS), "many rows are never rounded"
    assert set(alike[0].exact_ways) <= set(EXACT_WAYS), "where exact is asked for, nothing is rounded"
    assert small.ways == [ONE_PASS] * (FEW + 1) + [LINEAR] * (MANY - FEW)
    monkeypatch.setattr("bapo.inference.products._fastest", lambda *a: pytest.fail("timed again"))
    again = [Product(product.weight, None) for product in alike]
    choose_ways(again, tmp_path, compact=True)
    assert again[0].ways == alike[0].ways
    assert again[0].is_compact == (again[0]._compact is not None)
