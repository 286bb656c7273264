"""From what a person wrote to what a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Message: TypeAlias = dict[str, str]

NO_CHAT_TEMPLATE = (
    "this model has no chat template, so it cannot hold a conversation; "
    "`specdec generate --raw` continues a text with it"
)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def user_turn(text: str, system: str | None = None) -> list[Message]:
    """A conversation that starts with `text`."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """Texts as they are: `input_ids` and `attention_mask`, [B, P], left-padded."""
    return _encode(tokenizer, texts, add_special_tokens=True)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """Texts that hold the special tokens they need: `input_ids` and `attention_mask`, [B, P], left-padded."""
    return _encode(tokenizer, texts, add_special_tokens=False)


def encode_chats(tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]) -> BatchEncoding:
    """Conversations through the chat template, up to where the reply begins: [B, P], left-padded.

    Raises `ValueError` if the template refuses a conversation (some know no system role), or has an error.
    """
    return encode_rendered(tokenizer, [render_chat(tokenizer, messages) for messages in conversations])


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> str:
    """A conversation as the chat template writes it, up to where the reply begins, for `encode_rendered`.

    Args:
        options: `tools` and other variables of the template.

    Raises `ValueError` if the template refuses the conversation, or has an error.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise ValueError(template_refusal(str(error))) from error
    except Exception as error:  # a template is a program, and fails like one
        raise ValueError(template_failure(f"{type(error).__name__}: {error}")) from error


def template_refusal(reason: str) -> str:
    return f"the model's chat template refuses this conversation: {reason}"


def template_failure(reason: str) -> str:
    return f"the model's chat template fails on this conversation ({reason}): the template has an error"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """Each text as one user turn if the tokenizer has a chat template, and as it is otherwise."""
    if has_chat_template(tokenizer):
        return encode_chats(tokenizer, [user_turn(text) for text in texts])
    return encode_texts(tokenizer, texts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> BatchEncoding:
    needs_padding = len(texts) > 1
    if needs_padding and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=needs_padding,
        padding_side="left",
        return_token_type_ids=False,
        return_tensors="pt",
    )
