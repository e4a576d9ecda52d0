"""Tokens to text as they come."""

from __future__ import annotations

from typing import Any


class Speller:
    """Turns tokens into text one by one; a character that is spread over several tokens appears with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._shown: list[int] = []  # context: some tokenizers write a token differently at the start of a text
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, "" while a character is unfinished."""
        self._pending.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._pending) < 8:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def rest(self) -> str:
        """What is left at the end."""
        return self._text() if self._pending else ""

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        text: str = self.tokenizer.decode(self._shown + self._pending)
        return text[len(before) :]
