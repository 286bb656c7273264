"""Files of prompts and answers, and a pool of workers that answers with the prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.batch.lines import Job
from specdec.batch.worker import Answer, Pending


class Echo:
    """A pool that answers with the prompt, some of them late."""

    window = 5

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._open: list[Pending] = []
        self._random = random.Random(0)

    def begin(self, job: Job) -> Pending:
        self.begun.append(job.number)
        pending = Pending(job)
        self._open.append(pending)
        return pending

    def wait(self) -> None:
        pending = self._open.pop(self._random.randrange(len(self._open)))
        if "fail" in str(pending.job.conversation):
            pending.finish(Answer(text=None, finish_reason="error", error="as it says"))
        else:
            pending.finish(Answer(text=str(pending.job.conversation), finish_reason="stop", num_tokens=1))

    def close(self) -> None:
        self._open.clear()


def write_prompts(path: Path, prompts: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]
