"""Forwards of one shape, so that a token gets the same bits whatever is forwarded beside it: `exact="bits"`.

Products of other shapes are other kernels, whose sums differ in their last bits. So every forward here has as many rows
as the run began with, and `WIDTH` new slots: what is missing is filled up, and wider trees take several. Attention
sums up by absolute slots (`attention.py`). What is left is that a product gives all its rows the same bits, which is
tried for every model before it is relied on. Where layers are native no row depends on its company in any shape, and
the ordinary forwards are tried alike.

Shape legend: B rows, R rows that the run began with, T new slots, K tail slots, V vocabulary.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda.arena import Arena, StaticTreeCache
from specdec.cuda.captured import Copies, Inputs, Shape, forward_of
from specdec.cuda.graphs import Outputs, graphs_for
from specdec.cuda.model import GraphedTreeModel, say_the_same, why_no_static_shape, why_not
from specdec.cuda.seen import TAIL_SLOTS
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels import prepared
from specdec.kernels.model.profile import profile_of
from specdec.stages import stage
from specdec.tree_model.forwards import Forwarded
from specdec.tree_model.model import TreeModel
from trees import GrowthPolicy

_logger = logging.getLogger("specdec")
WIDTH = 16
"""New slots of a forward: a tile of a matrix instruction, which reads the weights as one slot does."""
_MOST_DRAFTED = TAIL_SLOTS - 1
_PIECES = (1, 1, 3, 11)
_NATIVE_PIECES = (1, 1, 2, 4, 8, 16, 32)
"""Of the text of a trial, which is forwarded in one piece too: so most tokens stand elsewhere, among others."""


def bit_exact_model(model: PreTrainedModel, num_rows: int, tree: GrowthPolicy | None = None) -> TreeModel:
    """A tree model whose logits for a text in its chain are the same bits, in whatever rounds it comes to them.

    Args:
        num_rows: R, the rows that it will be prefilled with.
        tree: that it is going to verify, if that is known.

    Raises:
        UnsupportedModelError: says why there is none.
        UnsupportedOptionError: the tree has no place in its forwards.
    """
    name, done = type(model).__name__, prepared(model)
    is_native = done is not None and done.num_fused_layers > 0
    if any(path.rpartition(".")[2] == "experts" for path, _ in model.named_modules()):
        reason: str | None = "its experts are given other numbers of tokens in every forward"
    else:
        reason = None if is_native else why_no_static_shape(model)
    if reason is not None:
        raise UnsupportedModelError(f"exact='bits' is not possible with {name}: {reason}. Leave it out")
    if tree is not None and tree.most_nodes is not None and not is_native:
        _check_number(tree.most_nodes, repr(tree))
    tried = profile_of(model).part(_Tried)
    key = num_rows, done, model.device, model.dtype, torch.get_num_threads()
    if key not in tried:
        with stage(f"comparing bits of {name}"):
            tried[key] = _find_fault(model, num_rows, is_native)
    if (fault := tried[key]) is not None:
        advice = "load it with weights='stock', or leave it out" if is_native else "leave it out"
        raise UnsupportedModelError(f"exact='bits' is not possible with {name} here: {fault}; {advice}")
    return _make(model, num_rows, is_native)


def _check_number(num_drafted: int, tree: str) -> None:
    if num_drafted > _MOST_DRAFTED:
        raise UnsupportedOptionError(
            f"exact='bits' verifies up to {_MOST_DRAFTED} drafted tokens of a row, and {tree} has {num_drafted}: draft "
            "less"
        )


class _Tried(dict[object, str | None]):
    """What is in the way, by what it depends on; None where nothing is."""


def _make(model: PreTrainedModel, num_rows: int, is_native: bool) -> TreeModel:
    return _NativeModel(model) if is_native else FixedShapeModel(model, num_rows)


class _NativeModel(TreeModel):
    """Whose rows do not depend on their company."""

    keeps_bits = True
    most_drafted = _MOST_DRAFTED


class FixedShapeModel(GraphedTreeModel):
    """Forwards of one shape: replayed where there are graphs, otherwise simply run.

    Attributes:
        num_rows: R; the rows that it is prefilled with.
    """

    keeps_bits = True
    most_drafted = _MOST_DRAFTED

    def __init__(self, model: PreTrainedModel, num_rows: int):
        super().__init__(model)
        self.num_rows = num_rows
        self._pool = None if why_not(model) else graphs_for(self.device)
        self._run_now = forward_of(model, self._cache_name, Copies())

    def _new_cache(self, num_rows: int, capacity: int) -> StaticTreeCache:
        cache = super()._new_cache(num_rows, capacity)
        if cache.arena is None:  # another run has it
            self._arena = Arena()
            self._arena.lease(cache, self.model)
            cache.arena = self._arena
        cache.least_rows = self.num_rows
        return cache

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        num_new = tokens_BT.shape[1]
        assert not self.cache.tail, "trees are verified in one go"
        self._check(num_new)
        logits, states = [], []
        for start in range(0, num_new, WIDTH):
            part = slice(start, min(start + WIDTH, num_new))
            seen = None if seen_BTK is None else seen_BTK[:, part, : part.stop]
            logits_BTV, kept = self._forward_part(tokens_BT[:, part], offsets_BT[:, part], seen)
            assert logits_BTV is not None
            logits.append(logits_BTV)
            states.append(kept)
        self.states = {depth: torch.cat([part[depth] for part in states], 1) for depth in states[0]}
        return torch.cat(logits, 1)

    def _check(self, num_new: int) -> None:
        """
        Raises:
            UnsupportedOptionError: what is asked for has no place in the shape.
        """
        _check_number(num_new - 1, "this tree")
        if len(self._lag_AB) > 1 or self._starts_B is None:
            raise UnsupportedOptionError(
                "exact='bits' is for prompts of text that are padded on the left at most: leave it out"
            )

    def _forward_part(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Forwarded:
        cache = self.cache
        assert isinstance(cache, StaticTreeCache)
        cache.make_room(max(cache.lengths) + TAIL_SLOTS)
        # no bit depends on the bound
        shape = Shape(self.num_rows, WIDTH, self.bound_of(cache), self._reaches, tuple(sorted(self._kept)))
        outputs = self._outputs(shape, self._fill(shape, tokens_BT, offsets_BT, seen_BTK))
        self.num_forwards += 1
        return self._append(shape, outputs, offsets_BT)

    def _outputs(self, shape: Shape, filled: Inputs) -> Outputs:
        if self._pool is not None:
            try:
                return self._replay(shape, filled, self._pool)
            except Exception as error:  # of PyTorch, Triton or the model: without a graph it is the same
                name = type(self.model).__name__
                _logger.warning("%s runs without CUDA graphs: %s: %s", name, type(error).__name__, error)
                self._pool = None
        return self._arena.run(shape, filled, self._run_now)


@torch.no_grad()
def _find_fault(model: PreTrainedModel, num_rows: int, is_native: bool) -> str | None:
    """What is wrong with a short text, forwarded in one piece and in several; None if nothing is."""
    pieces = _NATIVE_PIECES if is_native else _PIECES
    target, ordinary = _make(model, num_rows, is_native), TreeModel(model)
    numbers = torch.arange(1, num_rows * (8 + sum(pieces)) + 1, device=target.device).view(num_rows, -1)
    prompts_BP, text_BT = (7919 * numbers % target.vocab_size).split([8, sum(pieces)], 1)
    padding_B1 = torch.arange(num_rows, device=target.device).unsqueeze(1) % 3
    mask_BP = (torch.arange(8, device=target.device) >= padding_B1).long()
    try:
        for each in (target, ordinary):
            each.prefill(prompts_BP, attention_mask=mask_BP)
        whole_BTV, expected_BTV = _forward(target, text_BT), _forward(ordinary, text_BT)
        if not say_the_same(whole_BTV, expected_BTV):
            return "forwards of one shape give other logits"
        target.forget_tail()
        in_pieces = []
        for number, piece_BT in enumerate(text_BT.split(pieces, 1)):
            if number == 2:  # the last row takes the place of the first
                target.select_rows([num_rows - 1])
            in_pieces.append(_forward(target, piece_BT[-target.cache.num_rows :])[-1])
            target.commit([range(piece_BT.shape[1])] * target.cache.num_rows)
    except Exception as error:  # whatever it is: the model is not for this
        return f"it failed a trial ({type(error).__name__}: {error})"
    finally:
        target.forget_tail()
        target.select_rows([])
    if not torch.equal(torch.cat(in_pieces), whole_BTV[-1]):
        return "the bits of a token depend on its place in a forward"
    return None


def _forward(target: TreeModel, tokens_BT: Tensor) -> Tensor:
    """Logits of tokens that follow one another."""
    num_rows, num_new = tokens_BT.shape
    offsets_BT = torch.arange(num_new, device=target.device).expand(num_rows, num_new)
    seen_BTT = None if num_new == 1 else offsets_BT[:, :, None] >= offsets_BT[:, None]
    return target.forward(tokens_BT, offsets_BT, seen_BTT)
