"""The commands as a user types them, in this process."""

from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from specdec.cli.app import app

CONTEXT_LENGTH = 256
"""Positions of the tiny models."""


PROMPT = "to be or not to be or not to be"


def specdec_command(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin)


def error_of(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def plain_text(folder: str, text: str, *, max_new_tokens: int = 16, raw: bool = False) -> str:
    """What transformers says."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = text if raw else f"user: {text}\nassistant: "
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
