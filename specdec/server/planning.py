"""From a request of the API to requests of the engine: everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from specdec.prompting import encode_chats, encode_texts, has_chat_template
from specdec.server.errors import invalid
from specdec.server.processors import RepetitionPenalties
from specdec.server.protocol import ChatRequest, CompletionRequest, ResponseFormat
from specdec.text import StopAtText

if TYPE_CHECKING:
    from specdec.server.grammar import Grammars

LEAST_TEMPERATURE = 1e-4
"""Below it scores overflow; 0 is greedy decoding."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What has to be known of the model.

    Args:
        config: its own generation config.
        eos_ids: tokens that end a reply.
        vocab_size: of its scores.
        context_length: tokens that a prompt and its reply can have together: the model's own limit, or the memory's.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    eos_ids: tuple[int, ...]
    vocab_size: int
    context_length: int


@dataclass(frozen=True, kw_only=True)
class ChoicePlan:
    """What the engine is to do for one choice of an answer; arguments of `specdec.engine.Request`."""

    prompt: list[int]
    config: GenerationConfig
    seed: int | None
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    num_logprobs: int | None


class Planner:
    """Checks requests against the model and the limits of the server. Raises `ApiError` for what cannot be done.

    Args:
        grammars: None if replies cannot be held to JSON.
        max_new_tokens: of a reply, at most; also the limit of one that names none.
        max_choices: of an answer, at most.
    """

    def __init__(self, facts: ModelFacts, grammars: Grammars | None, *, max_new_tokens: int, max_choices: int):
        self.facts = facts
        self._grammars = grammars
        self._max_new_tokens = max_new_tokens
        self._max_choices = max_choices

    def plan_chat(self, body: ChatRequest) -> list[ChoicePlan]:
        """One plan for each choice, in order. Takes as long as the tokenizer does."""
        return self._plan(body, [self._encode_chat(body)])

    def plan_completion(self, body: CompletionRequest) -> list[ChoicePlan]:
        """The same; with several prompts, `n` choices of the first come first."""
        if not body.prompts:
            raise invalid("prompt is an empty list: give at least one prompt", "prompt")
        return self._plan(body, [self._encode_prompt(prompt) for prompt in body.prompts])

    def _plan(self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[ChoicePlan]:
        num_choices = body.n or 1
        if num_choices * len(prompts) > self._max_choices:
            raise invalid(
                f"{num_choices * len(prompts)} choices are asked for (n for each prompt); this server gives at most "
                f"{self._max_choices} in one answer",
                "n",
            )
        grammar = self._grammar(body.response_format)
        return [
            ChoicePlan(
                prompt=prompt,
                config=self._config(body, self._num_new_tokens(body, len(prompt))),
                seed=None if body.seed is None else _nth_seed(body.seed, place),
                logits_processor=self._processors(body, grammar, len(prompt)),
                stopping_criteria=self._criteria(body, len(prompt)),
                num_logprobs=body.num_logprobs,
            )
            for prompt in prompts
            for place in range(num_choices)
        ]

    def _encode_chat(self, body: ChatRequest) -> list[int]:
        tokenizer = self.facts.tokenizer
        if not has_chat_template(tokenizer):
            raise invalid(
                f"{self.facts.name} has no chat template, so it cannot hold a conversation: use /v1/completions",
                "messages",
            )
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in body.messages
        ]
        try:
            ids: list[int] = encode_chats(tokenizer, [messages])["input_ids"][0].tolist()
        except ValueError as error:
            raise invalid(str(error), "messages") from error
        return self._checked(ids, "messages")

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = encode_texts(self.facts.tokenizer, [prompt])["input_ids"][0].long().tolist()
            return self._checked(ids, "prompt")
        for token in prompt:
            if token >= self.facts.vocab_size:
                raise invalid(f"there is no token {token}: the vocabulary has {self.facts.vocab_size}", "prompt")
        return self._checked(prompt, "prompt")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise invalid(f"{param} has no tokens: give the model something to continue", param)
        return ids

    def _num_new_tokens(self, body: ChatRequest | CompletionRequest, num_prompt_tokens: int) -> int:
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        context, limit = self.facts.context_length, body.limit
        room = context - num_prompt_tokens
        if room < (limit or 1):
            asked = "" if limit is None else f" and a reply of {limit}"
            raise invalid(
                f"a prompt and its reply can have {context} tokens here, which a prompt of {num_prompt_tokens}{asked} "
                "exceeds",
                param,
                "context_length_exceeded",
            )
        if limit is None:
            return min(room, self._max_new_tokens)
        if limit > self._max_new_tokens:
            raise invalid(
                f"a reply of {limit} tokens is asked for; this server's limit is {self._max_new_tokens}", "max_tokens"
            )
        return limit

    def _config(self, body: ChatRequest | CompletionRequest, max_new_tokens: int) -> GenerationConfig:
        """What is not asked for is the model's own; what that leaves open is OpenAI's default, not transformers'."""
        own = self.facts.config
        temperature = _first(body.temperature, own.temperature, 1.0)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            if temperature < LEAST_TEMPERATURE:
                raise invalid(
                    f"temperature is 0 (greedy decoding) or at least {LEAST_TEMPERATURE}, got {temperature}",
                    "temperature",
                )
            options["temperature"] = temperature
            options["top_p"] = _first(body.top_p, own.top_p, 1.0)
            options["top_k"] = _first(body.top_k, own.top_k, 0)
        if body.logit_bias:
            options["sequence_bias"] = [[[token], bias] for token, bias in self._biases(body.logit_bias).items()]
        if self.facts.eos_ids:
            options["eos_token_id"] = list(self.facts.eos_ids)
        return GenerationConfig(**options)

    def _biases(self, logit_bias: dict[str, float]) -> dict[int, float]:
        biases = {int(token): float(bias) for token, bias in logit_bias.items()}
        for token in biases:
            if token >= self.facts.vocab_size:
                raise invalid(f"there is no token {token}: the vocabulary has {self.facts.vocab_size}", "logit_bias")
        return biases

    def _processors(
        self, body: ChatRequest | CompletionRequest, grammar: str | None, prompt_length: int
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if body.presence_penalty or body.frequency_penalty:
            processors.append(
                RepetitionPenalties(
                    presence=body.presence_penalty or 0.0,
                    frequency=body.frequency_penalty or 0.0,
                    prompt_length=prompt_length,
                )
            )
        if grammar is not None:
            assert self._grammars is not None
            processors.append(self._grammars.processor(grammar, prompt_length))
        return processors

    def _criteria(self, body: ChatRequest | CompletionRequest, prompt_length: int) -> StoppingCriteriaList:
        if not body.stops:
            return StoppingCriteriaList()
        return StoppingCriteriaList([StopAtText(self.facts.tokenizer, body.stops, prompt_length)])

    def _grammar(self, wanted: ResponseFormat | None) -> str | None:
        if wanted is None or wanted.type == "text":
            return None
        from specdec.server.grammar import ANY_OBJECT, GrammarError

        if self._grammars is None:
            raise invalid(
                f"{self.facts.name} cannot be held to JSON: no token ends its replies, or its tokenizer is slow",
                "response_format",
            )
        try:
            return self._grammars.compile(ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.schema_)
        except GrammarError as error:
            raise invalid(str(error), "response_format", "invalid_schema") from error


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _nth_seed(seed: int, place: int) -> int:
    """Choices differ, and the nth one is what the seed `seed + n` gives alone."""
    return (seed + place) % 2**63
