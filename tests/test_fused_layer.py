"""The fused decoder layer against the library's own under PEFT's layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from bapo.training import fused_layer, lora_linear
from bapo.training.fused_layer import FusedLayer, _GatedMlp, fuse_layers
from bapo.training.lora_linear import FusedLoraLinear, live_rows
from tests.tiny import byte_tokenizer, tiny_model

TARGETS = {
    "every layer": "all-linear",
    "the last transformer layer": r".*layers\.1\..*_proj",
    "the attention alone": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "not all of the attention": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
}


pytestmark = pytest.mark.usefixtures("norms_in_double")


def both(targets):
    """Decoders under the same random adapter: as the library has them, and fused."""
    found = []
    for fused in (False, True):
        model = tiny_model("llama", byte_tokenizer("llama")).double()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones when fresh
                parameter.data = torch.rand(parameter.shape, generator=generator).double() + 0.5
        lora = LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
        if fused:
            fuse_layers(model)
            lora._register_custom_module({nn.Linear: FusedLoraLinear})
        policy = get_peft_model(model, lora)
        for _, parameter in sorted(policy.named_parameters()):
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.3
        found.append(policy.get_decoder())
    assert all(type(layer) is FusedLayer for layer in found[1].layers)
    return found


def results(decoder, embeddings, without=(), **inputs):
    """The output, and the gradients of a loss on which the positions `without` have no influence."""
    torch.manual_seed(2)
    out = decoder(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state
    upstream = torch.randn(out.shape, dtype=out.dtype)
    upstream[:, list(without)] = 0
    (out * upstream).sum().backward()
    trained = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    return {"out": out.detach(), **trained}


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("targets", TARGETS)
def test_values_and_gradients_equal_the_librarys(targets, monkeypatch):
    calls = []
    monkeypatch.setattr(_GatedMlp, "apply", lambda *inputs, apply=_GatedMlp.apply: calls.append(1) or apply(*inputs))
    plain, fused = both(TARGETS[targets])
    every = []
    for decoder in (plain, fused):
        torch.manual_seed(1)
        embeddings = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        every.append(results(decoder, embeddings, attention_mask=mask) | {"embeddings": embeddings.grad})
    assert_alike(every[1], every[0])
    assert len(calls) == {"every layer": 2, "the last transformer layer": 1}.get(targets, 0)


def test_an_input_that_needs_no_gradient_gets_none_and_the_adapter_gets_its_own():
    plain, fused = both("all-linear")
    embeddings = torch.randn(1, 6, 32, dtype=torch.float64)
    assert_alike(results(fused, embeddings), results(plain, embeddings))


def test_rows_without_a_gradient_are_left_out(monkeypatch):
    """Causal attention: the last two of six positions get none in any layer; the first gets its own through the others
    in the first layer alone."""
    taken = []

    def spied(*upstreams):
        rows = live_rows(*upstreams)
        taken.append(torch.arange(len(upstreams[0]))[rows].tolist())
        return rows

    for module in (fused_layer, lora_linear):
        monkeypatch.setattr(module, "live_rows", spied)
    plain, fused = both("all-linear")
    every = []
    for decoder in (plain, fused):
        embeddings = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        embeddings.requires_grad_()
        every.append(results(decoder, embeddings, without=[0, 4, 5]) | {"embeddings": embeddings.grad})
    assert_alike(every[1], every[0])
    assert (every[1]["embeddings"][:, 4:] == 0).all()
    late, early = [[1, 2, 3]] * 2, [[0, 1, 2, 3]]
    assert taken == late + early * 4, "MLP, output, then query with keys and values, of the last layer first"


def test_a_loss_that_depends_on_nothing_gives_zeros():
    _, fused = both("all-linear")
    embeddings = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    found = results(fused, embeddings, without=range(4))
    assert all((gradient == 0).all() for name, gradient in found.items() if name != "out")
    assert (embeddings.grad == 0).all()


def test_going_back_twice_is_refused_as_the_first_time_writes_over_what_was_kept():
    _, fused = both("all-linear")
    out = fused(inputs_embeds=torch.randn(1, 4, 32, dtype=torch.float64), use_cache=False).last_hidden_state
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_pass_that_has_not_gone_back_yet_keeps_what_it_needs():
    """Two passes, then both ways back: the first must not find what the second has kept."""
    plain, fused = both("all-linear")
    every = []
    for decoder in (plain, fused):
        generator = torch.Generator().manual_seed(3)
        inputs = [torch.randn(1, length, 32, dtype=torch.float64, generator=generator) for length in (6, 5)]
        outs = [decoder(inputs_embeds=one, use_cache=False).last_hidden_state for one in inputs]
        sum(out.square().sum() for out in outs).backward()
        every.append({name: p.grad for name, p in decoder.named_parameters() if p.requires_grad})
    assert_alike(every[1], every[0])


def test_a_cache_takes_the_librarys_way():
    plain, fused = both("all-linear")
    embeddings = torch.randn(1, 6, 32, dtype=torch.float64)
    outs = []
    for decoder in (plain, fused):
        cache = DynamicCache(config=decoder.config)
        for token in embeddings.split(1, dim=1):
            out = decoder(inputs_embeds=token, past_key_values=cache, use_cache=True).last_hidden_state
        outs.append(out)
        assert cache.get_seq_length() == 6
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["gemma", "phi3"])
def test_other_layers_are_left_alone(architecture):
    model = tiny_model(architecture, byte_tokenizer(architecture))
    before = [type(layer) for layer in model.model.layers]
    fuse_layers(model)
    assert [type(layer) for layer in model.model.layers] == before
