"""Batches on a Ray cluster of this machine: the same output as in one process, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specdec.batch import Settings, SpecdecBatch, run_batch
from specdec.batch.cluster import ClusterPool
from specdec.errors import WorkerError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e .[ray]")

pytestmark = pytest.mark.ray

NUM_LINES = 36
SETTINGS = Settings(max_new_tokens=16)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Without a dashboard, and without processes that nobody asked for yet."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        "local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100 * 2**20,
        _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
    )
    yield
    ray.shutdown()


def worker_options(tiny: str) -> dict[str, Any]:
    return {"model": tiny, "drafter": "prompt-lookup", "threads": 1, "max_rows": 2}


@pytest.mark.usefixtures("cluster")
def test_a_killed_workers_lines_are_done_again(tiny: str, tmp_path: Path) -> None:
    """Two workers, one of which is killed with its hands full, write the file that one process writes."""
    source = tmp_path / "in.jsonl"
    documents = [{"id": number, "prompt": "to be or not " * (1 + number % 4)} for number in range(NUM_LINES)]
    documents[5]["prompt"] = ""
    source.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    run_batch(source, tmp_path / "here.jsonl", lambda: SpecdecBatch(**worker_options(tiny)).worker, SETTINGS)
    pools: list[ClusterPool] = []
    pids: list[int] = []
    killed: list[int] = []

    def make_pool() -> ClusterPool:
        pools.append(ClusterPool(None, num_workers=2, worker_options=worker_options(tiny)))
        asked = [worker.__ray_call__.remote(lambda self: os.getpid()) for worker in pools[0]._workers]
        pids.extend(ray.get(asked))
        threading.Thread(target=kill_one, daemon=True).start()
        return pools[0]

    def kill_one() -> None:
        """As soon as one has something to do: what is reported as done may come when nobody has."""
        while not (busy := list(pools[0]._at_work.values())):
            time.sleep(0.001)
        killed.append(pids[busy[0][0]])
        os.kill(killed[0], signal.SIGKILL)

    done = run_batch(source, tmp_path / "there.jsonl", make_pool, SETTINGS)
    assert len(killed) == 1
    assert len(set(pids)) == 2
    assert (done.num_lines, done.num_errors) == (NUM_LINES - 1, 1)
    for name in ("{}.jsonl", "{}.errors.jsonl"):
        assert (tmp_path / name.format("there")).read_bytes() == (tmp_path / name.format("here")).read_bytes()


@pytest.mark.usefixtures("cluster")
def test_a_pipeline_of_ones_own(tiny: str) -> None:
    rows = [{"prompt": "to be or not " * (1 + number % 3), "number": number} for number in range(12)]
    answers = (
        ray.data.from_items(rows)
        .map_batches(
            SpecdecBatch,
            fn_constructor_kwargs={**worker_options(tiny), "settings": {"max_new_tokens": 16}},
            batch_size=6,
            concurrency=2,
            num_cpus=1,
        )
        .take_all()
    )
    assert len(answers) == len(rows)
    here = SpecdecBatch(**worker_options(tiny), settings={"max_new_tokens": 16})
    prompts = list({row["prompt"] for row in rows})
    expected = dict(zip(prompts, here({"prompt": prompts})["text"], strict=True))
    here.worker.close()
    for answer in answers:
        assert rows[answer["number"]]["prompt"] == answer["prompt"]
        assert answer["text"] == expected[answer["prompt"]]
        assert answer["error"] is None


@pytest.mark.usefixtures("cluster")
def test_pools_that_cannot_be(tiny: str) -> None:
    with pytest.raises(WorkerError, match="is connected to a Ray cluster already"):
        ClusterPool("elsewhere:6379", num_workers=1, worker_options=worker_options(tiny))
    with pytest.raises(WorkerError, match=r"3 workers .* has room for 2"):
        ClusterPool(None, num_workers=3, worker_options=worker_options(tiny))
    with pytest.raises(WorkerError, match=r"a worker cannot begin: .*there is no folder"):
        ClusterPool(None, num_workers=1, worker_options={"model": "no/such/folder"})
