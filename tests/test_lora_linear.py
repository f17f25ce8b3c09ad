"""The fused LoRA layer against PEFT's own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bapo.training.lora_linear import FusedLoraLinear, live_rows


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=False), nn.Linear(20, 7, bias=True)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def both(dtype=torch.float64):
    """The same random adapter in PEFT's layers and in ours."""
    torch.manual_seed(0)
    plain = Two().to(dtype)
    fused = copy.deepcopy(plain)
    models = []
    for model, classes in ((plain, {}), (fused, {nn.Linear: FusedLoraLinear})):
        lora = LoraConfig(r=3, lora_alpha=12, target_modules=["first", "second"])
        if classes:
            lora._register_custom_module(classes)
        models.append(get_peft_model(model, lora))
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
            models[1].get_parameter(name).data.copy_(parameter.data)
    assert isinstance(models[1].base_model.model.first, FusedLoraLinear)
    assert not isinstance(models[0].base_model.model.first, FusedLoraLinear)
    return models


@pytest.mark.parametrize("without", [[], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_values_and_gradients_equal_pefts(without):
    """Also where the loss does not depend on some positions, of which the way back is left out."""
    plain, fused = both()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 7, dtype=torch.float64)
    upstream[:, without] = 0
    values, grads = [], []
    for model in (plain, fused):
        x.grad = None
        out = model(x)
        (out * upstream).sum().backward()
        values.append(out.detach())
        grads.append([x.grad.clone(), *(p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad)])
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)
    assert len(grads[0]) == len(grads[1]) == 5
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_counts_as_a_gradient():
    rows = torch.zeros(7, 3)
    rows[1, 2], rows[3, 0], rows[4, 1], rows[6, 2] = 1e-38, torch.nan, -torch.inf, -1e-45
    assert live_rows(rows).tolist() == [1, 3, 4, 6]
    assert live_rows(torch.zeros(7, 2), rows).tolist() == [1, 3, 4, 6], "in any of them"
    assert live_rows(torch.ones(7, 2), rows) is None
    assert live_rows(torch.zeros(7, 2)).tolist() == []


@pytest.mark.parametrize("state", ["disabled", "merged", "half"])
def test_everything_else_takes_pefts_way(state):
    plain, fused = both(torch.bfloat16 if state == "half" else torch.float64)
    x = torch.randn(4, 12, dtype=next(plain.base_model.model.first.base_layer.parameters()).dtype)
    outputs = []
    for model in (plain, fused):
        if state == "merged":
            model.merge_adapter()
        with torch.no_grad():
            if state == "disabled":
                with model.disable_adapter():
                    outputs.append(model(x))
            else:
                outputs.append(model(x))
    assert torch.equal(*outputs)
