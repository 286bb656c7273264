"""What is answered, and each part of a stream."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

FinishReason = Literal["stop", "length", "tool_calls"]


class CompletionDetails(BaseModel):
    """Of drafted tokens, how many were kept and how many refused. Both were verified; only the kept ones count.

    Args:
        reasoning_tokens: of the completion, tags included; 0 where reasoning is not told apart.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class PromptDetails(BaseModel):
    """Tokens of the prompt whose states were there already."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails
    prompt_tokens_details: PromptDetails


class SpeculationStats(BaseModel):
    """What speculation has done for an answer, in the words of vLLM and SGLang.

    Args:
        num_rounds: verifications, of all choices.
        mean_acceptance_length: tokens that a round brought, its own one included.
        draft_acceptance_rate: of drafted tokens; null if none was drafted.
        acceptance_histogram: rounds by how many drafted tokens each kept.
    """

    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    acceptance_histogram: list[int]


class DraftedTree(BaseModel):
    """The tree of a round: for each node its parent (-1: the text so far), its text, and whether it was kept."""

    parents: list[int]
    texts: list[str]
    accepted: list[bool]


class SpeculationPart(BaseModel):
    """Of a part of a stream.

    Args:
        runs: how many of its characters, by turns, were the model's own and had been drafted.
        tree: of the last round.
    """

    num_rounds: int
    num_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    runs: list[int]
    tree: DraftedTree | None = None


class _Sparse(BaseModel):
    """Leaves out what is null in `_sparse`: not every client expects what goes beyond OpenAI's API."""

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        always = type(self).always_told()
        return {name: value for name, value in handler(self).items() if value is not None or name in always}

    @classmethod
    def always_told(cls) -> frozenset[str]:
        return frozenset()


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunctionPart(_Sparse):
    name: str | None = None
    arguments: str | None = None


class ToolCallPart(_Sparse):
    """A call, or a part of it: id and name come first."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionPart


class ReplyMessage(_Sparse):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPart] | None = None

    @classmethod
    def always_told(cls) -> frozenset[str]:
        return frozenset(("content", "refusal"))


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    speculation: SpeculationStats


class Delta(_Sparse):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPart] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_Sparse):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    speculation: SpeculationPart | SpeculationStats | None = None

    @classmethod
    def always_told(cls) -> frozenset[str]:
        return frozenset(("usage",))


class TextLogprobs(BaseModel):
    """Of the old API: lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(_Sparse):
    """An answer, and each part of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    speculation: SpeculationPart | SpeculationStats | None = None

    @classmethod
    def always_told(cls) -> frozenset[str]:
        return frozenset(("usage",))


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specdec"
    max_model_len: int
    """Tokens that a prompt and its reply can have together; vLLM's name."""
    root: str
    parent: str | None = None
    """The base, of a LoRA adapter; names as vLLM has them."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "closing"]
    model: str
