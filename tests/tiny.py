"""Tiny random models of the three architectures, with tokenizers and adapters to match."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from bapo.adapters import AdapterCard, AdapterStore
from bapo.inference.base import Base

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# (special tokens, chat template): in the manner of SmolLM2, Phi-3 and Gemma. Only the first ends a
# turn with the tokenizer's eos token.
TEMPLATES = {
    "llama": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "phi3": (
        ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    ),
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>", "<eos>"],
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
}
END_OF_TURN = {"llama": "<|im_end|>", "phi3": "<|end|>", "gemma": "<end_of_turn>"}
ARCHITECTURES = tuple(TEMPLATES)


def byte_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; then the special tokens."""
    special, template = TEMPLATES[architecture]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1], pad_token=special[-1])
    tokenizer.add_special_tokens({"additional_special_tokens": special[:-1]})
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(architecture: str, tokenizer: PreTrainedTokenizerFast, longrope: bool = True, width: int = 32):
    """A random model of the architecture, a few thousand parameters, wide logits so that argmax is no tie."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.5 * (32 / width) ** 0.5,
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True))
    if architecture == "gemma":
        return GemmaForCausalLM(GemmaConfig(**sizes, head_dim=width // 4, max_position_embeddings=4096))
    angles = range(width // 8)
    factors = {"short_factor": [1 + angle / 10 for angle in angles], "long_factor": [2.0 + angle for angle in angles]}
    rope = {"rope_type": "longrope", **factors}
    extra = {"rope_parameters": {**rope, "rope_theta": 10000.0}} if longrope else {}
    return Phi3ForCausalLM(
        Phi3Config(
            **sizes, max_position_embeddings=1024, original_max_position_embeddings=256, sliding_window=None, **extra
        )
    )


def make_adapter(
    base: Base, store: AdapterStore, preference: str, method: str, seed: int, rank: int = 4, layers: list | None = None
) -> Path:
    """Install a random LoRA adapter, of some layers or all, strong enough to change what the tiny base says."""
    torch.manual_seed(seed)
    target = "all-linear" if layers is None else ["down_proj", "o_proj"]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=target, layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(base.model), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    scratch = store.folder.parent / f".scratch-{preference}-{method}"
    model.save_pretrained(scratch, save_embedding_layers=False)
    store.folder.mkdir(parents=True, exist_ok=True)
    card = AdapterCard(
        base=base.name,
        base_fingerprint=base.fingerprint,
        preference=preference,
        method=method,
        hyperparameters={"rank": rank},
        data_sha256="0" * 64,
        training_pairs=1,
        held_out=None,
        versions={},
    )
    return store.install(scratch, card)


def write_pairs(file: Path, prompts: int) -> Path:
    """A small file of preference pairs, two for each prompt."""
    rows = [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"{word} {i}"}
        for i in range(prompts)
        for word in ("no", "never")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def needs_shared(name: str) -> Path:
    """A file of the shared evaluation data, or a skipped test that says what is absent."""
    file = SHARED_DATA / name
    if not file.exists():
        pytest.skip(f"needs the evaluation data {name}, which is not beside this checkout")
    return file


@torch.no_grad()
def logps_apart(model, prompt_ids: list[int], responses: list[list[int]]) -> torch.Tensor:
    """Summed log-probs of each response, one plain forward pass each: the brute-force twin of packing."""
    scores = []
    for response in responses:
        ids = torch.tensor(prompt_ids + response, device=model.device)
        logps = model(input_ids=ids[None]).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        scores.append(logps.gather(1, ids[len(prompt_ids) :, None]).sum())
    return torch.stack(scores)
