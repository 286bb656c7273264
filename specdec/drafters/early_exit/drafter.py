"""The target's own lower layers draft (LayerSkip, Elhoushi et al. 2024; DEL, Entezari Zarch et al. 2025).

A drafted token passes the layers below the exit once: verification takes it on from there, and the keys and values
stay. After every round all layers hold the same positions, so each round may exit elsewhere, or not draft at all.

Shape legend: B rows, M nodes of a layer, E exits, T slots that were kept, P prompt, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.early_exit.choice import TokensPerSecond
from specdec.drafters.early_exit.del_rule import TokensPerLayer
from specdec.drafters.early_exit.heads import ExitHead, SharedHead, TrainedHead
from specdec.drafters.early_exit.rule import ExitRule
from specdec.drafters.early_exit.shadows import ShadowTokens
from specdec.drafters.model.growing import GrowingSession
from specdec.errors import DraftError
from specdec.exits.module import Exit, load_exits
from specdec.exits.shipped import shipped_exits
from specdec.kernels import prepare_like, prepared
from specdec.kernels.model.profile import profile_of
from specdec.tree_model.compatibility import check_layers
from specdec.tree_model.early_exit import EarlyExitModel
from trees import Chain, Draft, GrowingTrees, GrowthPolicy, TreeBatch

SHIPPED = "shipped"

_FIXED_LENGTH, _TRAINED_LENGTH, _DEL_LENGTH = 5, 6, 18


class _Loaded(dict[object, list[Exit]]):
    """The exits of a model by their file and its preparation. They hold parts of it, and go with it."""


class EarlyExit(Drafter):
    """Drafts with the first layers of the target; no second model, and no layer computed twice.

    With the head of an ordinary checkpoint early layers are rarely right: train exits with
    `specdec train-head --kind exit`.

    Args:
        exit_layer: number of layers that draft, or "adaptive": chosen every round, as is the length (DEL).
        exits: a file of trained exit modules for this target. "shipped" takes those that come with the package, if
            there are any for this target (the demo model). Without trained exits the model's final norm and LM head
            are used; None does so in any case.
        num_tokens: length of the chain for a fixed exit, and of the longest that an adaptive one drafts. None is 5 for
            a fixed exit, 6 for adaptive trained ones, and 18 (DEL) for the model's own head.
        objective: what an adaptive exit is chosen for. "tokens-per-second" takes costs measured on this machine, may
            choose not to draft, and drafts chains of 16 tokens at most; "tokens-per-layer" is DEL's own and always
            drafts.
        shadow_share: adaptive, without `exits`: the share of the time that may go into comparing other exits with the
            target ("shadow tokens"). 1 compares all of them in every round, as DEL does.

    Raises:
        ValueError: an argument is none of these.
        DraftError: at the call, where the target has no such exit.
        UnsupportedModelError: at the call, for a target whose layers do not run one by one.
    """

    needs_exits = True

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
        target = _exit_model(run)
        trained = self._trained_heads(run, target)
        exits = range(1, target.num_layers)
        shared: dict[int, ExitHead] = {layer: SharedHead(layer, target) for layer in exits}
        if self.exit_layer == "adaptive":
            heads = trained or shared
            return _AdaptiveSession(run, heads, self._rule(run, target, heads))
        heads = trained if self._file not in (None, SHIPPED) else shared | trained
        head = heads.get(self.exit_layer)
        if head is None:
            raise DraftError(f"EarlyExit(exit_layer={self.exit_layer}): the exits of this target are {sorted(heads)}")
        return _FixedSession(run, head, run.tree or Chain(self.num_tokens or _FIXED_LENGTH))

    def _rule(self, run: Run, target: EarlyExitModel, heads: dict[int, ExitHead]) -> ExitRule:
        layers = sorted(heads)
        is_trained = any(isinstance(head, TrainedHead) for head in heads.values())
        max_length = self.num_tokens or (_TRAINED_LENGTH if is_trained else _DEL_LENGTH)
        # an exit module computes nothing unless it drafts
        shadows = None if is_trained else ShadowTokens(run, target, layers, self.shadow_share)
        if self.objective == "tokens-per-layer":
            return TokensPerLayer(layers, num_layers=target.num_layers, max_length=max_length, shadows=shadows)
        return TokensPerSecond(run, [heads[layer] for layer in layers], max_length=max_length, shadows=shadows)

    def _trained_heads(self, run: Run, target: EarlyExitModel) -> dict[int, ExitHead]:
        model = target.model
        file = shipped_exits(model) if self._file == SHIPPED else self._file
        if file is None:
            return {}
        profile, key = profile_of(model), (fspath(file), prepared(model))
        loaded = profile.part(_Loaded)
        with profile.lock:
            if key not in loaded:
                loaded[key] = [prepare_like(module, model) for module in load_exits(file, model)]
        return {module.layer: TrainedHead(module, target, run.sequences) for module in loaded[key]}


class _ExitSession(GrowingSession):
    """Drafts from one exit a round."""

    runs_target = True

    def __init__(self, run: Run, heads: dict[int, ExitHead], policy: GrowthPolicy):
        super().__init__(run, policy)
        self._target = _exit_model(run)
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

    @property
    def _vocab_ids(self) -> Tensor | None:
        return None if self._head is None else self._head.vocab_ids

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
        roots_B1 = self._run.sequences.roots_B1
        assert self._head is not None
        return self._head.score_root(self._forward(roots_B1, torch.zeros_like(roots_B1), None))

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        assert self._head is not None
        hidden_BMC = self._forward(grown.tokens_BM, grown.depths_BM, None if grown.is_chain else grown.seen_BMT)
        return self._head.score_nodes(hidden_BMC, grown)

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
    """A rule chooses the exit and the shape of every draft."""

    def __init__(self, run: Run, heads: dict[int, ExitHead], rule: ExitRule):
        super().__init__(run, heads, run.tree or Chain(_FIXED_LENGTH))
        self._rule = rule
        self._draft: Draft | None = None
        """Of the round under way, if this session was asked for one."""

    @property
    def control_seconds(self) -> float:
        return self._rule.control_seconds

    def explain(self) -> dict[str, Any]:
        return self._rule.explain()

    def propose(self, max_depths: Sequence[int]) -> Draft:
        choice, before = self._rule.choose(max_depths), self._num_forwards
        self._head = None if choice is None else self._heads[choice.exit_layer]
        if choice is None:
            self._draft = _nothing(self._run)
        else:
            self.policy = self._run.tree or choice.policy
            self._draft = self._grow(max_depths)
        self._rule.drafted(self._num_forwards - before)
        return self._draft

    def _begin(self) -> None:
        super()._begin()
        self._rule.begin()

    def _learn(self, slots: Sequence[Sequence[int]], outcome: Outcome) -> None:
        draft, self._draft = self._draft, None
        if draft is not None and (outcome.is_own or outcome.own is not None):
            self._rule.learn(draft, outcome, slots)


def _exit_model(run: Run) -> EarlyExitModel:
    if not isinstance(run.target, EarlyExitModel):
        raise DraftError(
            "EarlyExit runs some of the target's layers: the drafter that it is a part of has to say needs_exits = True"
        )
    return run.target


def _nothing(run: Run) -> Draft:
    return Draft(trees=TreeBatch.empty(len(run.sequences), run.device))
