"""Text up to a stop string, and the criterion that stops a row there."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteriaList

import specdec
from specdec.drafters import PromptLookup
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from specdec.text.detokenize import StopAtText, TextStream

TOKENIZER = ByteTokenizer()
MODEL = tiny_model("llama", eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id)
PROMPT = torch.tensor([list(b"a pet: ")])


def told(text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stop)
    parts = [stream.add(token) for token in text.encode()]
    return [*parts, stream.finish()], stream.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcdef", [], "abcdef"),
        ("abcdef", ["cd"], "ab"),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcd", "c"], "ab"),  # the first to be complete
        ("abc", ["bcd"], "abc"),  # never complete
        ("x é y", ["é"], "x "),
        ("stop", ["stop"], ""),
        ("ends with s", ["st"], "ends with s"),
    ],
)
def test_text_up_to_a_stop_string(text: str, stop: list[str], expected: str):
    parts, is_stopped = told(text, stop)
    assert "".join(parts) == expected
    assert is_stopped == (expected != text)
    for count in range(len(parts)):  # at no time more than what is left in the end
        assert expected.startswith("".join(parts[:count]))


def test_what_cannot_become_a_stop_string_is_told_at_once():
    parts, _ = told("abxab", ["abc"])
    assert parts == ["", "", "abx", "", "", "ab"]


@pytest.mark.parametrize("text", ["one two three", "🙂 é", "aaaa"])
@pytest.mark.parametrize("stop", [["two"], ["é"], ["aa", "o t"]])
def test_the_criterion_stops_where_the_text_does(text: str, stop: list[str]):
    """And depends on the prefix alone: asked in any order, it says the same."""
    ids = list(text.encode())
    verdicts = []
    stream = TextStream(TOKENIZER, stop)
    for token in ids:
        stream.add(token)
        verdicts.append(stream.is_stopped)
    criterion = StopAtText(TOKENIZER, stop, prompt_length=2)
    for count in [*range(1, len(ids) + 1), 3, 1, len(ids), 2]:
        prefix = torch.tensor([[7, 7, *ids[:count]], [7, 7, *([1] * count)]])
        assert criterion(prefix, None).tolist() == [verdicts[count - 1], False]


def said(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_run_ends_with_the_stop_string():
    options = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 40, "do_sample": False}
    plain = MODEL.generate(PROMPT, **options)[0, PROMPT.shape[1] :].tolist()
    text = said(plain)
    stop = next(text[i : i + 2] for i in range(9, 39) if "\ufffd" not in text[i : i + 2])
    oracle = ScriptedDrafter([[plain[1 + start : 6 + start]] for start in range(0, 40, 6)])
    for drafter in (PromptLookup(), oracle):
        criteria = StoppingCriteriaList([StopAtText(TOKENIZER, [stop], prompt_length=PROMPT.shape[1])])
        out = specdec.generate(MODEL, PROMPT, **options, drafter=drafter, stopping_criteria=criteria)
        ids = out[0, PROMPT.shape[1] :].tolist()
        assert ids == plain[: len(ids)]
        assert stop in said(ids)
        assert stop not in said(ids[:-1])
