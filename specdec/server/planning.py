"""From a request of the API to requests of the engine: everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from specdec.server.errors import ApiError, invalid
from specdec.server.processors import RepetitionPenalties
from specdec.server.protocol.requests import ChatRequest, CompletionRequest, Message, Tool
from specdec.server.replies.format import ReplyFormat
from specdec.text.detokenize import StopAtText
from specdec.text.prompting import encode_rendered, encode_texts, has_chat_template

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from specdec.server.grammar import Grammars

LEAST_TEMPERATURE = 1e-4
"""Below it scores overflow; 0 is greedy decoding."""


_RESERVED = frozenset(
    (
        *("messages", "tools", "documents", "conversation", "conversations", "chat_template", "template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "padding", "truncation"),
    )
)
"""Variables of chat templates, and arguments of what renders them, that are not for a request to set."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What has to be known of the model.

    Args:
        config: its own generation config.
        eos_ids: tokens that end a reply.
        vocab_size: of its scores.
        form: what its replies can hold besides text.
        context_length: tokens that a prompt and its reply can have together: the model's own limit, or the memory's.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    eos_ids: tuple[int, ...]
    vocab_size: int
    form: ReplyFormat
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
    max_drafted: int | None
    keeps_rounds: bool
    kind: str


class Planner:
    """Checks requests against the model and the limits of the server. Raises `ApiError` for what cannot be done.

    It may be used by several threads. What it does takes as long as the tokenizer does, and that is bounded: a text of
    more characters than could ever fit is refused unread.

    Args:
        grammars: None if replies cannot be held to JSON.
        max_new_tokens: of a reply, at most; also the limit of one that names none.
        max_choices: of an answer, at most.
    """

    def __init__(self, facts: ModelFacts, grammars: Grammars | None, *, max_new_tokens: int, max_choices: int):
        self.facts = facts
        self.grammars = grammars
        self.max_characters = facts.context_length * max(map(len, facts.tokenizer.get_vocab()))
        """Of a prompt: no text of more can have so few tokens as the model takes."""
        self._max_new_tokens = max_new_tokens
        self._max_choices = max_choices
        # encoding changes nothing in a tokenizer of the `tokenizers` library; what others do is not known
        self._encoding = nullcontext() if facts.tokenizer.is_fast else Lock()

    def check(self, body: ChatRequest | CompletionRequest) -> None:
        """Refuse what can be seen at a glance."""
        num_prompts = 1 if isinstance(body, ChatRequest) else len(body.prompts)
        if not num_prompts:
            raise invalid("prompt is an empty list: give at least one prompt", "prompt")
        num_choices = (body.n or 1) * num_prompts
        if num_choices > self._max_choices:
            raise invalid(
                f"{num_choices} choices are asked for (n for each prompt); this server gives at most "
                f"{self._max_choices} in one answer",
                "n",
            )
        if isinstance(body, ChatRequest) and not has_chat_template(self.facts.tokenizer):
            raise invalid(
                f"{self.facts.name} has no chat template, so it cannot hold a conversation: use /v1/completions",
                "messages",
            )
        if isinstance(body, ChatRequest) and body.may_call and self.facts.form.style is None:
            raise invalid(
                f"the chat template of {self.facts.name} has tools called in a way that is not known here; those of "
                "Hermes and Qwen 2.5 and 3, Llama 3 and Mistral are",
                "tools",
                "unsupported_parameter",
            )

    def conversation(self, body: ChatRequest) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Messages and tools as the chat template knows them."""
        tools = _tools_as_templates_know(body.tools or ()) if body.may_call else None
        return self.facts.form.taught([_as_templates_know(message) for message in body.messages], tools)

    def variables(self, body: ChatRequest) -> dict[str, Any]:
        """What a request sets of the chat template."""
        variables = dict(body.chat_template_kwargs or {})
        for name in variables:
            if name in _RESERVED or name in self.facts.tokenizer.special_tokens_map:
                raise invalid(f"chat_template_kwargs: {name} is not the request's to set", "chat_template_kwargs")
        effort, template = body.reasoning_effort, self.facts.form.template
        if effort is None:
            return variables
        if "reasoning_effort" in template:
            return {"reasoning_effort": effort, **variables}
        if "enable_thinking" in template:
            return {"enable_thinking": effort != "none", **variables}
        if effort != "none":
            raise invalid(
                f'reasoning_effort: the chat template of {self.facts.name} knows none: leave it out, or say "none"',
                "reasoning_effort",
                "unsupported_parameter",
            )
        return variables

    def encode(self, body: ChatRequest | CompletionRequest, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The tokens of the prompts of a request (of a rendered conversation), which leave room for the reply."""
        encoded = []
        for prompt in prompts:
            ids = self._encode(body, prompt) if isinstance(prompt, str) else self._known(prompt)
            if not ids:
                param = _prompt_of(body)
                raise invalid(f"{param} has no tokens: give the model something to continue", param)
            self._num_new_tokens(body, len(ids))
            encoded.append(ids)
        return encoded

    def plan(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], matcher: LLMatcher | None
    ) -> list[ChoicePlan]:
        """One plan for each choice, in order; with several prompts, `n` choices of the first come first.

        Args:
            matcher: what the replies are held to.
        """
        return [
            ChoicePlan(
                prompt=prompt,
                config=self._config(body, self._num_new_tokens(body, len(prompt))),
                seed=None if body.seed is None else _nth_seed(body.seed, index),
                logits_processor=self._processors(body, matcher, len(prompt)),
                stopping_criteria=self._criteria(body, len(prompt)),
                num_logprobs=body.num_logprobs,
                max_drafted=body.max_drafted,
                keeps_rounds=body.includes_speculation,
                kind=body.prompt_cache_key or "",
            )
            for prompt in prompts
            for index in range(body.n or 1)
        ]

    def too_long(self, body: ChatRequest | CompletionRequest, num_characters: int) -> ApiError:
        """What is said of a text that has not even been read."""
        return invalid(
            f"a prompt and its reply can have {self.facts.context_length} tokens here, which a text of "
            f"{num_characters} characters exceeds",
            _prompt_of(body),
            "context_length_exceeded",
        )

    def _encode(self, body: ChatRequest | CompletionRequest, text: str) -> list[int]:
        if len(text) > self.max_characters:
            raise self.too_long(body, len(text))
        encode = encode_rendered if isinstance(body, ChatRequest) else encode_texts
        with self._encoding:
            return encode(self.facts.tokenizer, [text])["input_ids"][0].long().tolist()

    def _known(self, prompt: list[int]) -> list[int]:
        for token in prompt:
            if token >= self.facts.vocab_size:
                raise invalid(f"there is no token {token}: the vocabulary has {self.facts.vocab_size}", "prompt")
        return prompt

    def _num_new_tokens(self, body: ChatRequest | CompletionRequest, num_prompt_tokens: int) -> int:
        context, limit = self.facts.context_length, body.limit
        room = context - num_prompt_tokens
        if room < (limit or 1):
            asked = "" if limit is None else f" and a reply of {limit}"
            raise invalid(
                f"a prompt and its reply can have {context} tokens here, which a prompt of {num_prompt_tokens}{asked} "
                "exceeds",
                _prompt_of(body),
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
            options["top_k"] = _first(body.num_likeliest, own.top_k, 0)
            options["min_p"] = _first(body.min_p, own.min_p, 0.0)
        if body.repetition_penalty is not None:
            options["repetition_penalty"] = body.repetition_penalty
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
        self, body: ChatRequest | CompletionRequest, matcher: LLMatcher | None, prompt_length: int
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
        if matcher is not None:
            from specdec.server.grammar import GrammarProcessor

            processors.append(GrammarProcessor(matcher, prompt_length))
        return processors

    def _criteria(self, body: ChatRequest | CompletionRequest, prompt_length: int) -> StoppingCriteriaList:
        if not body.stops:
            return StoppingCriteriaList()
        return StoppingCriteriaList([StopAtText(self.facts.tokenizer, body.stops, prompt_length, self.shown(body))])

    def shown(self, body: ChatRequest | CompletionRequest) -> Mapping[int, str]:
        """Special tokens that are a part of the text: the tags of what a reply is taken apart by."""
        return self.facts.form.shown if isinstance(body, ChatRequest) else {}


def _tools_as_templates_know(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _as_templates_know(message: Message) -> dict[str, Any]:
    known: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.reasoning_content:
        known["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        known["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.as_object},
            }
            for call in message.tool_calls
        ]
    return known


def _prompt_of(body: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _nth_seed(seed: int, index: int) -> int:
    """Choices differ, and the nth one is what the seed `seed + n` gives alone."""
    return (seed + index) % 2**63
