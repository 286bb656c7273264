"""The target's own lower layers draft (LayerSkip, Elhoushi et al. 2024; DEL, Entezari Zarch et al. 2025).

A drafted token passes the layers below the exit once: verification takes it on from there, and the keys and values
stay. After every round all layers hold the same positions, so each round may exit elsewhere, or not draft at all.

Shape legend: B rows, M nodes of a layer, E exits, T slots that were kept, P prompt, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import check_layers
from specdec.control.exits import PLAIN, ExitChoice, ExitControl, ExitObjective, TokensPerLayer, TokensPerSecond
from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.exit_combs import MAX_SIBLINGS, NO_SIBLINGS, Comb, CombGrower, SiblingStatistics
from specdec.drafters.exit_costs import RoundCosts, clock_of
from specdec.drafters.exit_evidence import ExitEvidence, OwnDrafts, Shadows
from specdec.drafters.exit_heads import ExitHead, SharedHead, TrainedHead
from specdec.drafters.growing import GrowingSession, target_scores
from specdec.errors import DraftError
from specdec.exits.module import Exit, load_exits
from specdec.exits.shipped import shipped_exits
from specdec.kernels import prepare_like, prepared
from specdec.sampling import Prefixes
from trees import Chain, ConfidentChain, Draft, GrowingTrees, GrowthPolicy, TreeBatch

SHIPPED = "shipped"

_loaded: WeakKeyDictionary[PreTrainedModel, dict[object, list[Exit]]] = WeakKeyDictionary()
"""The exits of a model by their file and its preparation. They hold parts of it, and go with it."""

_SHARED_PRIOR, _TRAINED_PRIOR = 0.1, 0.5
"""What is believed of an exit's acceptance before it has been seen at work: stock models draft badly from inside."""
_FIXED_LENGTH, _TRAINED_LENGTH, _DEL_LENGTH = 5, 6, 18
_DEL_DECAY, _TOKEN_DECAY = 0.95, 0.99
"""What is known of the exits ages by rounds in DEL; by tokens, it does not fade faster where rounds are short."""
_CHOOSE_EVERY = 4
"""Rounds for which a choice is kept while it drafts, where it is for seconds: what is known changes slowly."""
_RECOST_EVERY = 8
"""Rounds after which the costs are looked at again."""
_LONGEST_NAP = 63
"""Rounds for which the control may be left alone while plain decoding wins; each nap is three times the last."""
_PROBES = 2
"""Rounds that draft after a nap: the first has to catch up, the second shows what drafting costs."""
_PROBE = ExitChoice(exit_layer=None, length=1, threshold=0.0, sibling=0.05)
"""Drafted then by a trained exit, which is known by its drafts only."""


