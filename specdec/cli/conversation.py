"""What happens inside `specdec chat`: read a line, obey it or reply to it."""

from typing import Any

from rich.text import Text
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import specdec
from specdec.cli.common import err_console
from specdec.compatibility import position_limit
from specdec.drafters import Drafter
from specdec.errors import SpecdecError
from specdec.prompting import Message, encode_chats, has_chat_template

HELP = """\
/help           this text
/regen          reply to the last message again
/system TEXT    set the system prompt; without TEXT, remove it
/clear          forget the conversation, keep the system prompt
/exit           leave, as Ctrl-D does
Ctrl-C stops a reply; what was said until then stays in the conversation."""


class Conversation:
    """A dialogue with one model: its history, and the commands that change it.

    Raises:
        ValueError: the model has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drafter: Drafter | str,
        system: str | None,
        max_new_tokens: int,
        generation_kwargs: dict[str, Any],
    ) -> None:
        if not has_chat_template(tokenizer):
            raise ValueError(
                "this model has no chat template, so it cannot hold a conversation; "
                "`specdec generate --raw` continues a text with it"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._drafter = drafter
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._num_positions = position_limit(model)
        self._generation_kwargs = generation_kwargs
        self._turns: list[Message] = []
        self._is_over = False

    def run(self, greeting: str) -> None:
        """Talk until /exit or the end of the input."""
        _notify(greeting)
        while not self._is_over and (line := _read_line()) is not None:
            try:
                self._handle(line)
            except (SpecdecError, ValueError) as error:
                _notify(f"error: {error}", style="red")

    def _handle(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self._reply([*self._turns, {"role": "user", "content": line}])
            return
        name, _, argument = line.partition(" ")
        match name:
            case "/help":
                _notify(HELP)
            case "/regen":
                self._regenerate()
            case "/system":
                self._set_system(argument.strip())
            case "/clear":
                self._turns = []
                _notify("conversation forgotten")
            case "/exit":
                self._is_over = True
            case _:
                raise ValueError(f"unknown command {name}; /help lists the commands")

    def _regenerate(self) -> None:
        if not self._turns:
            raise ValueError("there is no reply yet")
        self._reply(self._turns[:-1])

    def _set_system(self, text: str) -> None:
        self._system = text or None
        _notify("system prompt set" if text else "system prompt removed")

    def _reply(self, turns: list[Message]) -> None:
        """Stream a reply to `turns`, which end with the user's. The history changes only if there is one."""
        turns, inputs = self._fit(turns)
        streamer = _ReplyStreamer(self._tokenizer)
        try:
            out = specdec.generate(
                self._model,
                **inputs.to(self._model.device),
                **self._generation_kwargs,
                max_new_tokens=self._room(inputs),
                drafter=self._drafter,
                streamer=streamer,
                return_dict_in_generate=True,
            )
            assert isinstance(out, specdec.SpeculativeOutput)
            _notify(str(out.stats))
        except KeyboardInterrupt:
            streamer.end()
            _notify("stopped")
        self._turns = [*turns, {"role": "assistant", "content": streamer.text}]

    def _fit(self, turns: list[Message]) -> tuple[list[Message], BatchEncoding]:
        """Drop the oldest exchanges until the conversation leaves room for a reply."""
        num_turns = len(turns)
        inputs = self._encode(turns)
        while self._room(inputs) < self._wanted_room and len(turns) > 1:
            turns = turns[2:]
            inputs = self._encode(turns)
        if self._room(inputs) < 1:
            raise ValueError(
                f"the message is too long: with its prompt it has {inputs['input_ids'].shape[1]} tokens, "
                f"and the model's context {self._num_positions}"
            )
        if len(turns) < num_turns:
            _notify(f"the context is full: forgot the oldest {num_turns - len(turns)} messages")
        return turns, inputs

    def _encode(self, turns: list[Message]) -> BatchEncoding:
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return encode_chats(self._tokenizer, [[*opening, *turns]])

    @property
    def _wanted_room(self) -> int:
        """The room that old messages make way for: a full reply, but at most a quarter of the context."""
        return min(self._max_new_tokens, self._num_positions // 4)

    def _room(self, inputs: BatchEncoding) -> int:
        """How many tokens a reply may have."""
        return min(self._max_new_tokens, self._num_positions - inputs["input_ids"].shape[1])


class _ReplyStreamer(TextStreamer):
    """Prints a reply as it comes, and remembers it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def _read_line() -> str | None:
    """A line of input; None at its end."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            print()
            _notify("Ctrl-D or /exit to leave")
        except EOFError:
            print()
            return None


def _notify(text: str, style: str = "dim") -> None:
    err_console.print(Text(text, style=style), soft_wrap=True)
