"""LoRA matrices from an adapter folder in PEFT's format."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bapo.adapters import WEIGHTS
from bapo.errors import BapoError

# What a LoRA configuration may ask for beyond x ↦ x A B: none of it can be given a row of its own.
BEYOND = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "target_parameters", "arrow_config", "kasa_config"),
)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter in memory: module name → (A [rank, in], B [rank, out]); B carries the scale α/r (or α/√r)."""

    matrices: dict[str, tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(matrix.nbytes for pair in self.matrices.values() for matrix in pair)


def read_lora(folder: Path, dtype: torch.dtype, device: torch.device) -> LoraWeights:
    """Read a stock PEFT LoRA adapter; a `BapoError` where it is damaged or more than LoRA on linear layers."""
    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise BapoError(f"{folder.name} cannot be read: its files are damaged ({error}).") from error
    beyond = [name for name in BEYOND if getattr(config, name, None)] + (["bias"] if config.bias != "none" else [])
    if beyond:
        raise BapoError(f"{folder.name} is more than LoRA on linear layers ({', '.join(beyond)}).")
    matrices = {}
    for name, a in tensors.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if parts is None:
            raise BapoError(f"{folder.name} is more than LoRA on linear layers (it holds {name}).")
        if parts[2] == "B":
            continue
        module = parts[1]
        b = tensors.get(name.replace("lora_A", "lora_B"))
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise BapoError(f"{folder.name} is damaged: the two matrices of {module} do not fit together.")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        rank = a.shape[0]
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        matrices[module] = (
            a.to(device, dtype).contiguous(),
            (b.to(device, dtype) * scale).T.contiguous(),
        )
    return LoraWeights(matrices)
