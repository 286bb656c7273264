"""A draft model with another tokenizer: lossless, whatever the two tokenizers do to a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import specdec
from specdec import DraftError, UnsupportedOptionError
from specdec.drafters import ForeignModel, Mixed, PromptLookup
from specdec.testing import ByteTokenizer, assert_same_tokens, tiny_model
from specdec.text.translation import Translator, continuation, decode_from, shared_tokens
from tests.support.references import plain_alone, rows_of, speculate
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact, tiny
from trees import DySpec

TEXT = (
    "the cat sat on the mat and the hat sat on the cat; a rat ran at the mat, and then the rat sat on the hat. "
    "so the cat ran at the rat, and the mat and the hat and the cat and the rat all sat and ran and sat again.\n"
)
STRANGE = [
    "Grüße, Jürgen!",
    "日本語とemoji 🤖🧪 mixed",
    "tabs\tand\n\nlines\r\n",
    "   leading",
    "é",
    "a<|eos|>b",
    "",
    "\ufffd",
]
NUM_NEW = 24


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the text; it knows every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece does it: spaces are letters, a text begins with one, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special[:3])
    tokenizer.train_from_iterator([TEXT], trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = tokenizer.get_vocab()
    for token in special:
        vocab.setdefault(token, len(vocab))
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {
        "bytes": ByteTokenizer(),
        "small": byte_level(300),
        "large": byte_level(340),
        "fallback": with_byte_fallback(),
    }


def taught(tokenizer: PreTrainedTokenizerBase, vocab_size: int, seed: int) -> PreTrainedModel:
    """A tiny model that knows the text by heart, so that two of different tokenizers agree."""
    model = tiny_model("llama", seed=seed, vocab_size=vocab_size, initializer_range=0.1).train()
    ids = torch.tensor([tokenizer.encode(TEXT * 2, add_special_tokens=False)[:200]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def target(tokenizers: dict) -> PreTrainedModel:
    return taught(tokenizers["small"], 300, seed=1)


@pytest.fixture(scope="module")
def draft(tokenizers: dict) -> PreTrainedModel:
    return taught(tokenizers["large"], 340, seed=2)


@pytest.fixture(scope="module")
def prompts(tokenizers: dict) -> dict[str, Tensor]:
    rows = [tokenizers["small"].encode(text, add_special_tokens=False) for text in (TEXT[:30], TEXT[:90], TEXT[4:14])]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# greedy


@pytest.mark.parametrize("kind", ["text", "tree of shared tokens", "mixed"])
def test_output_equals_plain_decoding(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: dict, tokenizers: dict, kind: str
) -> None:
    foreign = ForeignModel(draft, tokenizers["large"], tokenizers["small"])
    drafter = Mixed([PromptLookup(), foreign]) if kind == "mixed" else foreign
    tree = DySpec(6, max_depth=3) if kind == "tree of shared tokens" else None
    expected = plain_alone(target, prompts, NUM_NEW)
    one = rows_of(prompts, [1])
    alone = speculate(target, one, drafter, tree=tree, max_new_tokens=NUM_NEW)
    together = speculate(target, prompts, drafter, tree=tree, max_new_tokens=NUM_NEW)
    assert_same_tokens(target, expected[1:2, -NUM_NEW - one["input_ids"].shape[1] :], alone.sequences)
    assert_same_tokens(target, expected, together.sequences, prompts["attention_mask"])
    assert together.stats.acceptance_rate > 0.2, "both know the text by heart"


@pytest.mark.parametrize("own", ["bytes", "small", "fallback"])
@pytest.mark.parametrize("other", ["bytes", "fallback"])
def test_models_that_write_nonsense(tokenizers: dict, own: str, other: str) -> None:
    """Random bytes, broken characters, special tokens: drafts are dropped, the output is the target's."""
    sizes = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    model = tiny_model("llama", seed=3, vocab_size=sizes[own])
    drafter = ForeignModel(tiny_model("llama", seed=4, vocab_size=sizes[other]), tokenizers[other], tokenizers[own])
    prompt = torch.randint(sizes[own], (3, 8), generator=torch.Generator().manual_seed(0))
    prompts = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out.sequences)


