"""How many threads a model's forwards should use: more is not always faster."""

import itertools
import os
import time

import torch
from torch import nn

from specdec.stages import stage

_REPETITIONS = 7


@stage("timing threads")
@torch.inference_mode()
def calibrate_threads(model: nn.Module, num_tokens: int = 4) -> int:
    """The thread count with the fastest forward of `num_tokens` tokens, of 1, 2, 4 ... and all cores.

    Only measures: torch's setting is as before on return. Give the answer to `torch.set_num_threads`; the native
    kernels obey that too. Runs are interleaved and the best of each counts: interference only makes a run slower.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    candidates = sorted({num_cores, *itertools.takewhile(num_cores.__gt__, (2**i for i in range(10)))})
    before, best = torch.get_num_threads(), dict.fromkeys(candidates, float("inf"))
    input_ids = torch.zeros(1, num_tokens, dtype=torch.long)
    try:
        for _ in range(_REPETITIONS):
            for num_threads in candidates:
                torch.set_num_threads(num_threads)
                start = time.perf_counter()
                model(input_ids, use_cache=False)
                best[num_threads] = min(best[num_threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return min(candidates, key=best.__getitem__)
