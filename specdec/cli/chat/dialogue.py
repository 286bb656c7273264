"""What was said, by turns. Who replies is a subclass's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from specdec.cli.chat.reply import Piece, Reply
from specdec.drafters import Drafter
from specdec.text.prompting import Message


class Dialogue(ABC):
    """A dialogue with one model: messages by turns, the user's first. It knows no terminal.

    Args:
        messages: the user's and the model's by turns, complete ones.
    """

    drafter: Drafter | str | None = None
    """What drafts, where that is ours to say."""

    def __init__(self, *, system: str | None = None, messages: Sequence[Message] = ()) -> None:
        self.system = system
        self.messages = list(messages)

    @abstractmethod
    def describe_states(self) -> str:
        """What is kept from turn to turn, in words."""

    @property
    def last_question(self) -> str:
        """The user's last message. Raises `ValueError` if there is none."""
        if not self.messages:
            raise ValueError("nothing has been said yet")
        return self.messages[-2]["content"]

    def clear(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = []

    def say(self, text: str, **options: Any) -> Reply:
        """Reply to a message; options as of `_reply`."""
        return self._reply([*self.messages, {"role": "user", "content": text}], **options)

    def say_instead(self, text: str, **options: Any) -> Reply:
        """Reply to a message that takes the place of the last one; options as of `_reply`."""
        return self._reply([*self.messages[:-2], {"role": "user", "content": text}], **options)

    @abstractmethod
    def _reply(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int,
        generation_kwargs: dict[str, Any],
        show: Callable[[Sequence[Piece]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Stream a reply to `messages`, which end with the user's. What was said changes only if there is a reply.

        Args:
            show: takes each part of the reply as it comes.
            stop: asked after every token whether to end here.

        Raises:
            KeyboardInterrupt: before the first token; later, it ends the reply like `stop`, but its states are lost.
            ValueError: the message does not fit into the context; an option of generation is wrong.
        """

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *messages]
