"""What was said, the prompt that the model's template makes of it, and the states kept from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.cli.chat.dialogue import Dialogue
from specdec.cli.chat.reply import Piece, Reply
from specdec.cli.chat.streamer import ReplyStreamer
from specdec.drafters import Drafter
from specdec.stages import stage
from specdec.text.prompting import NO_CHAT_TEMPLATE, Message, encode_chats, has_chat_template
from specdec.tree_model.cache import RowStates
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.dynamic_cache import beginning, only_row, refill
from specdec.tree_model.layer_kinds import keeps_states
from specdec.tree_model.prefix_files import PrefixFiles


class Conversation(Dialogue):
    """A dialogue with a model of this process.

    A turn reads only what is new in its prompt: key and value states of the longest common beginning with what the
    turn before has left are kept. Token ids are compared, so a template that writes a reply otherwise than the model
    said it, or drops a part of it, costs reading from there on, and nothing else. A model whose layers keep states
    reads all of the prompt in every turn: a state has no beginning.

    Args:
        max_prefix_bytes: of the disk, in the user's cache: what has been read is kept there too, and known to the next
            process with the same model. None: nothing is.

    Raises:
        ValueError: the model has no chat template.
        UnsupportedModelError: nothing can be kept of this model on disk.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drafter: Drafter | str | None = None,
        system: str | None = None,
        messages: Sequence[Message] = (),
        max_prefix_bytes: int | None = None,
    ) -> None:
        if not has_chat_template(tokenizer):
            raise ValueError(NO_CHAT_TEMPLATE)
        super().__init__(system=system, messages=messages)
        self.drafter = drafter
        self._model = model
        self._tokenizer = tokenizer
        self._num_positions = position_limit(model)
        self._kept = _KeptStates()
        self._files = None if max_prefix_bytes is None else PrefixFiles(model, max_prefix_bytes)

    @property
    def num_kept(self) -> int:
        """Tokens whose states are kept."""
        return len(self._kept.ids)

    def describe_states(self) -> str:
        return f"the states of {self.num_kept} tokens are kept, the context has {self._num_positions}"

    def _reply(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int,
        generation_kwargs: dict[str, Any],
        show: Callable[[Sequence[Piece]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        kept_messages, ids = self._fit(messages, max_new_tokens)
        room = min(max_new_tokens, self._num_positions - len(ids))
        cache = None if keeps_states(self._model.config) else self._known(ids)
        num_kept = 0 if cache is None else cache.get_seq_length()
        streamer = ReplyStreamer(self._tokenizer, show)
        stats = None
        try:
            out = self._generate(ids, cache, streamer, stop, max_new_tokens=room, **generation_kwargs)
            self._kept = self._kept if cache is None else _KeptStates(out.sequences[0].tolist(), cache)
            stats = out.stats
        except KeyboardInterrupt:
            if not streamer.num_tokens:
                raise
            streamer.end()
        reply = Reply(
            pieces=tuple(streamer.pieces),
            stats=stats,
            num_read=len(ids) - num_kept,
            num_kept=num_kept,
            num_forgotten=len(messages) - len(kept_messages),
            stopped=stats is None or stop(),
            cut=streamer.num_tokens == room,
        )
        self.messages = [*kept_messages, {"role": "assistant", "content": reply.text}]
        if self._files is not None and stats is not None:
            with stage("keeping what was read"):
                self._files.of_text(self._kept.ids).keep(self._kept.states)
        return reply

    def _known(self, ids: list[int]) -> DynamicCache:
        """The states of the longest beginning that is known, without those of the last token: it is always read."""
        kept = self._kept.beginning_of(ids[:-1])
        if self._files is None:
            return kept
        states = only_row(kept)
        longer = self._files.of_text(ids[:-1]).extend(states)
        if longer is None or longer is states:
            return kept
        known = DynamicCache()
        refill(known, [longer])
        return known

    def _generate(
        self,
        ids: list[int],
        cache: DynamicCache | None,
        streamer: ReplyStreamer,
        stop: Callable[[], bool],
        **options: Any,
    ) -> specdec.SpeculativeOutput:
        input_ids = torch.tensor([ids], device=self._model.device)
        out = specdec.generate(
            self._model,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            drafter=self.drafter,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_StopOnRequest(stop)]),
            return_dict_in_generate=True,
            **options,
        )
        assert isinstance(out, specdec.SpeculativeOutput)
        return out

    def _fit(self, messages: list[Message], max_new_tokens: int) -> tuple[list[Message], list[int]]:
        """Drop the oldest exchanges until the conversation leaves room for a reply."""
        # old messages make way for a full reply, but for no more than a quarter of the context
        wanted = min(max_new_tokens, self._num_positions // 4)
        ids = self._encode(messages)
        while self._num_positions - len(ids) < wanted and len(messages) > 1:
            messages = messages[2:]
            ids = self._encode(messages)
        if len(ids) >= self._num_positions:
            raise ValueError(
                f"the message is too long: with its prompt it has {len(ids)} tokens, "
                f"and the model's context {self._num_positions}"
            )
        return messages, ids

    def _encode(self, messages: list[Message]) -> list[int]:
        return encode_chats(self._tokenizer, [self._with_system(messages)])["input_ids"][0].tolist()


class _KeptStates:
    """Key and value states, and the tokens that they are of.

    Args:
        ids: tokens of a finished run; the last ones have no states yet.
        cache: what the run has left; never changed from here on.
    """

    def __init__(self, ids: Sequence[int] = (), cache: DynamicCache | None = None):
        self._cache = DynamicCache() if cache is None else cache
        self.ids = list(ids[: self._cache.get_seq_length()])

    def beginning_of(self, ids: list[int]) -> DynamicCache:
        """Those of the longest common beginning."""
        return beginning(self._cache, _num_common(self.ids, ids))

    @property
    def states(self) -> RowStates:
        """All of them."""
        return only_row(self._cache)


def _num_common(ids: list[int], others: list[int]) -> int:
    """Length of the longest common beginning."""
    for index, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return index
    return min(len(ids), len(others))


class _StopOnRequest(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]):
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stop(), dtype=torch.bool, device=input_ids.device)
