"""Fixtures: tiny bases loaded through the app's own code, an engine over each, and the embedded base."""

import os
from dataclasses import replace
from pathlib import Path

# Before torch is imported: the tests compare with float32 on the CPU, also where there is a GPU. But see test_cuda.py.
if "BAPO_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import transformers.models.gemma.modeling_gemma as gemma
import transformers.models.llama.modeling_llama as llama
import transformers.models.phi3.modeling_phi3 as phi3

from bapo.adapters import AdapterStore
from bapo.inference.base import EMBEDDED, Base, load_base
from bapo.inference.engine import LocalEngine
from bapo.settings import Settings
from tests.tiny import ARCHITECTURES, byte_tokenizer, make_adapter, tiny_model


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """architecture → folder of a saved tiny model."""
    folders = {}
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp("bases") / f"tiny-{architecture}"
        tokenizer = byte_tokenizer(architecture)
        tiny_model(architecture, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[architecture] = folder
    return folders


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(cache=tmp_path / "cache", adapters=tmp_path / "adapters")


@pytest.fixture
def norms_in_double(monkeypatch):
    """These architectures run their norms in float32 whatever the model: too coarse to compare gradients by."""

    def plain(self, states):
        gain = 1.0 + self.weight if isinstance(self, gemma.GemmaRMSNorm) else self.weight
        epsilon = self.eps if isinstance(self, gemma.GemmaRMSNorm) else self.variance_epsilon
        return gain * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)

    for norm in (llama.LlamaRMSNorm, phi3.Phi3RMSNorm, gemma.GemmaRMSNorm):
        monkeypatch.setattr(norm, "forward", plain)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def tiny_base(tiny_folders, architecture, settings) -> Base:
    """A freshly loaded tiny base; once per architecture."""
    return load_base(replace(settings, base=str(tiny_folders[architecture])))


@pytest.fixture
def llama_base(tiny_folders, settings) -> Base:
    return load_base(replace(settings, base=str(tiny_folders["llama"])))


@pytest.fixture
def tiny_engine(tiny_base, settings) -> LocalEngine:
    """A tiny base with P2A and literature adapters, DPO and BAPO each."""
    store = AdapterStore(settings.adapters, tiny_base.name, tiny_base.fingerprint)
    for seed, (preference, method) in enumerate(
        [("P2A", "dpo"), ("P2A", "bapo"), ("literature", "dpo"), ("literature", "bapo")]
    ):
        make_adapter(tiny_base, store, preference, method, seed, rank=2 + seed)
    return LocalEngine(tiny_base, store, settings)


@pytest.fixture(scope="session")
def real_base() -> Base:
    """The embedded base, from the user's cache (fetched if it is not there)."""
    return load_base(replace(Settings(), base=EMBEDDED))
