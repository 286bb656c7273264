"""Does a server with speculative decoding say what it would say without? Asked from outside, by OpenAI's API.

    cases = make_cases(num_tokens=96)
    findings = audit(Server("http://localhost:8000/v1"), Server("http://localhost:8001/v1"), cases)
    print(as_markdown(findings))

The endpoint may be any engine's. Greedy answers are compared with those of a reference: the same server without
speculation, or the model itself in this process.
"""

from specdec.audit.answers import Answer
from specdec.audit.cases import Case, make_cases
from specdec.audit.client import Server
from specdec.audit.report import as_document, as_html, as_markdown
from specdec.audit.run import Findings, audit

__all__ = ["Answer", "Case", "Findings", "Server", "as_document", "as_html", "as_markdown", "audit", "make_cases"]