class EarlyExit(Drafter):
    """Drafts with the first layers of the target; no second model, and no layer computed twice.

    Ordinary checkpoints draft badly with their own head: train exits for them with `specdec train-exits`.

    Args:
        exit_layer: number of layers that draft, or "adaptive": chosen every round, as is the length (DEL).
        exits: a file of trained exit modules for this target. "shipped" takes those that come with the package, if
            there are any for this target (the demo model). None, and else, the model's own norm and head draft.
        num_tokens: length of the chain for a fixed exit, and of the longest that an adaptive one drafts. None is 5 for
            a fixed exit, 6 for adaptive trained ones, and 18 (DEL) for the model's own head.
        objective: what an adaptive exit is chosen for. "tokens-per-second" takes costs measured on this machine and
            may choose not to draft; "tokens-per-layer" is DEL's own and always drafts.
        shadow_share: adaptive, without `exits`: the share of the time that may go into comparing other exits with the
            target ("shadow tokens"). 1 compares all of them in every round, as DEL does.

    Raises:
        ValueError: an argument is none of these.
        DraftError: at the call, where the target has no such exit.
        UnsupportedModelError: at the call, for a target whose layers do not run one by one.
    """

    def __init__(
        self,
        exit_layer: int | Literal["adaptive"] = "adaptive",
        exits: str | PathLike[str] | None = SHIPPED,
        *,
        num_tokens: int | None = None,
        objective: Literal["tokens-per-second", "tokens-per-layer"] = "tokens-per-second",
        shadow_share: float = 0.03,
    ):
        if exit_layer != "adaptive" and not isinstance(exit_layer, int):
            raise ValueError(f"EarlyExit(exit_layer={exit_layer!r}): exit_layer is a number of layers or 'adaptive'")
        if num_tokens is not None and (not isinstance(num_tokens, int) or num_tokens < 1):
            raise ValueError(f"EarlyExit(num_tokens={num_tokens!r}): num_tokens is a positive integer")
        if objective not in ("tokens-per-second", "tokens-per-layer"):
            raise ValueError(
                f"EarlyExit(objective={objective!r}): objective is 'tokens-per-second' or 'tokens-per-layer'"
            )
        if not 0 < shadow_share <= 1:
            raise ValueError(f"EarlyExit(shadow_share={shadow_share!r}): shadow_share is a share of the time, up to 1")
        self.exit_layer = exit_layer
        self.num_tokens = num_tokens
        self.objective = objective
        self.shadow_share = shadow_share
        self._file = exits

    def start(self, run: Run) -> DraftSession:
        check_layers(run.target.model)
        trained = self._trained_heads(run)
        exits = range(1, run.target.num_layers)
        shared: dict[int, ExitHead] = {layer: SharedHead(layer, run.target) for layer in exits}
        if self.exit_layer == "adaptive":
            return _AdaptiveSession(self, run, trained or shared)
        heads = trained if self._file not in (None, SHIPPED) else shared | trained
        head = heads.get(self.exit_layer)
        if head is None:
            raise DraftError(f"EarlyExit(exit_layer={self.exit_layer}): the exits of this target are {sorted(heads)}")
        return _FixedSession(run, head, run.tree or Chain(self.num_tokens or _FIXED_LENGTH))

    def _trained_heads(self, run: Run) -> dict[int, ExitHead]:
        model = run.target.model
        file = shipped_exits(model) if self._file == SHIPPED else self._file
        if file is None:
            return {}
        loaded = _loaded.setdefault(model, {})
        key = fspath(file), prepared(model)
        if key not in loaded:
            loaded[key] = [prepare_like(module, model) for module in load_exits(file, model)]
        return {module.layer: TrainedHead(module, run.target, run.sequences) for module in loaded[key]}


