"""The base: found, loaded once, identified, and never altered."""

import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from bapo.errors import BapoError
from bapo.inference.embedded import embedded_folder
from bapo.inference.fingerprint import fingerprint
from bapo.inference.tree_attention import enable_trees
from bapo.pair_layouts import Prompt
from bapo.settings import Settings

EMBEDDED = "smollm2-135m"
HUB_PRESETS = {
    "phi-3-mini-4k": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-mini-128k": "microsoft/Phi-3-mini-128k-instruct",
    "gemma-2b-it": "google/gemma-2b-it",
}
PRESETS = (EMBEDDED, *HUB_PRESETS)
GPU_DEFAULT = "phi-3-mini-4k"
GPU_DEFAULT_MEMORY = 8 * 10**9  # bytes

# Weights are taken as safetensors only: a pickle can run code, and so can a repository's own Python.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


@dataclass(slots=True)
class Base:
    """The untouched model π_ref with what is needed to talk to it.

    `numerics` says how its weights are computed with ("float32", "bfloat16" or "nf4"): log-probs of
    one are not those of another. `stop_ids` end an answer when generated; `end_of_turn` is the one
    that the chat template puts behind an assistant's message.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    numerics: str
    end_of_turn: int
    stop_ids: frozenset[int]

    @property
    def cache_key(self) -> str:
        """Names what was computed with this base, on the disk."""
        return f"{self.fingerprint}-{self.numerics}"

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a user's message, or of a conversation that ends with one, under the chat template, up to
        where the answer begins."""
        return _chat_ids(self.tokenizer, _messages(prompt), add_generation_prompt=True)

    def encode_response(self, prompt: Prompt, response: str) -> list[int]:
        """Token ids of `response` as the assistant's answer to `prompt`: the text's and the end-of-turn token."""
        start = self.encode_prompt(prompt)
        whole = _chat_ids(self.tokenizer, [*_messages(prompt), {"role": "assistant", "content": response}])
        if whole[: len(start)] == start and self.end_of_turn in whole[len(start) :]:
            last = len(whole) - whole[::-1].index(self.end_of_turn)
            return whole[len(start) : last]
        # Templates that render the two differently (a "thinking" prefix, say) have no common prefix.
        return [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.end_of_turn]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": role, "content": text} for role, text in prompt]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs) -> list[int]:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    except TemplateError as error:
        raise BapoError(f"The base's chat template does not take this conversation: {error}.") from error


def load_base(settings: Settings) -> Base:
    """Find and load the base that the settings ask for.

    Raises `BapoError` with what to do, or `OSError` where the cache folder cannot be written.
    """
    name, folder, identity = identify(settings)
    disable_progress_bar()  # local files take seconds
    try:
        arguments = load_arguments(folder, settings.precision)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments, trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BapoError(_too_large(name)) from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise BapoError(f"The base in {folder} cannot be loaded: {error}. Expected a causal chat model.") from error
    if tokenizer.chat_template is None:
        raise BapoError(f"The base {name} has no chat template; choose an instruction-tuned (chat) model.")
    model.eval().requires_grad_(False)
    enable_trees(model)
    end_of_turn = _end_of_turn(tokenizer)
    return Base(
        name=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        fingerprint=identity,
        numerics="nf4" if "quantization_config" in arguments else str(arguments["dtype"]).removeprefix("torch."),
        end_of_turn=end_of_turn,
        stop_ids=frozenset({end_of_turn} | _ids(tokenizer.eos_token_id) | _ids(model.generation_config.eos_token_id)),
    )


class Identity(NamedTuple):
    """Which base the settings mean, without loading it."""

    name: str
    folder: Path
    fingerprint: str


def identify(settings: Settings) -> Identity:
    """Find the base that the settings ask for; raises as `load_base` does."""
    name = settings.base or default_preset(settings)
    folder = find_folder(name, settings)
    if not any(folder.glob("*.safetensors")):
        raise BapoError(f"{folder} holds no .safetensors weights; other formats are not loaded: they can run code.")
    # A folder goes by its own name: paths are the operator's business and appear on no page.
    return Identity(name if name in PRESETS else folder_name(name), folder, fingerprint(folder, settings.cache))


