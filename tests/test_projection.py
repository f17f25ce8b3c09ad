"""x Wᵀ by whatever library: views, rows that are not neighbours, and types that oneDNN does not take."""

import pytest
import torch

from bapo.inference import projection
from bapo.inference.projection import project

VIEWS = {
    "whole": lambda x, weight: (x, weight),
    "some rows of both": lambda x, weight: (x[3:40:2], weight[7:31]),
    "some columns": lambda x, weight: (x[:, 10:60], weight[:, 10:60]),
    "transposed": lambda x, weight: (x[:, :50], weight[:, :30].T),
    "one row": lambda x, weight: (x[:1], weight),
    "no row": lambda x, weight: (x[:0], weight),
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_product_is_that_of_the_definition(view, library, monkeypatch):
    if not library:
        monkeypatch.setattr(projection, "LINEAR", None)
    elif projection.LINEAR is None:
        pytest.skip("this build of torch has no oneDNN")
    whole = torch.randn(70, 96, dtype=torch.float64), torch.randn(50, 96, dtype=torch.float64)
    x, weight = view(*whole)
    expected = torch.einsum("mk,nk->mn", x, weight)
    torch.testing.assert_close(project(x, weight), expected)
    x, weight = view(*(one.float() for one in whole))
    torch.testing.assert_close(project(x, weight), expected.float(), rtol=1e-4, atol=1e-4)
