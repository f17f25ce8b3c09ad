"""Checkpoints that are whole: one that was cut off while it was written is never resumed from."""

import re
import shutil
from pathlib import Path

from transformers import TrainerCallback

from bapo.adapters import flush

SEAL = "sealed"


class SealedCheckpoints(TrainerCallback):
    """Seals every checkpoint once all of its files are on the disk."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            flush(folder)
            (folder / SEAL).touch()


def last_sealed_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint of a work folder; what is not whole is removed."""
    found: dict[int, Path] = {}
    for folder in work.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and (folder / SEAL).exists():
            found[int(step[1])] = folder
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return str(found[max(found)]) if found else None
