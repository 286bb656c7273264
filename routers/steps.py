"""Where a reasoning step ends, on token ids.

A step is a run of tokens up to and including a separator, the end of the text, or a limit. Separators are looked for in
what the tokens spell, token by token: a tokenizer may merge a newline with its neighbours (`.\\n\\n`) or split a
separator in two, and ids are never turned into text and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FENCE = "```"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What counts as a step.

    Args:
        separators: texts that end a step once something else than white space stands before them.
        max_tokens: a step that finds no separator ends here.
        fences: keep fenced code blocks whole (up to `max_tokens`), blank lines and all.

    Raises:
        ValueError: there is no separator, an empty one, or `max_tokens` is not positive.
    """

    separators: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 256
    fences: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.separators, str) or not self.separators or not all(self.separators):
            raise ValueError(f"Steps(separators={self.separators!r}): pass a tuple of texts, such as ('\\n\\n',)")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"Steps(max_tokens={self.max_tokens!r}): it is a positive integer")


class Segmenter:
    """Finds the ends of steps.

    Args:
        steps: what counts as one.
        decode: the text of token ids; asked once for every id that occurs.
    """

    def __init__(self, steps: Steps, decode: Callable[[Sequence[int]], str]):
        self.steps = steps
        self.decode = decode
        self._pieces: dict[int, str] = {}

    def end(self, tokens: Sequence[int], *, in_fence: bool = False, known: int = 0) -> int | None:
        """Number of tokens after which the step is over; None if it goes on.

        Args:
            tokens: of the step, from its first one, perhaps beyond its end.
            in_fence: whether it begins inside a code block.
            known: so many of the tokens are known not to end it.
        """
        text, longest = "", max(map(len, self.steps.separators))
        for count, token in enumerate(tokens, start=1):
            before, text = len(text), text + self._piece(token)
            if count <= known:
                continue
            if count >= self.steps.max_tokens:
                return count
            recent = text[max(0, before - longest + 1) :]
            if any(separator in recent for separator in self.steps.separators) and self._closes(text, in_fence):
                return count
        return None

    def in_fence_after(self, tokens: Sequence[int], in_fence: bool) -> bool:
        """Whether a step leaves a code block open."""
        return (in_fence + "".join(map(self._piece, tokens)).count(_FENCE)) % 2 == 1

    def _closes(self, text: str, in_fence: bool) -> bool:
        return bool(text.strip()) and not (self.steps.fences and (in_fence + text.count(_FENCE)) % 2)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.decode([token])
        return self._pieces[token]
