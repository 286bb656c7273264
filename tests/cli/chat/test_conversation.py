"""A conversation keeps what was said and the states of it; replies are those of plain decoding from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from specdec.cli.chat.conversation import Conversation
from specdec.cli.chat.reply import Piece, Reply
from specdec.drafters import EarlyExit, Plain, PromptLookup, SmallModel
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from specdec.text.detokenize import Detokenizer

NUM_NEW = 12
LONGEST_ROUND = 12
"""Tokens that a drafter may let the model verify at once; all turns but the first are longer."""
GREEDY: dict[str, Any] = {"do_sample": False}


class Listener:
    """Takes a reply, and asks it to stop once so many words have come."""

    def __init__(self, stop_after: int | None = None):
        self.pieces: list[Piece] = []
        self._stop_after = stop_after

    def show(self, pieces: list[Piece]) -> None:
        self.pieces += pieces

    def stop(self) -> bool:
        return self._stop_after is not None and len(self.pieces) >= self._stop_after

    @property
    def options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": NUM_NEW,
            "generation_kwargs": GREEDY,
            "show": self.show,
            "stop": self.stop,
        }


def options(stop_after: int | None = None) -> dict[str, Any]:
    return Listener(stop_after).options


@pytest.fixture(scope="module")
def word_model(words: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(words), AutoTokenizer.from_pretrained(words)


@pytest.fixture
def conversation(word_model: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> Conversation:
    return Conversation(*word_model)


@contextmanager
def forwarded(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of every forward of the model."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield counts
    finally:
        hook.remove()


def from_scratch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> str:
    """What plain decoding would have said in place of the last reply."""
    opening = [{"role": "system", "content": conversation.system}] if conversation.system else []
    messages = [*opening, *conversation.messages[:-1]]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=NUM_NEW, **GREEDY)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


DRAFTERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "plain": lambda model: Plain(),
    "prompt lookup": lambda model: PromptLookup(min_match=1),
    "small model": lambda model: SmallModel(model, num_tokens=3),
    "early exit": lambda model: EarlyExit(exit_layer=1),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_turn_reads_only_its_own_tokens(word_model: Any, name: str) -> None:
    model, tokenizer = word_model
    conversation = Conversation(model, tokenizer, drafter=DRAFTERS[name](model), system="ka ke")
    for turn, question in enumerate(("ba be bi", "do", "fal fen for fa fe", "ga")):
        with forwarded(model) as counts:
            reply = conversation.say(question, **options())
        # a turn's own: the last word of the reply before, and "user: QUESTION assistant:"
        num_own = len(question.split()) + 2 + (1 if turn else 3)
        assert reply.num_read == num_own
        assert num_own in counts
        if name != "small model":  # it reads the whole conversation, for itself
            assert max(counts) <= max(num_own, LONGEST_ROUND)
        assert reply.text == from_scratch(model, tokenizer, conversation)
        assert reply.cut
        assert not reply.stopped
    assert len(conversation.messages) == 8


def test_another_reply_reads_one_token(word_model: Any, conversation: Conversation) -> None:
    conversation.say("ba be", **options())
    first = conversation.say("bi bo", **options())
    with forwarded(word_model[0]) as counts:
        again = conversation.say_instead(conversation.last_question, **options())
    assert (counts[0], again.num_read) == (1, 1)
    assert again.text == first.text
    assert len(conversation.messages) == 4


def test_an_edited_message_is_read_from_its_first_changed_token(word_model: Any, conversation: Conversation) -> None:
    conversation.say("ba be bi bo", **options())
    reply = conversation.say_instead("ba be da do", **options())
    assert reply.num_read == len(["da", "do", "assistant:"])
    assert reply.text == from_scratch(*word_model, conversation)
    assert [message["content"] for message in conversation.messages] == ["ba be da do", reply.text]


def test_another_system_prompt_is_read_with_all_that_follows(word_model: Any, conversation: Conversation) -> None:
    conversation.say("ba be", **options())
    conversation.system = "ku"
    reply = conversation.say("bi", **options())
    assert reply.num_kept == 0
    assert reply.text == from_scratch(*word_model, conversation)
    conversation.clear()
    reply = conversation.say("ba", **options())
    assert reply.num_kept == len(["system:", "ku", "user:", "ba"])
    assert reply.text == from_scratch(*word_model, conversation)


def test_windows_that_have_been_left_are_kept_too() -> None:
    model, tokenizer = tiny_model("mistral", eos_token_id=257), ByteTokenizer()
    conversation = Conversation(model, tokenizer)
    for text in ("to be or not to be", "that is", "the question"):
        conversation.say(text, **options())
    conversation.say_instead("not the question", **options())
    assert conversation.messages[-1]["content"] == from_scratch(model, tokenizer, conversation)


def test_a_template_that_changes_what_was_said(word_model: Any) -> None:
    """Some templates leave the thinking of earlier turns out."""
    model, tokenizer = word_model
    template = (
        "{% for message in messages %}{{ message.role }}: "
        "{{ message.content.split()[:2] | join(' ') if message.role == 'assistant' else message.content }} "
        "{% endfor %}assistant:"
    )
    shortening = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<|unk|>", chat_template=template
    )
    conversation = Conversation(model, shortening)
    conversation.say("ba be", **options())
    reply = conversation.say("bi", **options())
    assert reply.num_kept == len(["user:", "ba", "be", "assistant:", "ONE", "TWO"])
    assert reply.text == from_scratch(model, shortening, conversation)


def test_words_that_were_said_in_other_tokens() -> None:
    """A model may spell in letters what its tokenizer would make one token."""
    backend = Tokenizer(BPE(vocab={"a": 0, "b": 1, ":": 2, "ab": 3, "?": 4}, merges=[("a", "b")], unk_token="?"))
    backend.decoder = decoders.Fuse()
    template = "{% for message in messages %}{{ message.content }}:{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    model = tiny_model("llama", vocab_size=8)
    conversation = Conversation(model, tokenizer)
    letters = {"prefix_allowed_tokens_fn": lambda _, ids: [1] if ids[-1] == 0 else [0]}
    spelt = {**options(), "generation_kwargs": {**GREEDY, **letters}}
    conversation.say("b", **spelt)
    assert conversation.messages[-1]["content"] == "ab" * (NUM_NEW // 2)
    reply = conversation.say("b", **spelt)
    assert reply.num_kept == len("b:")
    assert reply.num_read == NUM_NEW // 2 + len(":b:")


def test_a_reply_stopped_on_request_keeps_its_states(word_model: Any, conversation: Conversation) -> None:
    whole = Conversation(*word_model).say("ba be", **options())
    reply = conversation.say("ba be", **options(stop_after=4))
    assert reply.stopped
    said = reply.text.split()
    assert 4 <= len(said) < NUM_NEW
    assert said == whole.text.split()[: len(said)]
    assert conversation.messages[-1]["content"] == reply.text
    after = conversation.say("bi", **options())
    assert after.num_read == 1 + len(["user:", "bi", "assistant:"])
    assert after.text == from_scratch(*word_model, conversation)


def test_a_reply_broken_off_keeps_what_was_said(word_model: Any, conversation: Conversation) -> None:
    conversation.say("ba be", **options())
    listener = Listener()

    def show(pieces: list[Piece]) -> None:
        listener.show(pieces)
        if len(listener.pieces) >= 3:
            listener.pieces += [Piece("!", False)] * 100  # once
            raise KeyboardInterrupt

    listener.stop = lambda: False  # type: ignore[method-assign]
    reply = conversation.say("bi", **{**listener.options, "show": show})
    assert reply.stopped
    assert reply.stats is None
    assert len(reply.text.split()) >= 2
    after = conversation.say("bo", **options())
    assert after.num_kept == len(["user:", "ba", "be", "assistant:"]) + NUM_NEW - 1, "those of the turn before"
    assert after.text == from_scratch(*word_model, conversation)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_reply_that_never_began_changes_nothing(
    word_model: Any, conversation: Conversation, error: type[BaseException]
) -> None:
    first = conversation.say("ba be", **options())

    def fail(*args: Any) -> None:
        raise error

    hook = word_model[0].register_forward_pre_hook(fail)
    with pytest.raises(error):
        conversation.say("bi", **options())
    hook.remove()
    assert [message["content"] for message in conversation.messages] == ["ba be", first.text]
    after = conversation.say("bi", **options())
    assert after.num_read == 1 + len(["user:", "bi", "assistant:"])
    assert after.text == from_scratch(*word_model, conversation)


def test_pieces_tell_which_tokens_were_drafted(word_model: Any) -> None:
    model, tokenizer = word_model
    said = Conversation(model, tokenizer, drafter=Plain()).say("ba be", **options())
    ids = tokenizer(said.text)["input_ids"]
    wrong = 3 + (ids[5] - 2) % 60
    script = [[ids[1:3]], [[ids[4], wrong]], [[]], [ids[7:]]]
    listener = Listener()
    conversation = Conversation(model, tokenizer, drafter=ScriptedDrafter(script))
    reply = conversation.say("ba be", **listener.options)
    assert reply.text == said.text
    accepted = [piece.accepted for piece in reply.pieces]
    #                   first  drafted     own    drafted own    own    drafted         own, the last
    assert accepted == [False, True, True, False, True, False, False, *([True] * 4), False]
    assert tuple(listener.pieces) == reply.pieces


def test_text_comes_in_whole_characters() -> None:
    tokenizer = ByteTokenizer()
    text = "naïve 中文 🙂\ufffd."
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.add(token) for token in [*text.encode(), 0xF0, 0x9F]]
    assert "".join(parts) == text
    assert [part for part in parts if part and part in text] == [part for part in parts if part]
    assert "".join(parts) + detokenizer.finish() == tokenizer.decode([*text.encode(), 0xF0, 0x9F])


def test_text_is_that_of_all_tokens_together() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(0, 259, (40,), generator=generator).tolist()
        detokenizer = Detokenizer(ByteTokenizer())
        parts = [detokenizer.add(token) for token in ids]
        whole = ByteTokenizer().decode(ids, skip_special_tokens=True)
        assert "".join([*parts, detokenizer.finish()]) == whole


def test_a_reply_is_its_pieces() -> None:
    pieces = (Piece("a", True), Piece(" b", False))
    counts = {"num_read": 1, "num_kept": 0, "num_forgotten": 0, "stopped": False, "cut": False}
    assert Reply(pieces=pieces, stats=None, **counts).text == "a b"