def test_rows_that_stop_leave_the_draft_too(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: dict, tokenizers: dict
) -> None:
    reference = plain_alone(target, prompts, NUM_NEW)
    stops = [int(reference[row, -NUM_NEW + 4 + 6 * row]) for row in range(2)]
    options = {"eos_token_id": stops, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    expected = target.generate(**prompts, **options, do_sample=False)
    drafter = ForeignModel(draft, tokenizers["large"], tokenizers["small"])
    out = speculate(target, prompts, drafter, **options)
    assert_same_tokens(target, expected, out.sequences, prompts["attention_mask"], **options)


def test_the_draft_does_not_read_the_text_again(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: dict, tokenizers: dict
) -> None:
    sizes: list[int] = []
    hook = draft.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drafter = ForeignModel(draft, tokenizers["large"], tokenizers["small"])
    speculate(target, rows_of(prompts, [1]), drafter, max_new_tokens=60)
    hook.remove()
    assert max(sizes[1:]) <= 8


# sampling


def letters(order: Sequence[int]) -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocab = {"abcdefgh"[letter]: index for index, letter in enumerate(order)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
def test_samples_follow_the_processed_distribution(verify: str) -> None:
    """The draft has tokens that the target has not, and the other way round; the ids differ."""
    own, other = letters(range(VOCAB_SIZE)), letters([7, 3, 1, 6, 5, 0])
    assert sorted(shared_tokens(other, own)) == [(1, 3), (2, 1), (4, 5), (5, 0)]
    drafter = ForeignModel(tiny(seed=2), other, own, num_tokens=2)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter, verify=verify)


def test_q_is_the_drafts_own_distribution_over_shared_tokens() -> None:
    """If both are the same model with all tokens shared, whatever is drawn is accepted."""
    tokenizer, model = letters(range(VOCAB_SIZE)), tiny(seed=1)
    out = specdec.generate(
        model,
        torch.tensor([[1, 4, 2, 1]]),
        do_sample=True,
        top_k=0,
        max_new_tokens=13,
        num_return_sequences=20,
        drafter=ForeignModel(model, tokenizer, tokenizer, num_tokens=3),
        return_dict_in_generate=True,
    )
    assert out.stats.accepted_histogram == {3: 3 * 20}


def test_vocabularies_without_a_common_token_are_refused() -> None:
    own, other = letters(range(4)), letters([4, 5, 6, 7])
    drafter = ForeignModel(tiny(seed=2), other, own)
    with pytest.raises(DraftError, match="no token in common"):
        specdec.generate(tiny(seed=1), torch.tensor([[1, 2]]), do_sample=True, drafter=drafter, max_new_tokens=4)


def test_wrong_settings(tokenizers: dict) -> None:
    model = tiny(seed=1)
    with pytest.raises(ValueError, match="target_tokenizer is a tokenizer"):
        ForeignModel(model, tokenizers["small"], "small")
    with pytest.raises(ValueError, match="positive integer"):
        ForeignModel(model, tokenizers["small"], tokenizers["small"], num_tokens=0)
    drafter = ForeignModel(model, letters(range(VOCAB_SIZE)), letters(range(VOCAB_SIZE)))
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2]]))
    with pytest.raises(UnsupportedOptionError, match="inputs_embeds"):
        specdec.generate(model, inputs_embeds=embeds, drafter=drafter, max_new_tokens=4)


# translation


@pytest.mark.parametrize("source", ["bytes", "small", "fallback"])
@pytest.mark.parametrize("other", ["bytes", "large", "fallback"])
def test_translations_say_the_same(tokenizers: dict, source: str, other: str) -> None:
    for text in [TEXT, *STRANGE]:
        check_translation(tokenizers[source], tokenizers[other], text)


@pytest.mark.network
def test_translations_from_and_to_a_real_tokenizer(tokenizers: dict, demo_folder: Path) -> None:
    real = AutoTokenizer.from_pretrained(demo_folder)
    for text in [TEXT, *STRANGE, "<|im_start|>user\nhi<|im_end|>\n"]:
        check_translation(real, tokenizers["small"], text)
        check_translation(tokenizers["small"], real, text)
    shared = shared_tokens(tokenizers["small"], real)
    assert len(shared) > 150, "bytes, words and the end of text"
    ids = dict(shared)
    assert ids[tokenizers["small"].convert_tokens_to_ids("Ġthe")] == real.convert_tokens_to_ids("Ġthe")
    assert ids[tokenizers["small"].eos_token_id] == real.eos_token_id


def check_translation(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, text: str) -> None:
    """Token by token, as a text grows: what is aligned says the same text."""
    tokens = source.encode(text, add_special_tokens=False)
    translator = Translator(source, target)
    for end in range(1, len(tokens) + 1):
        whole = decode_from(source, tokens[:end], 0)
        if translator.update(tokens[:end]):
            said = decode_from(target, translator.ids, len(target.encode("")))
            assert said.strip() == whole.strip()
        else:
            assert whole.endswith("\ufffd") or not whole


def test_a_continuation_says_the_text_or_nothing(tokenizers: dict) -> None:
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode("the cat s", add_special_tokens=False)
        for text in ("at on the mat", " ", "ü", "<eos>", "\n\n"):
            more = continuation(tokenizer, ids, text)
            if more:
                assert decode_from(tokenizer, [*ids, *more], len(ids)) == text, name
        assert continuation(tokenizer, ids, "at on the mat"), name


def test_texts_are_not_encoded_again_from_the_beginning(tokenizers: dict) -> None:
    sizes = []

    class Counting(ByteTokenizer):
        def encode(self, text: str, **options: object) -> list[int]:
            sizes.append(len(text))
            return super().encode(text, **options)

    tokens = tokenizers["small"].encode(TEXT * 4, add_special_tokens=False)
    translator = Translator(tokenizers["small"], Counting())
    for end in range(1, len(tokens), 3):
        translator.update(tokens[:end])
    assert max(sizes) < 150
