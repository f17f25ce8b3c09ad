"""The comparison that the page opens with: recorded from this very base and these very adapters."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from bapo.comparison import METHODS, Answer, BaseToken, Frame
from bapo.evaluation import BASE
from bapo.inference.engine import LocalEngine

logger = logging.getLogger(__name__)

RECORDING = Path(__file__).parent / "data" / "recorded_comparison.json"


@dataclass(frozen=True, slots=True)
class Recording:
    prompt: str
    frame: Frame


def recorded_frame(engine: LocalEngine, file: Path = RECORDING) -> Recording | None:
    """The recording, or None where it was not made with this base and the adapters that are here now."""
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["made_with"] == made_with(engine, record["preference"]):
            return Recording(record["prompt"], _frame(record))
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is no recording; the page opens without one", file.name)
    return None


def record(prompt: str, frame: Frame, engine: LocalEngine) -> dict:
    """What `RECORDING` holds, for a finished comparison."""
    tokens = [{"text": token.text, "logps": token.logps} for token in frame.base_tokens]
    made = {"prompt": prompt, "made_with": made_with(engine, frame.preference)}
    return {**made, **frame.as_dict(), "base_tokens": tokens}


def made_with(engine: LocalEngine, preference: str) -> dict[str, str]:
    """Identifies the base and the adapters behind a comparison."""
    adapters = engine.store.by_preference().get(preference, {})
    hashes = {method: adapters[method].sha256 for method in METHODS if method in adapters}
    return {BASE: engine.base.cache_key, **hashes}


def _frame(record: dict) -> Frame:
    answers = tuple(
        Answer(p["name"], p["text"], p["tokens"], p["logps"], p["tokens"] / p["tokens_per_second"], done=True)
        for p in record["policies"]
    )
    tokens = tuple(BaseToken(token["text"], token["logps"]) for token in record["base_tokens"])
    return Frame(
        *(record["preference"], record["base"], answers, tokens),
        seconds=record["seconds"],
        done=True,
        weights=record["weights"],
    )
