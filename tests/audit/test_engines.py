"""Our own server passes, by every reference, and llama.cpp's where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specdec.audit import Server, as_markdown, audit, make_cases
from specdec.audit.cases import LIMITS, STRUCTURE
from specdec.audit.local import LocalModel
from specdec.audit.verdicts import Verdict
from specdec.drafters import Plain
from specdec.models import LoadedModel
from tests.support.tiny_gguf import write_tiny_gguf

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install -e .[serve]")
from tests.support.serving import NAME, TOKENIZER, running, served_model

CASES = make_cases(num_tokens=32, quick=True)
_FEW = ("a list", "2 words agree", "within a name", "frequency 0.7, a list", "an object", "at most 5 tokens")
OWN = [case for case in CASES if case.name in _FEW]


def test_our_server_beside_one_without_speculation() -> None:
    model = served_model(max_position_embeddings=1024)
    with running(model) as speculating, running(model, engine_options={"drafter": Plain()}) as plain:
        findings = audit(Server(speculating.url), Server(plain.url), OWN, concurrency=(1, 4), context_length=1024)
    assert findings.is_clean, as_markdown(findings)
    assert findings.count(Verdict.NOT_CHECKED, Verdict.REFUSED) == 0, as_markdown(findings)
    assert findings.num_accepted


def test_our_server_beside_its_model() -> None:
    model = served_model(max_position_embeddings=1024)
    cases = [case for case in OWN if case.group != STRUCTURE]
    with running(model) as served:
        findings = audit(Server(served.url), LocalModel(LoadedModel(model, TOKENIZER, NAME)), cases, concurrency=(4,))
    assert findings.is_clean, as_markdown(findings)
    assert findings.count(Verdict.NOT_CHECKED) == 0


def test_a_model_that_is_not_the_servers_is_found() -> None:
    model, other = served_model(max_position_embeddings=1024), served_model(max_position_embeddings=1024, seed=1)
    cases = [case for case in OWN if case.group == LIMITS]
    with running(model) as served:
        findings = audit(Server(served.url), LocalModel(LoadedModel(other, TOKENIZER, NAME)), cases, concurrency=(1,))
    assert not findings.is_clean


@contextmanager
def llama_server(path: Path, kind: str) -> Iterator[str]:
    xllamacpp: Any = pytest.importorskip("xllamacpp", reason="the extra `peers` is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 4 * 2048, 4, 0, 0
    params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.mark.slow  # with `make test-all`, which installs llama.cpp
def test_the_server_of_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, context_length=2048)
    cases = [case for case in OWN if case.group != STRUCTURE]
    with llama_server(path, "NGRAM_SIMPLE") as speculating, llama_server(path, "NONE") as plain:
        findings = audit(Server(speculating), Server(plain), cases, concurrency=(1, 4))
    assert findings.count(Verdict.IDENTICAL, Verdict.TIE, Verdict.DIFFERENT) > len(cases)
    assert findings.is_clean, as_markdown(findings)
