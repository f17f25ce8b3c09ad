"""The fused MLP against the library's own under PEFT's layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bapo.training.fused_mlp import FusedMlp, fuse_mlps
from bapo.training.lora_linear import FusedLoraLinear
from tests.tiny import byte_tokenizer, tiny_model

TARGETS = {
    "every layer": "all-linear",
    "the last transformer layer": [f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")],
    "not all of the MLP": ["gate_proj", "down_proj"],
}


def both(targets):
    """MLPs, one per transformer layer, under the same random adapter: as the library has them, and fused."""
    found = []
    for fused in (False, True):
        model = tiny_model("llama", byte_tokenizer("llama")).double()
        lora = LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
        if fused:
            fuse_mlps(model)
            lora._register_custom_module({nn.Linear: FusedLoraLinear})
        policy = get_peft_model(model, lora)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(policy.named_parameters()):
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.3
        found.append([layer.mlp for layer in policy.get_decoder().layers])
    assert all(isinstance(mlp, FusedMlp) for mlp in found[1])
    return found


@pytest.mark.parametrize("targets", TARGETS)
def test_values_and_gradients_equal_the_librarys(targets):
    plain, fused = both(TARGETS[targets])
    upstream = torch.randn(2, 5, 32, dtype=torch.float64)
    for theirs, ours in zip(plain, fused, strict=True):
        results = []
        for mlp in (theirs, ours):
            torch.manual_seed(1)
            x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
            out = mlp(x)
            (out * upstream).sum().backward()
            trained = {name: p.grad for name, p in mlp.named_parameters() if p.requires_grad}
            results.append({"out": out.detach(), "x": x.grad, **trained})
        assert results[0].keys() == results[1].keys()
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, rtol=0, atol=1e-10, msg=name)


def test_an_input_that_needs_no_gradient_gets_none_and_the_adapter_gets_its_own():
    plain, fused = both("all-linear")
    x = torch.randn(3, 32, dtype=torch.float64)
    for mlp in (plain[0], fused[0]):
        mlp(x).sum().backward()
    for (name, ours), theirs in zip(fused[0].named_parameters(), plain[0].parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


def test_other_mlps_are_left_alone():
    for architecture in ("gemma", "phi3"):
        model = tiny_model(architecture, byte_tokenizer(architecture))
        before = [type(layer.mlp) for layer in model.model.layers]
        fuse_mlps(model)
        assert [type(layer.mlp) for layer in model.model.layers] == before
