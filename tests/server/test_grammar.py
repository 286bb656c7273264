"""Penalties and grammars are functions of the prefix, so speculation is exact under them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, PreTrainedModel

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e .[serve]")

import specdec
from specdec.drafters import PromptLookup, SmallModel
from specdec.server.grammar import GrammarError, Grammars, GrammarSource
from specdec.server.processors import RepetitionPenalties
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from tests.support.references import with_noise
from trees import TokenTree

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id
MODEL = tiny_model("llama", eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id, max_position_embeddings=512)
PROMPT = torch.tensor([list(b"a pet: ")])
MASK = {"attention_mask": torch.ones_like(PROMPT)}

GRAMMARS = Grammars(TOKENIZER, [EOS])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"type": "integer"}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def grammar_for(schema: dict[str, Any], prompt_length: int = PROMPT.shape[1]):
    return GRAMMARS.processor(GRAMMARS.compile(GrammarSource.of_schema(schema)), prompt_length)


def test_penalties_count_the_reply_only():
    penalties = RepetitionPenalties(presence=0.5, frequency=0.25, prompt_length=2)
    scores = torch.zeros(2, 5)
    out = penalties(torch.tensor([[1, 1, 3, 3, 4], [2, 2, 0, 0, 0]]), scores)
    assert out.tolist() == [[0, 0, 0, -1.0, -0.75], [-1.25, 0, 0, 0, 0]]
    assert not scores.any()
    assert torch.equal(penalties(torch.tensor([[1, 2]]), scores[:1]), scores[:1])


def test_a_mask_depends_on_the_prefix_alone():
    """Asked about prefixes in any order, left and right of what the grammar allows, as trees of drafts do."""
    text = list(b'{"name":"a","legs":4}')
    prefixes = [text[:count] for count in range(len(text) + 1)]
    prefixes += [[*text[:3], ord("z")], [*text[:3], ord("z"), ord("m")], [*text, EOS], list(b'{"legs"')]

    def masked(processor: Any, prefix: list[int]) -> list[bool]:
        scores = processor(torch.tensor([[9, 9, *prefix]]), torch.zeros(1, MODEL.config.vocab_size))
        return scores[0].isfinite().tolist()

    fresh = [masked(grammar_for(SCHEMA, 2), prefix) for prefix in prefixes]
    generator = torch.Generator().manual_seed(0)
    shared = grammar_for(SCHEMA, 2)
    for index in torch.randint(len(prefixes), (300,), generator=generator).tolist():
        assert masked(shared, prefixes[index]) == fresh[index], prefixes[index]
    allowed = [index for index, is_allowed in enumerate(fresh[len(text)]) if is_allowed]
    assert allowed == [EOS]
    assert fresh[0][ord("{")]
    assert not fresh[0][ord("a")]
    assert all(fresh[len(text) + 1]), "outside the grammar nothing is masked"


def test_a_document_does_not_remember_another_one():
    """Once rows shared a matcher that was rolled back: llguidance 1.9.1 then took one document for the other."""
    first = '{"name"\n : "[ҩ}%|丸쑵\ue237kґ@j"\n  \n  \n \n\n  \n \n\n  \n \n ,"legs"  \n : 81 '
    other = '{  \n\n\n\n\n \n "name" :\n\n "k(䝭iX|VQfbqX"  \n\n ,\n \n\n  "legs" \n \n     \n  :\n'
    processor = grammar_for(SCHEMA, prompt_length=0)
    for text, allowed in ((first, " \n}"), (other, " \n-0123456789")):
        scores = processor(torch.tensor([list(text.encode())]), torch.zeros(1, MODEL.config.vocab_size))
        assert sorted(scores[0].isfinite().nonzero()[:, 0].tolist()) == sorted(allowed.encode())


def drafters(model: PreTrainedModel) -> dict[str, Any]:
    def bushy(sequences: Any) -> list[TokenTree]:
        """Mostly wrong, some right, some outside the grammar."""
        tokens = [ord(char) for char in '"n}1{l,:e']
        parents = [-1, -1, 0, 0, 1, 2, 4, 5, 6]
        return [TokenTree(tokens=tokens, parents=parents) for _ in sequences.tokens]

    return {"lookup": PromptLookup(), "small": SmallModel(with_noise(model)), "bushy": ScriptedDrafter(bushy)}


@pytest.mark.parametrize("name", ["lookup", "small", "bushy"])
def test_greedy_speculation_is_exact_under_a_grammar(name: str):
    options = {**MASK, "max_new_tokens": 80, "do_sample": False}
    expected = MODEL.generate(PROMPT, **options, logits_processor=LogitsProcessorList([grammar_for(SCHEMA)]))
    actual = specdec.generate(
        MODEL,
        PROMPT,
        **options,
        logits_processor=LogitsProcessorList([grammar_for(SCHEMA)]),
        drafter=drafters(MODEL)[name],
    )
    assert torch.equal(actual, expected)
    ids = actual[0, PROMPT.shape[1] :].tolist()
    assert ids[-1] == EOS
    assert json.loads(TOKENIZER.decode(ids[:-1])).keys() == {"name", "legs"}


def test_ragged_rows_under_a_grammar():
    """One processor for rows that are at different places of different documents."""
    prompts = [b"a pet: ", b"cat", b"two of them: "]
    width = max(map(len, prompts))
    pad = TOKENIZER.pad_token_id
    rows = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    options = {"attention_mask": (rows != pad).long(), "max_new_tokens": 80, "do_sample": False}
    expected = MODEL.generate(
        rows, **options, logits_processor=LogitsProcessorList([grammar_for(SCHEMA, prompt_length=width)])
    )
    for drafter in drafters(MODEL).values():
        processors = LogitsProcessorList([grammar_for(SCHEMA, prompt_length=width)])
        actual = specdec.generate(MODEL, rows, **options, logits_processor=processors, drafter=drafter)
        assert torch.equal(actual, expected)
    documents = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in expected[:, width:]]
    assert all(json.loads(document).keys() == {"name", "legs"} for document in documents)
    assert len(set(documents)) == 3


def test_sampled_speculation_is_exact_under_a_grammar():
    """Few documents are possible: their frequencies are those of the target's processed distribution.

    Exact probabilities by enumeration of the documents. A chi-squared test at 1e-6; the seed is fixed.
    """
    schema = {"enum": [1, 12, 121, 2, 22]}
    documents, temperature = ["1", "12", "121", "2", "22"], 4.0

    def probability(document: str) -> float:
        ids, total = [*document.encode(), EOS], 1.0
        processor = grammar_for(schema)
        for count in range(len(ids)):
            prefix = torch.tensor([[*PROMPT[0].tolist(), *ids[:count]]])
            with torch.no_grad():
                scores = MODEL(prefix).logits[:, -1]
            total *= (processor(prefix, scores) / temperature).softmax(-1)[0, ids[count]].item()
        return total

    expected = [probability(document) for document in documents]
    assert sum(expected) == pytest.approx(1)
    num_runs = 400
    generator = torch.Generator().manual_seed(1)
    out = specdec.generate(
        MODEL,
        PROMPT.repeat(num_runs, 1),
        attention_mask=torch.ones(num_runs, PROMPT.shape[1], dtype=torch.long),
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
        temperature=temperature,
        logits_processor=LogitsProcessorList([grammar_for(schema)]),
        drafter=SmallModel(with_noise(MODEL)),
        generator=generator,
    )
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in out[:, PROMPT.shape[1] :]]
    counts = [texts.count(document) for document in documents]
    assert sum(counts) == num_runs
    wanted = [share * num_runs for share in expected]
    assert min(wanted) > 5, "the test needs that many of each"
    assert chisquare(counts, [one * num_runs / sum(wanted) for one in wanted]).pvalue > 1e-6


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, "Invalid type"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"enum": []}, "cannot be followed"),
    ],
)
def test_a_schema_that_cannot_be_followed(schema: dict[str, Any], message: str):
    with pytest.raises(GrammarError, match=message):
        GRAMMARS.compile(GrammarSource.of_schema(schema))
