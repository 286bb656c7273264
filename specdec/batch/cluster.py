"""Workers on a Ray cluster. The only file that imports Ray, and only when it is used."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from specdec.batch.lines import Job
from specdec.batch.specdec_batch import SpecdecBatch
from specdec.batch.worker import CHUNKS_IN_HAND, Answer, Pending
from specdec.errors import WorkerError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_AHEAD = 2
"""Times the chunks that the workers have in hand: while a slow one holds up the output, the others go on."""
_MAX_RETRIES = 3
"""Of a chunk whose worker has died, before it is taken to be the chunk's fault."""


class ClusterPool:
    """Workers that each hold a target and a drafter, as Ray actors. A chunk whose worker dies is done again by another.

    Args:
        address: of the cluster ("auto": the one that this machine is part of); None takes the one that this process is
            connected to, or starts one on this machine.
        num_workers: None makes one for every GPU of the cluster, or without GPUs one for every node.
        cpus: of a worker.
        worker_options: of `SpecdecBatch`.

    Raises:
        WorkerError: Ray is not installed, the cluster cannot be reached or is too small, or a worker cannot load its
            models.
    """

    def __init__(
        self, address: str | None, *, num_workers: int | None, cpus: float = 1, worker_options: dict[str, Any]
    ):
        self._ray, self._is_own = _connect(address)
        self._workers: list[ActorHandle[SpecdecBatch]] = []
        resources = self._ray.cluster_resources()
        num_gpus = int(resources.get("GPU", 0))
        num_workers = num_workers or num_gpus or sum(node["Alive"] for node in self._ray.nodes())
        room = num_gpus or int(resources.get("CPU", 0) / cpus)
        if num_workers > room:
            self.close()
            raise WorkerError(
                f"{num_workers} workers of {cpus:g} CPUs and {min(num_gpus, 1)} GPUs each do not fit into this "
                f"cluster, which has room for {room}: lower --workers"
            )
        actor = self._ray.remote(SpecdecBatch).options(
            num_cpus=cpus,
            num_gpus=1 if num_gpus else 0,
            max_concurrency=CHUNKS_IN_HAND,
            max_restarts=-1,
            max_task_retries=_MAX_RETRIES,
        )
        self._workers = [actor.remote(**worker_options) for _ in range(num_workers)]
        self._chunk_size = self._started_window()
        self.window = _AHEAD * CHUNKS_IN_HAND * self._chunk_size * num_workers
        self._chunk: list[Pending] = []
        self._waiting: deque[list[Pending]] = deque()
        self._at_work: dict[ObjectRef[list[Answer]], tuple[int, list[Pending]]] = {}

    def begin(self, job: Job) -> Pending:
        pending = Pending(job)
        self._chunk.append(pending)
        if len(self._chunk) >= self._chunk_size:
            self._send_on()
        return pending

    def wait(self) -> None:
        if self._chunk:
            self._send_on()
        done, _ = self._ray.wait(list(self._at_work), num_returns=1)
        reference: ObjectRef[list[Answer]] = done[0]
        _, chunk = self._at_work.pop(reference)
        for pending, answer in zip(chunk, self._get(reference), strict=True):
            pending.finish(answer)
        self._send()

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        if self._is_own:
            self._ray.shutdown()

    def _started_window(self) -> int:
        """The window of a worker, once it has loaded its models."""
        from ray.exceptions import RayActorError

        try:
            return self._ray.get(self._workers[0].window.remote())
        except RayActorError as error:
            self.close()
            reason = str(error).strip().splitlines()[-1]
            raise WorkerError(f"a worker cannot begin: {reason}") from error

    def _send_on(self) -> None:
        """The jobs in hand are a chunk."""
        self._waiting.append(self._chunk)
        self._chunk = []
        self._send()

    def _send(self) -> None:
        """Give chunks to the workers that have least to do, as far as any has room."""
        load = [0] * len(self._workers)
        for worker, _ in self._at_work.values():
            load[worker] += 1
        while self._waiting and min(load) < CHUNKS_IN_HAND:
            worker, chunk = load.index(min(load)), self._waiting.popleft()
            load[worker] += 1
            reference: ObjectRef[list[Answer]] = self._workers[worker].answer.remote([pending.job for pending in chunk])
            self._at_work[reference] = (worker, chunk)

    def _get(self, reference: ObjectRef[Any]) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise WorkerError(f"a worker has died {_MAX_RETRIES + 1} times over the same lines: {error}") from error


def _connect(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether the connection is this pool's own."""
    try:
        import ray
    except ImportError as error:
        raise WorkerError("Ray is not installed: pip install 'specdec-runtime[ray]'") from error
    if ray.is_initialized():
        if address is not None:
            raise WorkerError("this process is connected to a Ray cluster already: leave the address out to use that")
        return ray, False
    try:
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WorkerError(f"there is no Ray cluster at {address or 'this machine'}: {error}") from error
    return ray, True
