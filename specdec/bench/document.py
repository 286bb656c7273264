"""What `specdec bench` reports: the rows, what they depend on, and who could not take part; as JSON, JSON lines or CSV.

`schema.json` beside this file describes the JSON document. Fields are added to it, never renamed or removed.
"""

import csv
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import specdec
from specdec.bench.harness import BatchResult, Method, NotAvailable, Settings
from specdec.bench.intervals import CONFIDENCE
from specdec.bench.report import MethodReport, summarise
from specdec.testing.equality import TIE_BOUND

SCHEMA_VERSION = 1
_SWEPT = ("batch_size", "max_new_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """All that is reported of a benchmark."""

    environment: dict[str, Any]
    model: str
    suite: str
    methods: list[MethodReport]
    not_available: list[NotAvailable]

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def make_document(
    results: Sequence[BatchResult],
    *,
    model: PreTrainedModel,
    model_name: str,
    suite_name: str,
    methods: Sequence[Method],
    settings: Sequence[Settings],
    not_available: Sequence[NotAvailable] = (),
    further: Mapping[str, Any] | None = None,
) -> Document:
    """Sum up what was measured.

    Args:
        settings: all that were asked for; what varies among them is a list in the environment.
        further: environment that only the caller knows: how the weights were prepared, the peers' versions.
    """
    asked = asdict(settings[0]) | {name: _one_or_all([getattr(one, name) for one in settings]) for name in _SWEPT}
    trees = {method.name: repr(method.tree) for method in methods if method.tree is not None}
    judged = {"reference": results[0].reference, "tie_bound": TIE_BOUND[model.dtype], "confidence": CONFIDENCE}
    return Document(
        environment=_environment(model) | dict(further or {}) | {"settings": asked | judged | {"trees": trees}},
        model=model_name,
        suite=suite_name,
        methods=summarise(results),
        not_available=list(not_available),
    )


def to_json(document: Document) -> str:
    return json.dumps(document.to_dict(), indent=2, allow_nan=False)


def to_jsonl(document: Document) -> str:
    """A line for every row, each with what it depends on."""
    whole = document.to_dict()
    shared = {name: whole[name] for name in ("schema_version", "environment", "model", "suite")}
    return "\n".join(json.dumps(shared | row, allow_nan=False) for row in whole["methods"])


def to_csv(document: Document) -> str:
    """A line for every row; nested values have dotted names, lists are joined by spaces."""
    shared = {"model": document.model, "suite": document.suite, **_flat("environment", document.environment)}
    rows = [shared | dict(_flatten(asdict(report))) for report in document.methods]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the document."""
    return json.loads((files("specdec.bench") / "schema.json").read_text(encoding="utf-8"))


def _one_or_all(values: list[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in _flatten(values)}


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(name, value).items()
        else:
            yield name, " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _environment(model: PreTrainedModel) -> dict[str, Any]:
    """What the numbers depend on besides the model and the prompts."""
    return {
        "specdec": specdec.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return str(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
