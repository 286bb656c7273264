"""What happens inside `specdec chat`: read a line, obey it or reply to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from specdec.cli.chat import settings
from specdec.cli.chat.keyboard import stoppable, unseen_keys
from specdec.cli.chat.reading import Reader
from specdec.cli.chat.rendering import make_view, shows_styles, visible
from specdec.cli.chat.reply import Reply
from specdec.cli.chat.settings import Settings
from specdec.cli.chat.speakers import Speaker
from specdec.cli.chat.transcript import Transcript, transcript_path
from specdec.cli.common import Terminated, err_console
from specdec.cli.status import await_output, make_way
from specdec.errors import SpecdecError

_RECOVERABLE = (SpecdecError, ValueError, RuntimeError, OSError)
"""Errors that the conversation outlives: wrong input, a file, a device that is out of memory."""


@dataclass
class _Totals:
    num_replies: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class ChatSession:
    """One run of the command. What it says itself goes to stderr, replies go to `console`.

    Args:
        speaker: the model to begin with.
        obey: carries out a line that starts with a slash.

    Raises:
        ValueError: the model has no chat template.
    """

    def __init__(
        self,
        speaker: Speaker,
        *,
        obey: Callable[[ChatSession, str], None],
        reader: Reader,
        console: Console,
        settings: Settings,
        system: str | None = None,
    ) -> None:
        self._speaker = speaker
        self._obey = obey
        self._reader = reader
        self._console = console
        self._settings = settings
        self._conversation = speaker.converse(system=system)
        self._is_tinted = False
        self._is_over = False
        self._file: Path | None = None
        self._last_reply: Reply | None = None
        self._totals = _Totals()
        settings.sampling.seed_torch()

    def run(self) -> None:
        """Talk until /exit or the end of the input."""
        if self._reader.is_person:
            self.notify(f"{self._speaker.name}: /help for help, Ctrl-D to leave")
        while not self._is_over:
            try:
                line = self._reader.read()
                if line is None:
                    return
                self._handle(line)
                if line and self._reader.is_person:
                    self.notify("")
            except Terminated:
                raise
            except KeyboardInterrupt:
                if not self._reader.is_person:
                    raise
                self.notify("Ctrl-D or /exit to leave")
            except _RECOVERABLE as error:
                self.notify(f"error: {error}", style="red")

    def reply_once(self, message: str) -> bool:
        """Reply to one message; whether there was a reply before Ctrl-C."""
        return self._reply(self._conversation.say, message)

    def notify(self, text: str, style: str = "dim") -> None:
        """Say something that is no reply."""
        # a terminal breaks between words; in a file each line stays one
        err_console.print(Text(visible(text), style=style), soft_wrap=not err_console.is_terminal)

    def leave(self) -> None:
        self._is_over = True

    def clear(self) -> None:
        self._conversation.clear()
        self.notify("conversation forgotten")

    def regenerate(self) -> None:
        question, before = self._conversation.last_question, self._conversation.messages[-1]
        has_replied = self._reply(self._conversation.say_instead, question)
        if has_replied and self._conversation.messages[-1] == before and not self._settings.sampling.sample:
            self.notify("the same, because decoding is greedy: /set sample on makes replies differ")

    def edit(self, text: str) -> None:
        """Reply to `text` in place of the last message; "" asks the user for it."""
        before = self._conversation.last_question
        if not text and not self._reader.can_edit:
            raise ValueError("the message cannot be edited here: /edit TEXT puts another one in its place")
        if text := text or self._reader.read(default=before) or "":
            self._reply(self._conversation.say_instead, text)

    def set_system(self, text: str) -> None:
        self._conversation.system = text or None
        self.notify("system prompt set" if text else "system prompt removed")

    def set(self, text: str) -> None:
        """Change a setting, given as "NAME VALUE"; without a value, show one, or all of them."""
        name, _, value = text.partition(" ")
        if value:
            self._settings = self._settings.changed(name, value.strip())
            if name == "seed":
                self._settings.sampling.seed_torch()
        values = self._settings.values()
        if name and name not in values:
            raise ValueError(f"there is no setting {name!r}; choose from: {', '.join(values)}")
        shown = {name: values[name]} if name else values
        self.notify("\n".join(f"{name:16}{settings.describe(value)}" for name, value in shown.items()))

    def save(self, file: str) -> None:
        """Write the conversation; "" is the file that it was last saved to or loaded from."""
        path = transcript_path(file) if file else self._file
        if path is None:
            raise ValueError("there is no file yet: /save FILE")
        if path.exists() and path != self._file:
            raise ValueError(f"{path} exists: choose another name, or delete it first")
        conversation = self._conversation
        Transcript(
            model=self._speaker.name,
            drafter=self._speaker.drafter_name,
            system=conversation.system,
            settings=self._settings,
            messages=conversation.messages,
        ).save(path)
        self._file = path
        self.notify(f"saved {len(conversation.messages)} messages to {path}")

    def load(self, file: str) -> None:
        """Go on with a saved conversation, its system prompt and its settings; the model stays."""
        path = transcript_path(file)
        self.resume(Transcript.load(path), path)

    def resume(self, saved: Transcript, path: Path) -> None:
        """Go on with what has been read of a file."""
        self._conversation.messages, self._conversation.system = saved.messages, saved.system
        self._settings, self._file = saved.settings, path
        saved.settings.sampling.seed_torch()
        self.notify(f"loaded {len(saved.messages)} messages from {path}")
        if saved.model != self._speaker.name:
            self.notify(f"they were held with {saved.model}; {self._speaker.name} goes on")
        for message in saved.messages[-2:]:
            self.notify(f"{message['role']}: {message['content']}")

    def show_stats(self) -> None:
        reply, totals, conversation = self._last_reply, self._totals, self._conversation
        if reply is None:
            raise ValueError("there is no reply yet")
        rate = totals.num_tokens / totals.seconds if totals.seconds else 0.0
        lines = {
            "last reply": "broken off" if reply.stats is None else str(reply.stats),
            "its prompt": f"{reply.num_read} tokens read, {reply.num_kept} kept from before"
            + ("" if reply.stats is None else f"; first token after {reply.stats.ttft_seconds:.2f} s"),
            "conversation": f"{len(conversation.messages)} messages; {conversation.describe_states()}",
            "all replies": f"{totals.num_replies}: {totals.num_tokens} tokens at {rate:.1f} tokens/s",
            "model": f"{self._speaker.name}, drafter {self._speaker.drafter_name}",
        }
        self.notify("\n".join(f"{name:14}{text}" for name, text in lines.items()))

    def show(self, which: str) -> None:
        """Underline drafted tokens from now on ("on") or no longer ("off"); "" shows the last reply again with them."""
        if which not in ("", "on", "off"):
            raise ValueError(f"/show takes on, off or nothing, got {which!r}")
        if not self._speaker.tells_drafted:
            raise ValueError("the server does not say which tokens were drafted, so they cannot be underlined")
        if not shows_styles(self._console):
            raise ValueError("replies do not go to a terminal that shows styles, so tokens cannot be underlined")
        if which:
            self._is_tinted = which == "on"
            self.notify("drafted and accepted tokens are underlined" if self._is_tinted else "nothing is underlined")
            return
        if self._last_reply is None:
            raise ValueError("there is no reply yet")
        with make_view(self._console, tinted=True) as view:
            view.show(self._last_reply.pieces)
        self.notify("underlined: drafted, and accepted by the model; the rest is the model's own")

    def change_model(self, name: str) -> None:
        """Go on with another model; "" names the present one."""
        if name:
            said = self._conversation
            self.notify(f"loading {name}")
            new = self._speaker.with_model(name)
            self._conversation = new.converse(system=said.system, messages=said.messages)
            self._speaker = new
        self.notify(f"model {self._speaker.name}, drafter {self._speaker.drafter_name}")

    def change_drafter(self, names: str) -> None:
        """Draft with another drafter, given as "DRAFTER MODEL" or "DRAFTER"; "" names the present one."""
        name, _, draft = names.partition(" ")
        if name:
            self._speaker = self._speaker.with_drafter(name, draft.strip() or None)
            self._conversation.drafter = self._speaker.drafter
        self.notify(f"drafter {self._speaker.drafter_name}")

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._obey(self, line)
        elif line:
            self._reply(self._conversation.say, line.removeprefix("/"))

    def _reply(self, say: Callable[..., Reply], message: str) -> bool:
        """Show a reply as it comes; whether there was one before Ctrl-C."""
        view = make_view(self._console, tinted=self._is_tinted)
        await_output("reading the prompt")
        try:
            with unseen_keys(), stoppable(lambda: view.has_begun) as is_stopped, view:
                reply = say(message, show=view.show, stop=is_stopped, **self._decoding)
        except Terminated:
            raise
        except KeyboardInterrupt:
            self.notify("stopped before the first token: the message is taken back")
            return False
        finally:
            make_way()
        self._note(reply)
        return True

    @property
    def _decoding(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self._settings.max_new_tokens,
            "generation_kwargs": self._settings.sampling.generation_kwargs,
        }

    def _note(self, reply: Reply) -> None:
        """Remember a reply, and say what it took."""
        self._last_reply = reply
        if reply.num_forgotten:
            self.notify(f"the context is full: forgot the oldest {reply.num_forgotten} messages")
        if reply.stopped:
            self.notify("stopped")
        elif reply.cut:
            self.notify("cut at the limit: /set max_new_tokens N allows longer replies")
        if reply.stats is not None:
            totals, stats = self._totals, reply.stats
            self._totals = replace(
                totals,
                num_replies=totals.num_replies + 1,
                num_tokens=totals.num_tokens + stats.num_new_tokens,
                seconds=totals.seconds + stats.decoding_seconds,
            )
            self.notify(
                f"{stats.num_new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
                f"{stats.tokens_per_round:.2f} tokens per round, "
                f"{stats.num_accepted} of {stats.num_drafted} drafted accepted"
            )
