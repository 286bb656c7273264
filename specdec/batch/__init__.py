"""Files of prompts: answered in one ragged batch, in order, and resumable."""

from specdec.batch.journal import Journal, JournalError
from specdec.batch.lines import BadLineError, Settings
from specdec.batch.run import BatchProgress, Pool, run_batch
from specdec.batch.specdec_batch import SpecdecBatch
from specdec.batch.worker import Answer, Worker

__all__ = [
    "Answer",
    "BadLineError",
    "BatchProgress",
    "Journal",
    "JournalError",
    "Pool",
    "Settings",
    "SpecdecBatch",
    "Worker",
    "run_batch",
]