def folder_name(name: str) -> str:
    """The last part of a folder's path or of a hub id."""
    path = Path(name).expanduser()
    return (path.resolve() if path.is_dir() else path).name


def default_preset(settings: Settings) -> str:
    """Phi-3-mini where a CUDA device with 8 GB or more can be fed with it, else the embedded base."""
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < GPU_DEFAULT_MEMORY:
        return EMBEDDED
    try:
        find_folder(GPU_DEFAULT, settings)
    except BapoError:
        return EMBEDDED
    return GPU_DEFAULT


def find_folder(name: str, settings: Settings) -> Path:
    """The local folder of a preset, a hub id or a folder; fetched first where that is needed."""
    if name == EMBEDDED:
        return embedded_folder(settings.cache)
    if name not in HUB_PRESETS and Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name not in HUB_PRESETS and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BapoError(
            f"There is no base {name!r}. Use one of {', '.join(PRESETS)}, a hub id such as owner/model, or a folder."
        )
    return _snapshot(HUB_PRESETS.get(name, name))


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return _complete(Path(snapshot_download(hub_id, allow_patterns=MODEL_FILES, local_files_only=True)))
    except LocalEntryNotFoundError:
        pass  # not in the cache yet: ask the hub
    try:
        return Path(snapshot_download(hub_id, allow_patterns=MODEL_FILES))
    except GatedRepoError as error:
        raise BapoError(
            f"{hub_id} is gated: accept its licence on its hub page, then set HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise BapoError(f"The hub knows no model {hub_id} (or it is private: then set HF_TOKEN).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise BapoError(
            f"{hub_id} is not in the local cache and the hub does not answer. Check the network, "
            f"or use --base {EMBEDDED}, which needs no hub."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BapoError(f"The disk is full while fetching {hub_id}; free some space or set HF_HOME.") from error
        raise BapoError(f"{hub_id} could not be fetched: {error}") from error


def _complete(snapshot: Path) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    # An interrupted download leaves a snapshot without weights, or without some of its shards.
    if not (snapshot / "config.json").exists() or not any(snapshot.glob("*.safetensors")):
        raise LocalEntryNotFoundError(f"{snapshot} is incomplete")
    return snapshot


def load_arguments(folder: Path, precision: str) -> dict:
    """Arguments of `from_pretrained` for this machine.

    CUDA: nf4 with double quantisation and bf16 compute, or plain bf16. CPU: float32, so that every
    figure is exact; bf16 where float32 does not fit into the free memory.
    """
    if torch.cuda.is_available():
        if precision == "bf16":
            return {"dtype": torch.bfloat16, "device_map": {"": 0}}
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"dtype": torch.bfloat16, "device_map": {"": 0}, "quantization_config": nf4}
    parameters = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / _bytes_per_weight(folder)
    free = psutil.virtual_memory().available
    for dtype in (torch.float32, torch.bfloat16):
        if parameters * dtype.itemsize < free:
            return {"dtype": dtype}
    raise MemoryError


def _bytes_per_weight(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2


def _too_large(name: str) -> str:
    return (
        f"The base {name} does not fit into this machine's free memory. Close other programs, "
        f"or choose a smaller one: --base {EMBEDDED}."
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    # Phi-3 and Gemma end a turn with a token that is not the tokenizer's eos: ask the template itself.
    content = "bapo"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}], tokenize=False
    )
    tail = tokenizer(text[text.rindex(content) + len(content) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ending = next((token for token in tail if token in special), tokenizer.eos_token_id)
    if ending is None:
        raise BapoError("The base's chat template has no end-of-turn token and its tokenizer no eos token.")
    return ending


def _ids(token_ids: int | list[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return set(token_ids) if isinstance(token_ids, list) else {token_ids}
