"""The base: found, loaded, identified; and what is said when it cannot be."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bapo.errors import BapoError
from bapo.inference import base as base_module
from bapo.inference.base import EMBEDDED, PRESETS, default_preset, find_folder, folder_name, load_arguments, load_base
from bapo.inference.fingerprint import compute_fingerprint, fingerprint
from tests.tiny import END_OF_TURN, byte_tokenizer


def test_a_turn_ends_with_the_templates_own_token(tiny_base, architecture):
    ending = tiny_base.tokenizer.convert_tokens_to_ids(END_OF_TURN[architecture])
    assert tiny_base.end_of_turn == ending
    assert {ending, tiny_base.tokenizer.eos_token_id} <= tiny_base.stop_ids


def test_a_response_is_its_text_and_the_end_of_turn_token(tiny_base):
    ids = tiny_base.encode_response("a question", "an answer")
    assert ids[-1] == tiny_base.end_of_turn
    assert tiny_base.tokenizer.decode(ids[:-1]) == "an answer"
    whole = tiny_base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}],
        return_dict=True,
    )["input_ids"]
    start = tiny_base.encode_prompt("a question")
    assert whole[: len(start) + len(ids)] == start + ids


def test_the_base_is_frozen_and_named_without_its_path(tiny_base, architecture):
    assert tiny_base.name == f"tiny-{architecture}"
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())
    assert not tiny_base.model.training
    assert tiny_base.model.dtype == torch.float32
    assert tiny_base.cache_key == f"{tiny_base.fingerprint}-float32"
    assert folder_name(".") == Path.cwd().name


def test_gemma_ties_its_embeddings_and_phi3_fuses_its_projections(tiny_folders, settings):
    gemma = load_base(replace(settings, base=str(tiny_folders["gemma"])))
    assert gemma.model.get_output_embeddings().weight.data_ptr() == gemma.model.get_input_embeddings().weight.data_ptr()
    phi3 = load_base(replace(settings, base=str(tiny_folders["phi3"])))
    names = [name for name, _ in phi3.model.named_modules()]
    assert any(name.endswith("qkv_proj") for name in names)
    assert any(name.endswith("gate_up_proj") for name in names)
    assert phi3.model.config.rope_parameters["rope_type"] == "longrope"


def test_fingerprint_is_of_contents_not_of_place_or_sharding(tiny_folders, tmp_path):
    original, copy = tiny_folders["llama"], tmp_path / "elsewhere"
    shutil.copytree(original, copy)
    first = compute_fingerprint(original)
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    (copy / "model.safetensors").unlink()
    save_file({name: weights[name] for name in names[::2]}, copy / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, copy / "model-00002-of-00002.safetensors", {"a": "b"})
    assert compute_fingerprint(copy) == first

    changed = dict(weights)
    changed[names[0]] = changed[names[0]].clone()
    changed[names[0]].view(-1)[0] += 1e-3
    save_file({name: changed[name] for name in names[::2]}, copy / "model-00001-of-00002.safetensors")
    assert compute_fingerprint(copy) != first


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_fingerprint_sees_config_and_tokenizer(tiny_folders, tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folders["llama"], copy)
    path = copy / file
    if file == "config.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.1}))
    else:
        path.write_text(path.read_text() + " ")
    assert compute_fingerprint(copy) != compute_fingerprint(tiny_folders["llama"])


def test_fingerprint_is_remembered_until_a_file_changes(tiny_folders, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folders["llama"], copy)
    first = fingerprint(copy, tmp_path / "cache")
    monkeypatch.setattr("bapo.inference.fingerprint.compute_fingerprint", lambda folder: "read again")
    assert fingerprint(copy, tmp_path / "cache") == first
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(copy, tmp_path / "cache") == "read again"


def test_unknown_names_are_answered_with_the_presets(settings):
    with pytest.raises(BapoError, match="Use one of " + ", ".join(PRESETS)):
        find_folder("gpt-5", settings)


def test_without_network_the_sentence_names_the_embedded_base(settings, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(hub_id, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BapoError, match=f"the hub does not answer.*--base {EMBEDDED}"):
        find_folder("phi-3-mini-4k", settings)


def test_a_full_disk_is_named(settings, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def full(hub_id, local_files_only=False, **kwargs):
        raise LocalEntryNotFoundError("absent") if local_files_only else OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(BapoError, match="disk is full"):
        find_folder("owner/model", settings)


def test_a_hub_snapshot_is_loaded_like_a_folder(tiny_folders, settings, monkeypatch):
    asked = []

    def snapshot(hub_id, **kwargs):
        asked.append(hub_id)
        return str(tiny_folders["phi3"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load_base(replace(settings, base="phi-3-mini-4k"))
    assert asked == ["microsoft/Phi-3-mini-4k-instruct"]
    assert loaded.name == "phi-3-mini-4k"


def test_out_of_memory_and_broken_folders_end_in_a_sentence(tiny_folders, settings, tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    at = replace(settings, base=str(tiny_folders["llama"]))
    with monkeypatch.context() as patch:
        patch.setattr(base_module.AutoModelForCausalLM, "from_pretrained", too_large)
        with pytest.raises(BapoError, match="does not fit"):
            load_base(at)
    with monkeypatch.context() as patch:
        patch.setattr(base_module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
        with pytest.raises(BapoError, match="free memory"):
            load_base(at)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BapoError, match=r"no \.safetensors weights"):
        load_base(replace(settings, base=str(tmp_path / "empty")))
    shutil.copytree(tiny_folders["llama"], tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(BapoError, match="cannot be loaded"):
        load_base(replace(settings, base=str(tmp_path / "broken")))


def test_a_model_without_a_chat_template_is_refused(tiny_folders, settings, tmp_path):
    copy = tmp_path / "plain"
    shutil.copytree(tiny_folders["llama"], copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(BapoError, match="no chat template"):
        load_base(replace(settings, base=str(copy)))


def test_cuda_loads_nf4_with_double_quantisation_and_bf16_compute(tiny_folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    nf4 = load_arguments(tiny_folders["phi3"], "nf4")["quantization_config"]
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16
    assert load_arguments(tiny_folders["phi3"], "bf16") == {"dtype": torch.bfloat16, "device_map": {"": 0}}


@pytest.mark.parametrize(("gigabytes", "preset"), [(None, EMBEDDED), (6, EMBEDDED), (16, "phi-3-mini-4k")])
def test_the_default_follows_the_machine(settings, monkeypatch, tmp_path, gigabytes, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes is not None)
    memory = type("Properties", (), {"total_memory": (gigabytes or 0) * 10**9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(base_module, "_snapshot", lambda hub_id: tmp_path)
    assert default_preset(settings) == preset


def test_the_default_falls_back_where_the_hub_is_silent(settings, monkeypatch):
    def silent(hub_id):
        raise BapoError("no hub")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = type("Properties", (), {"total_memory": 80 * 10**9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(base_module, "_snapshot", silent)
    assert default_preset(settings) == EMBEDDED


def test_byte_tokenizers_round_trip():
    # The other tests lean on it.
    tokenizer = byte_tokenizer("llama")
    assert tokenizer.decode(tokenizer("héllo 你好", add_special_tokens=False)["input_ids"]) == "héllo 你好"