class _ExitSession(GrowingSession):
    """Drafts from one exit a round."""

    runs_target = True

    def __init__(self, run: Run, heads: dict[int, ExitHead], policy: GrowthPolicy):
        super().__init__(run, policy)
        self._target = run.target
        self._heads = heads
        self._head: ExitHead | None = None
        self._has_begun = False
        self._num_forwards = 0
        trained = [layer for layer, head in heads.items() if isinstance(head, TrainedHead)]
        if trained:
            self._target.keep_states([*filter(None, trained), self._target.num_layers])

    @property
    def num_forwards(self) -> int:
        return self._num_forwards

    def observe(self, outcome: Outcome) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._begin()
            return
        slots = [
            [0, *(node + 1 for node in path)][: len(tokens)]
            for path, tokens in zip(outcome.paths, outcome.tokens, strict=True)
        ]
        for head in self._heads.values():
            head.observe(slots)
        if outcome.is_own or outcome.own is not None:
            self._learn(slots, outcome)

    def select_rows(self, rows: Sequence[int]) -> None:
        for head in self._heads.values():
            head.select_rows(rows)

    def _begin(self) -> None:
        for head in self._heads.values():
            head.begin()

    def _learn(self, slots: Sequence[Sequence[int]], outcome: Outcome) -> None:
        """What the round says about the exits."""

    def _score_root(self) -> Tensor:
        assert self._head is not None
        return self._head.widen(self._root_logits())

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        assert self._head is not None
        return self._head.widen(self._node_logits(grown))

    def _root_logits(self) -> Tensor:
        """Over the exit's own vocabulary, as below."""
        roots_B1 = self._run.sequences.roots_B1
        assert self._head is not None
        return self._head.score_root(self._forward(roots_B1, torch.zeros_like(roots_B1), None))

    def _node_logits(self, grown: GrowingTrees) -> Tensor:
        assert self._head is not None
        hidden_BMC = self._forward(grown.tokens_BM, grown.depths_BM, None if grown.is_chain else grown.seen_BMT)
        return self._head.score_nodes(hidden_BMC, grown)

    def _grow_comb(self, choice: ExitChoice, max_depths: Sequence[int]) -> Comb:
        """One round's combs, for a target that is greedy; at least one depth is positive."""
        grower = CombGrower(choice, max_depths)
        grown = GrowingTrees(len(max_depths), self._run.device)
        grower.grow(*self._likeliest(self._root_logits(), grown))
        while grower.is_open:
            grown.add(grower.newest)
            grower.grow(*self._likeliest(self._node_logits(grown), grown))
        return grower.finish(self._run.device)

    def _likeliest(self, logits_B1S: Tensor, grown: GrowingTrees) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities [B, K] after the newest node, best first."""
        assert self._head is not None
        if self._run.sampler.processors:
            prefixes = Prefixes(self._run.sequences, grown, grown.newest)
            scores_BV = target_scores(self._run, self._head.widen(logits_B1S), prefixes)[:, -1]
            probs_BK, tokens_BK = scores_BV.softmax(-1).topk(1 + MAX_SIBLINGS)
            return tokens_BK, probs_BK
        probs_BK, columns_BK = logits_B1S[:, -1].float().softmax(-1).topk(1 + MAX_SIBLINGS)
        return self._head.name(columns_BK), probs_BK

    def _forward(self, tokens_BM: Tensor, offsets_BM: Tensor, seen_BMK: Tensor | None) -> Tensor:
        assert self._head is not None
        self._num_forwards += 1
        if self._head.layer == 0:
            return self._target.embed(tokens_BM)
        return self._target.forward_below(self._head.layer, tokens_BM, offsets_BM, seen_BMK)


class _FixedSession(_ExitSession):
    """Always the same exit, and the same policy."""

    def __init__(self, run: Run, head: ExitHead, policy: GrowthPolicy):
        super().__init__(run, {head.layer: head}, policy)
        self._head = head

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0:
            return _nothing(self._run)
        return self._grow(max_depths)


class _AdaptiveSession(_ExitSession):
    """The exit, the length and the threshold of every round follow the context."""

    def __init__(self, drafter: EarlyExit, run: Run, heads: dict[int, ExitHead]):
        super().__init__(run, heads, run.tree or Chain(drafter.num_tokens or _FIXED_LENGTH))
        layers, num_rows = sorted(heads), len(run.sequences)
        trained = {layer: head for layer, head in heads.items() if isinstance(head, TrainedHead)}
        self._prior = _TRAINED_PRIOR if trained else _SHARED_PRIOR
        self._clock = clock_of(run.target.device)
        max_length = drafter.num_tokens or (_TRAINED_LENGTH if trained else _DEL_LENGTH)
        self._costs: RoundCosts | None = None
        if drafter.objective == "tokens-per-second":
            self._costs = RoundCosts(run.target, [heads[layer] for layer in layers], num_rows, max_length)
        self._grows_combs = bool(trained) and self._costs is not None and run.tree is None and not run.sampler.do_sample
        self._comb: Comb | None = None
        self._siblings = SiblingStatistics()
        self._control = ExitControl(
            layers,
            num_rows=num_rows,
            objective=self._objective(0.0),
            max_length=max_length,
            decay=_DEL_DECAY if self._costs is None else _TOKEN_DECAY,
            decay_per_token=self._costs is not None,
        )
        self._evidence: ExitEvidence = (
            OwnDrafts(run, self._control, trained)
            if trained
            else Shadows(run, self._control, layers, drafter.shadow_share, self._confidence)
        )
        self._choice = PLAIN
        self._draft = _nothing(run)
        self._scores: list[Tensor] = []
        self._nap = self._nap_left = 0
        self._num_rounds = self._steps = self._num_probes = 0
        self._was_idle = True
        self._draft_seconds = self._proposed = 0.0

    @property
    def control_seconds(self) -> float:
        return self._evidence.seconds

    def explain(self) -> dict[str, Any]:
        choice, statistics = self._choice, self._control.statistics
        return {
            "exit_layer": choice.exit_layer,
            "length": choice.length,
            "threshold": choice.threshold,
            "sibling": choice.sibling,
            "acceptance": dict(zip(statistics.candidates, statistics.acceptance_BE.mean(0).tolist(), strict=True)),
        }

    def propose(self, max_depths: Sequence[int]) -> Draft:
        choice = self._choice = self._choose(max(max_depths))
        self._head = None if choice.exit_layer is None else self._heads[choice.exit_layer]
        self._evidence.prepare(choice.exit_layer)
        started, before = self._clock(), self._num_forwards
        self._comb = None
        if self._head is None:
            self._draft = _nothing(self._run)
        elif self._grows_combs:
            self._comb = self._grow_comb(choice, max_depths)
            self._draft = self._comb.draft
        else:
            self.policy = self._run.tree or ConfidentChain(choice.length, choice.threshold)
            self._draft = self._grow(max_depths)
        self._steps = self._num_forwards - before
        self._proposed = self._clock()
        self._draft_seconds = self._proposed - started
        return self._draft

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self._was_idle |= not outcome.is_own

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self._control.select_rows(rows)

    def _begin(self) -> None:
        super()._begin()
        self._evidence.seed()

    def _score_root(self) -> Tensor:
        self._scores = [super()._score_root()]
        return self._scores[0]

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        self._scores.append(super()._score_nodes(grown))
        return self._scores[-1]

    def _confidence(self) -> Tensor:
        """Largest probability at each slot that was scored in this round, [B, K]: the root, then the nodes by place."""
        return torch.cat(self._scores, 1).softmax(-1).amax(-1)

    def _choose(self, deepest: int) -> ExitChoice:
        """The control's choice. While plain decoding wins, it is asked ever more seldom."""
        if self._nap_left:
            self._nap_left -= 1
            return PLAIN
        if deepest == 0:
            return PLAIN
        if self._nap and self._evidence.needs_drafts:
            if self._num_probes < _PROBES:
                self._num_probes += 1
                return replace(_PROBE, exit_layer=max(self._heads))
            self._num_probes = 0
            self._recost()
        drafted = self._choice.exit_layer is not None and not self._nap
        if drafted and self._num_rounds % _CHOOSE_EVERY and self._costs is not None:
            return self._choice
        choice = self._control.choose(deepest)
        if choice.exit_layer is not None:
            self._nap = 0
        else:
            self._nap = min(3 * self._nap + 1, _LONGEST_NAP)
            self._nap_left = self._nap - 1
        return choice

    def _learn(self, slots: Sequence[Sequence[int]], outcome: Outcome) -> None:
        layer, was_idle = self._choice.exit_layer, self._was_idle
        self._was_idle = layer is None
        if self._nap_left and self._evidence.needs_drafts:
            return
        if self._costs is not None and outcome.is_own:  # else others have drafted and been verified in that time
            rest_seconds = self._clock() - self._proposed
            steps = 0 if was_idle else self._steps  # what was committed while it was idle, an exit reads first
            self._costs.note(layer, steps, self._draft_seconds, max(self._draft.trees.sizes), rest_seconds)
        if self._comb is not None and not outcome.is_own:
            return  # the nodes of a merged tree are not the comb's
        if self._comb is not None:
            self._siblings.observe(self._comb, outcome)
            paths = [self._comb.along(row, path) for row, path in enumerate(outcome.paths)]
            outcome = replace(outcome, paths=paths)
            slots = [row_slots[: len(path) + 1] for row_slots, path in zip(slots, paths, strict=True)]
        self._evidence.learn(slots, outcome, self._draft, layer)
        self._num_rounds += 1
        if self._num_rounds % _RECOST_EVERY == 0:
            self._recost()

    def _recost(self) -> None:
        self._control.objective = self._objective(self._evidence.seconds / max(self._num_rounds, 1))

    def _objective(self, shadow_seconds: float) -> ExitObjective:
        if self._costs is None:
            return TokensPerLayer(num_layers=self._target.num_layers)
        siblings = self._siblings if self._grows_combs else NO_SIBLINGS
        return TokensPerSecond(
            self._costs.current(shadow_seconds),
            rescue=siblings.rescue,
            num_siblings=siblings.number,
            prior_acceptance=self._prior,
        )


def _nothing(run: Run) -> Draft:
    return Draft(trees=TreeBatch.empty(len(run.sequences), run.device))
