"""The target itself drafts, looking at a part of its past only; the target with its whole past verifies.

In a long text most of a token's time goes into keys and values. A few hundred slots of each layer are enough to say
nearly always what all of them say (MagicDec, Chen et al. 2025; TriForce, Sun et al. 2024), and a round reads the whole
past once for all that it verifies.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from specdec.decoding.drafter import Drafter, DraftSession, Run
from specdec.drafters.model.quantized_self import SelfSession
from specdec.errors import DraftError
from specdec.hf import num_processes
from specdec.tree_model.layer_kinds import LayerKind
from specdec.tree_model.sparse import SparseModel
from trees import Chain, Draft, GrowthPolicy, TreeBatch

Selection = Literal["attention", "window"]
_WINDOWS = ("full_attention", "sliding_attention")


class SparseSelf(Drafter):
    """Drafts with the target on a part of its own keys and values. It needs no second model and no training, and pays
    where the text is several times longer than `budget`; it drafts nothing while no row is longer.

    The chosen slots of each row are copied to a small cache and chosen anew whenever an eighth of the budget has been
    committed since: memory for at most 9/8 of `budget` slots of each row, and a draft, whatever the length of the text.

    Args:
        budget: slots of each row, layer and head of keys that the draft sees.
        select: "attention" keeps sinks, the newest slots, and those that the queries of the last draft attend to most,
            for each layer and head of keys. "window" keeps sinks and the newest. In layers with a sliding window, and
            where queries are not to be seen (eager attention), it is the newest in any case.
        num_tokens: length of the chain that it drafts, unless the call names a tree.

    Raises:
        ValueError: an argument is none of these.
        DraftError: at the call, for a target that is split over processes or has layers that keep states, select by
            themselves what to attend to, or attend within chunks.
    """

    prior_acceptance = 0.85

    def __init__(self, budget: int = 512, select: Selection = "attention", num_tokens: int = 5):
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ValueError(f"SparseSelf(budget={budget!r}): budget is a positive number of cache slots")
        if select not in get_args(Selection):
            raise ValueError(f"SparseSelf(select={select!r}): select is 'attention' or 'window'")
        self.budget = budget
        self.select: Selection = select
        self.policy: GrowthPolicy = Chain(num_tokens)

    def fits(self, run: Run) -> bool:
        """Whether a run's target can draft this way, and a long text is dear for it."""
        kinds = run.target.kinds
        is_dear = any(kind is not None and kind.sees_all for kind in kinds)
        return is_dear and num_processes(run.target.model) == 1 and all(map(_has_a_past, kinds))

    def start(self, run: Run) -> DraftSession:
        return _SparseSelfSession(run, self)

    def model_of(self, run: Run) -> SparseModel:
        """The target as it drafts, with the rows of a run.

        Raises:
            DraftError: of the target no part of the past can be taken.
        """
        if num_processes(run.target.model) > 1:
            raise DraftError("SparseSelf: the target is split over processes, and only the first one drafts")
        kind = next((kind for kind in run.target.kinds if not _has_a_past(kind)), None)
        if kind is not None:
            name = run.target.model.config.model_type
            raise DraftError(
                f"SparseSelf: a layer of this {name!r} model is of the kind {kind.name!r}, of whose past no part can "
                "be taken: draft with specdec.drafters.PromptLookup()"
            )
        model = SparseModel(run.target.model, self.budget, by_attention=self.select == "attention")
        model.begin(len(run.sequences))
        return model


def _has_a_past(kind: LayerKind | None) -> bool:
    """Whether a layer attends to slots of which some can be taken."""
    return kind is None or (kind.name in _WINDOWS and kind.has_slots and not kind.num_states)


class _SparseSelfSession(SelfSession):
    _model: SparseModel

    def __init__(self, run: Run, drafter: SparseSelf):
        super().__init__(run, run.tree or drafter.policy)
        self._budget = drafter.budget
        self._model = drafter.model_of(run)

    @property
    def attended(self) -> int:
        return self._budget

    def join(self) -> None:
        self._model.join()

    def select_rows(self, rows: Sequence[int]) -> None:
        self._model.select_rows(rows)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0 or max(self._run.target.cache.lengths) <= self._budget:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        self._model.follow(self._run.target)
        try:
            return self._grow(max_depths)
        finally:
            self._model.forget_tail()
