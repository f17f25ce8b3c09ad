"""Text from tokens as they come: decoding single ids would lose spaces and split characters."""

from transformers import PreTrainedTokenizerBase

LONGEST_CHARACTER = 4  # bytes, and so at most as many byte tokens


class Detokenizer:
    """Turns the tokens of one answer into pieces of text that add up to the whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids from here to `_shown` are shown already; they tell how the next ones are spaced
        self._shown = 0

    def push(self, token_id: int, last: bool) -> str:
        """The text that `token_id` completes; empty while a character is not whole, unless it is the last."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        unfinished = text.endswith("�") and len(self._ids) - self._shown < LONGEST_CHARACTER
        if len(text) <= len(before) or (unfinished and not last):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
