"""For tests, ours and those of anyone who writes a drafter: tiny models, a byte tokenizer, a scripted drafter.

    model = tiny_model("llama")
    out = specdec.generate(model, ids, drafter=ScriptedDrafter([[[5, 6, 7]], [[8]]]), max_new_tokens=20)
    assert_same_tokens(model, model.generate(ids, max_new_tokens=20), out)

Nothing is downloaded. The models are random, but their weights are large enough that a token and its runner-up
differ by far more than rounding does, and that outputs do not settle on one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter, DraftSession, Run
from specdec.testing.equality import TIE_BOUND, Verdict, compare
from trees import ROOT, Draft, TokenTree, TreeBatch

__all__ = [
    "BYTE_VOCAB_SIZE",
    "FAMILIES",
    "ByteTokenizer",
    "ScriptedDrafter",
    "assert_same_tokens",
    "random_prompts",
    "tiny_model",
]

BYTE_VOCAB_SIZE = 259
"""Tokens of `ByteTokenizer`: 256 bytes and three special ones."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_WINDOW = 16
_STD = 0.3

_FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": _WINDOW},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": _WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "gpt_neox": {},
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": _WINDOW},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "init_std": _STD, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {"sliding_window": _WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": _WINDOW},
}

FAMILIES = tuple(_FAMILY_SETTINGS)
"""`config.model_type` of every family that `tiny_model` knows settings for and our tests cover."""


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    vocab_size: int = BYTE_VOCAB_SIZE,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A random causal LM of two layers and 32 channels, on the CPU, in evaluation mode.

    It has no special tokens, so it never stops by itself: pass `eos_token_id=` here or to `generate()`. Families
    with sliding windows get one of 16 tokens, so that short tests run past it.

    Args:
        family: one of `FAMILIES`, or another `model_type` of transformers with the same names of settings.
        seed: of the weights; torch's global randomness is left as it is.
        attn_implementation: "sdpa", "eager" or None for transformers' choice (sdpa where the family has it).
        config_overrides: fields of the family's configuration.
    """
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": _STD,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **_FAMILY_SETTINGS.get(family, {}),
        **config_overrides,
    }
    config = AutoConfig.for_model(family, **settings)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention).eval()


def random_prompts(lengths: Sequence[int], *, vocab_size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded prompts: `input_ids` and `attention_mask`, both int64 [B, longest].

    Args:
        lengths: tokens of each row.
        vocab_size: ids are drawn below it; few different ones make texts that repeat themselves.
    """
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (len(lengths), width), generator=generator)
    attention_mask = (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


class ByteTokenizer(PreTrainedTokenizerFast):
    """One token a byte, with the byte's value as its id; then `<|pad|>`, `<|eos|>` and `<|bos|>`.

    It adds no special tokens to a text, pads to the left, and has a chat template of one line a message.
    """

    def __init__(self, **settings: Any):
        defaults = {
            "tokenizer_object": _byte_backend(),
            "pad_token": "<|pad|>",
            "eos_token": "<|eos|>",
            "bos_token": "<|bos|>",
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],  # models of our families take no token types
            "chat_template": _CHAT_TEMPLATE,
        }
        super().__init__(**{**defaults, **settings})


def _byte_backend() -> Tokenizer:
    backend = Tokenizer(BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|eos|>", "<|bos|>"])
    return backend


Proposal: TypeAlias = Sequence[TokenTree | Sequence[int]]
"""One draft for each row: a tree, or tokens that stand for a chain."""


class ScriptedDrafter(Drafter):
    """Proposes what it is told.

    Args:
        script: a proposal for every round, each with a draft for every row of the caller's batch (rows that have
            finished are passed over; once the script has run out, nothing is proposed); or a function that is
            called every round with the committed tokens and returns drafts for the unfinished rows.
        q: float32, broadcast to [B, T, V]: the distribution that the drafts were drawn from (see `trees.Draft`).
            None says that no chance was involved.
    """

    def __init__(self, script: Iterable[Proposal] | Callable[[Sequences], Proposal], q: Tensor | None = None):
        self.script = script if callable(script) else list(script)
        self.q = q

    def start(self, run: Run) -> DraftSession:
        return _ScriptedSession(self, run)


class _ScriptedSession(DraftSession):
    def __init__(self, drafter: ScriptedDrafter, run: Run):
        self._drafter = drafter
        self._run = run
        self._num_proposals = 0

    def propose(self, max_depths: Sequence[int]) -> Draft:
        drafts = [draft if isinstance(draft, TokenTree) else TokenTree.chain(draft) for draft in self._next_proposal()]
        cut = [_cut(tree, depth) for tree, depth in zip(drafts, max_depths, strict=True)]
        trees = TreeBatch.stack(cut, self._run.device)
        q = self._drafter.q
        return Draft(trees=trees, q_BTV=None if q is None else q.expand(trees.num_rows, trees.num_slots, -1))

    def _next_proposal(self) -> Proposal:
        script, sequences = self._drafter.script, self._run.sequences
        if callable(script):
            return script(sequences)
        index = self._num_proposals
        self._num_proposals += 1
        return [script[index][row] if index < len(script) else [] for row in sequences.rows]


def _cut(tree: TokenTree, max_depth: int) -> TokenTree:
    """The nodes that can still be committed."""
    kept = [node for node, depth in enumerate(tree.depths) if depth <= max_depth]
    new_index = {ROOT: ROOT, **{node: index for index, node in enumerate(kept)}}
    return TokenTree(
        tokens=[tree.tokens[node] for node in kept], parents=[new_index[tree.parents[node]] for node in kept]
    )


def assert_same_tokens(
    model: PreTrainedModel,
    expected: Tensor,
    actual: Tensor,
    attention_mask: Tensor | None = None,
    **generation_kwargs: Any,
) -> None:
    """Assert that two greedy outputs agree up to numerical ties.

    A first difference is forgiven if the logits of the two tokens are closer than the bound of the model's dtype
    in `specdec.testing.equality.TIE_BOUND` (what follows it differs by right).

    Args:
        model: the target; asked for its logits if rows differ.
        expected: int64 [B, L] what `model.generate()` returned, prompt included.
        actual: int64 [B, L] what is being tested.
        attention_mask: [B, P] of the prompt, if it is padded.
        generation_kwargs: options of both calls that change logits (`repetition_penalty=...`).

    Raises:
        AssertionError: says which row differs, where, in which tokens and by how much.
    """
    mask = torch.ones_like(expected[:, :1]) if attention_mask is None else attention_mask
    prompt_length = mask.shape[1]
    for row, (expected_L, actual_L, mask_P) in enumerate(zip(expected, actual, mask, strict=True)):
        assert torch.equal(expected_L[:prompt_length], actual_L[:prompt_length]), f"row {row}: the prompts differ"
        prompt_ids = expected_L[:prompt_length][mask_P.bool()]
        reference, output = expected_L[prompt_length:].tolist(), actual_L[prompt_length:].tolist()
        comparison = compare(model, prompt_ids, reference, output, {"do_sample": False, **generation_kwargs})
        assert comparison.verdict is not Verdict.DIFFERENT, (
            f"row {row}: {comparison} (a tie is a gap under {TIE_BOUND[model.dtype]})\n"
            f"  expected {reference}\n  actual   {output}"
        )
