"""The model itself as a reference, by `model.generate()` in this process."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec.audit.answers import Answer, Token
from specdec.audit.cases import Case
from specdec.models import LoadedModel
from specdec.server.processors import RepetitionPenalties
from specdec.testing.equality import TIE_BOUND
from specdec.text.prompting import encode_chats, encode_texts, has_chat_template, user_turn

_ALTERNATIVES = 8
_WINDOW = 8
"""Tokens before one that decide how it is spelled."""
_NO_GRAMMAR = "a model in this process is asked for no structured output: give a server as the reference"


class LocalModel:
    """Plain greedy decoding by transformers."""

    takes_several = False

    def __init__(self, loaded: LoadedModel):
        self._model, self._tokenizer, self._name = loaded
        self._lock = threading.Lock()

    @property
    def tie_bound(self) -> float:
        return TIE_BOUND[self._model.dtype]

    def describe(self) -> str:
        dtype = str(self._model.dtype).removeprefix("torch.")
        return f"{self._name} in this process, by transformers, {dtype} on {self._model.device}"

    def answer(self, case: Case, *, with_logprobs: bool = False) -> Answer:
        if "response_format" in case.options:
            return Answer(error=_NO_GRAMMAR, status=400)
        if case.is_chat and not has_chat_template(self._tokenizer):
            return Answer(error="the model has no chat template", status=400)
        with self._lock:
            encoded = (
                encode_chats(self._tokenizer, [user_turn(case.prompt)])
                if case.is_chat
                else encode_texts(self._tokenizer, [case.prompt])
            ).to(self._model.device)
            length = encoded["input_ids"].shape[1]
            out: Any = self._model.generate(
                **encoded,
                max_new_tokens=case.max_tokens,
                do_sample=False,
                logits_processor=_penalties(case, length),
                output_logits=with_logprobs,
                return_dict_in_generate=True,
            )
        ids = out.sequences[0, length:].tolist()
        text, is_cut = _until_stop(self._spell(ids), case.options.get("stop", ()))
        ended = is_cut or ids[-1] in _ends(self._model)
        tokens = [self._token(ids, place, logits[0]) for place, logits in enumerate(out.logits or ())]
        return Answer(
            text=text,
            tokens=tokens,
            finish="stop" if ended else "length",
            num_prompt_tokens=length,
            num_new_tokens=len(ids),
        )

    def _token(self, ids: list[int], place: int, logits_V: Tensor) -> Token:
        log_p_V = logits_V.float().log_softmax(-1)
        before = ids[max(0, place - _WINDOW) : place]
        return Token(
            text=self._piece(before, ids[place]),
            log_prob=float(log_p_V[ids[place]]),
            others={
                self._piece(before, int(token)): float(log_p_V[token]) for token in log_p_V.topk(_ALTERNATIVES).indices
            },
        )

    def _piece(self, before: list[int], token: int) -> str:
        return self._spell([*before, token]).removeprefix(self._spell(before))

    def _spell(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _penalties(case: Case, length: int) -> LogitsProcessorList:
    presence, frequency = (case.options.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency"))
    if not presence and not frequency:
        return LogitsProcessorList()
    return LogitsProcessorList([RepetitionPenalties(presence=presence, frequency=frequency, prompt_length=length)])


def _ends(model: PreTrainedModel) -> set[int]:
    ends: Any = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
