"""Files of prompts: answered in one ragged batch, in order, and resumable; on this machine or on a Ray cluster."""

from specdec.batch.journal import Journal
from specdec.batch.lines import Settings
from specdec.batch.run import BatchProgress, Pool, run_batch
from specdec.batch.specdec_batch import SpecdecBatch
from specdec.batch.worker import Answer, Worker

__all__ = [
    "Answer",
    "BatchProgress",
    "Journal",
    "Pool",
    "Settings",
    "SpecdecBatch",
    "Worker",
    "run_batch",
]
