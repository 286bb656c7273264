"""A middle model drafts, and a cheaper drafter makes it quick: speculation on the draft.

What leaves the middle stage is distributed as the middle model's own processed distribution (the cheap drafter and the
middle model are themselves lossless speculation), so that is the q of the draft. Whether another token follows depends
on those before it only. (Staged speculative decoding, Spector and Re 2023; cascades, Chen et al. 2024.)

Shape legend: B rows, W pending tokens, N nodes of the cheap drafter's trees, T = N + 1, n drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.acceptance import draw
from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.follower import Follower
from specdec.drafters.growing import target_scores
from specdec.drafters.nested import NestedSession, chains_of
from specdec.drafters.quantized_self import QuantizedSelf
from specdec.drafters.small_model import SmallModel
from specdec.errors import UnsupportedOptionError
from specdec.sampling import Prefixes
from trees import Chain, Draft, TokenTree, TreeBatch


class Cascade(Drafter):
    """Drafts chains of a middle model, of which a cheap drafter proposes the first tokens.

    In each round the middle model verifies the cheap drafter's chain or tree in one forward; then it goes on until
    there are `min_tokens`: alone, or, as `QuantizedSelf` of a float32 target, with further proposals of a cheap drafter
    that can take back what it has read (`PromptLookup`, `SmallModel`, `Auto`). A call may name
    `tree=trees.Chain(length)`, which sets both numbers.

    Args:
        cheap: any drafter: `PromptLookup()`, a `SmallModel` still smaller, `EarlyExit()` (of the target).
        middle: a model of the target's tokenizer, or `SmallModel(model, weights="int8")`, or `QuantizedSelf()`.
        num_tokens: most tokens of a draft.
        min_tokens: the middle model goes on by itself up to this many; 1 leaves it at those tokens of the cheap drafter
            that it agreed with and the one that it has chosen itself.

    Raises:
        ValueError: an argument is none of these, or `min_tokens` is greater than `num_tokens`.
        UnsupportedOptionError: at the call, for another tree than a chain.
        DraftError: at the call, if one of both does not fit the target.
    """

    def __init__(
        self,
        cheap: Drafter,
        middle: PreTrainedModel | SmallModel | QuantizedSelf,
        num_tokens: int = 12,
        min_tokens: int = 4,
    ):
        if not isinstance(cheap, Drafter):
            raise ValueError(
                f"Cascade(cheap={cheap!r}): cheap is a drafter, for example specdec.drafters.PromptLookup()"
            )
        if not isinstance(middle, PreTrainedModel | SmallModel | QuantizedSelf):
            raise ValueError(f"Cascade(middle={middle!r}): middle is a model, a SmallModel or a QuantizedSelf")
        for name, value in (("num_tokens", num_tokens), ("min_tokens", min_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Cascade({name}={value!r}): {name} is a positive integer")
        if min_tokens > num_tokens:
            raise ValueError(
                f"Cascade(num_tokens={num_tokens}, min_tokens={min_tokens}): min_tokens is the smaller one"
            )
        self.cheap = cheap
        self.middle = SmallModel(middle) if isinstance(middle, PreTrainedModel) else middle
        self.num_tokens = num_tokens
        self.min_tokens = min_tokens
        self.agreement = self.middle.agreement

    def start(self, run: Run) -> DraftSession:
        if run.tree is not None and type(run.tree) is not Chain:
            raise UnsupportedOptionError(
                f"Cascade drafts chains, not tree={run.tree!r}: pass trees.Chain(length), or leave the tree out"
            )
        middle = self.middle
        most, least = self.num_tokens, self.min_tokens
        if run.tree is not None:
            most = least = run.tree.length
        if isinstance(middle, QuantizedSelf):
            copy = middle.copy_of(run.target.model)
            if self.cheap.rewinds and middle.shares_cache(run.target.model):
                return NestedSession(run, copy, self.cheap, most=most, least=least)
            middle = SmallModel(copy)
        middle.check_fit(run)
        with ExitStack() as opened:
            cheap = self.cheap.start(replace(run, tree=None))
            opened.callback(cheap.close)
            return _CascadeSession(run, cheap, middle.model, most, least, opened.pop_all())


@dataclass(kw_only=True, eq=False)
class _Line:
    """What the middle model drafts in one row.

    Args:
        limit: most tokens.
        slots: of the middle model's tail that hold the row's pending tokens and then those of its draft.
        num_pending: how many of these are pending ones.
        cheap_path: the cheap drafter's nodes that it begins with.
        q_V: one for each token.
    """

    limit: int
    slots: list[int]
    num_pending: int
    cheap_path: list[int]
    tokens: list[int]
    q_V: list[Tensor]

    @property
    def num_read(self) -> int:
        """Drafted tokens that the middle model has read."""
        return len(self.slots) - self.num_pending


class _CascadeSession(DraftSession):
    def __init__(
        self, run: Run, cheap: DraftSession, middle: PreTrainedModel, most: int, least: int, opened: ExitStack
    ):
        self._run = run
        self._cheap = cheap
        self._follower = Follower(middle, run)
        self._most = most
        self._least = least
        self._opened = opened
        self._lines: list[_Line] | None = None
        """Of the round in progress."""
        self.runs_target = cheap.runs_target

    @property
    def num_forwards(self) -> int:
        return self._cheap.num_forwards + self._follower.num_forwards

    @property
    def control_seconds(self) -> float:
        return self._cheap.control_seconds

    def explain(self) -> dict[str, Any]:
        agreed = [len(line.cheap_path) for line in self._lines or ()]
        return {"agreed": agreed, "cheap": self._cheap.explain()}

    def propose(self, max_depths: Sequence[int]) -> Draft:
        limits = [min(depth, self._most) for depth in max_depths]
        if max(limits) == 0:
            return Draft(trees=TreeBatch.empty(len(limits), self._run.device))
        num_passed = self._run.target.num_passed
        cheap = self._cheap.propose([max(limit - 1, 0) for limit in limits])
        has_passed = self._run.target.num_passed > num_passed
        self._lines = self._verify(cheap, limits)
        while any(len(line.tokens) < min(line.limit, self._least) for line in self._lines):
            self._go_on(self._lines)
        return self._draft(self._lines, cheap if has_passed else None)

    def observe(self, outcome: Outcome) -> None:
        lines, self._lines = self._lines, None
        if lines is None:
            self._cheap.observe(outcome)
            return
        counts = [len(path) for path in outcome.own_paths]
        kept = [line.slots[: line.num_pending + count] for line, count in zip(lines, counts, strict=True)]
        self._follower.keep(kept)
        own = [line.cheap_path[:count] for line, count in zip(lines, counts, strict=True)]
        self._cheap.observe(replace(outcome, is_own=False, own=own))

    def select_rows(self, rows: Sequence[int]) -> None:
        self._cheap.select_rows(rows)
        self._follower.select_rows(rows)

    def close(self) -> None:
        self._opened.close()

    def _verify(self, cheap: Draft, limits: Sequence[int]) -> list[_Line]:
        """One forward of the middle model: what it keeps of the cheap draft, and its own token after that."""
        sampler, trees = self._run.sampler, cheap.trees
        logits_BTV, width, sizes = self._read(trees)
        prefixes = Prefixes(self._run.sequences, trees, range(trees.num_slots))
        scores_BTV = target_scores(self._run, logits_BTV, prefixes)
        accepted = sampler.accept(scores_BTV, cheap)
        counts, nexts, paths = (x.tolist() for x in (accepted.counts_B, accepted.next_B, accepted.path_BD))
        lines = []
        for row, limit in enumerate(limits):
            path = paths[row][: counts[row]]
            tree = trees.row(row)
            slots = [0, *(node + 1 for node in path)] if limit else []
            lines.append(
                _Line(
                    limit=limit,
                    slots=[*range(sizes[row]), *(width + node for node in path)],
                    num_pending=sizes[row],
                    cheap_path=path,
                    tokens=[*(int(tree.tokens[node]) for node in path), nexts[row]] if limit else [],
                    q_V=[*scores_BTV[row, slots].softmax(-1)] if sampler.do_sample else [],
                )
            )
        return lines

    def _read(self, trees: TreeBatch) -> tuple[Tensor, int, list[int]]:
        """Forward what is pending and the cheap draft's nodes behind it.

        Returns:
            Logits [B, T, V] after root and nodes; W; the number of pending tokens of each row.
        """
        tokens_BW, sizes = self._follower.pending()
        width, device = tokens_BW.shape[1], tokens_BW.device
        sizes_B1 = torch.tensor(sizes, device=device).unsqueeze(1)
        offsets_BW = torch.arange(width, device=device).expand_as(tokens_BW)
        tokens_BX = torch.cat([tokens_BW, trees.tokens_BN.to(device)], 1)
        offsets_BX = torch.cat([offsets_BW, sizes_B1 - 1 + trees.depths_BT[:, 1:].to(device)], 1)
        seen_BXX = torch.zeros((*tokens_BX.shape, tokens_BX.shape[1]), dtype=torch.bool, device=device)
        seen_BXX[:, :width, :width] = offsets_BW[:, :, None] >= offsets_BW[:, None]
        seen_BXX[:, width:, :width] = (offsets_BW < sizes_B1).unsqueeze(1)
        seen_BXX[:, width:, width:] = trees.ancestors_BTT[:, 1:, 1:].to(device)
        logits_BXV = self._follower.forward(tokens_BX, offsets_BX, seen_BXX)
        roots_B = sizes_B1[:, 0] - 1
        roots_B1V = logits_BXV[torch.arange(len(sizes), device=device), roots_B].unsqueeze(1)
        return torch.cat([roots_B1V, logits_BXV[:, width:]], 1), width, sizes

    def _go_on(self, lines: Sequence[_Line]) -> None:
        """One more token of the middle model in every row that wants one."""
        slot, device, sampler = self._follower.tail, self._follower.device, self._run.sampler
        seen_B1K = torch.zeros((len(lines), 1, slot + 1), dtype=torch.bool, device=device)
        seen_B1K[..., slot] = True
        tokens, offsets = [], []
        for row, line in enumerate(lines):
            is_new = line.num_read < len(line.tokens)
            tokens.append(line.tokens[-1] if is_new else 0)
            offsets.append(line.num_pending + line.num_read if is_new else 0)
            seen_B1K[row, 0, line.slots] = True
            if is_new:
                line.slots.append(slot)
        tokens_B1, offsets_B1 = torch.tensor([tokens, offsets], device=device).unsqueeze(2)
        logits_B1V = self._follower.forward(tokens_B1, offsets_B1, seen_B1K)
        chains = TreeBatch.stack([TokenTree.chain(line.tokens) for line in lines], self._run.device)
        scores_B1V = target_scores(self._run, logits_B1V, _Tips(self._run.sequences, chains, range(1)))
        p_B1V = scores_B1V.softmax(-1)
        chosen_B1 = draw(p_B1V, sampler.generator) if sampler.do_sample else scores_B1V.argmax(-1)
        for line, (token,), q_1V in zip(lines, chosen_B1.tolist(), p_B1V, strict=True):
            if len(line.tokens) < min(line.limit, self._least):
                line.tokens.append(token)
                if sampler.do_sample:
                    line.q_V.append(q_1V[0])

    def _draft(self, lines: Sequence[_Line], passed: Draft | None) -> Draft:
        """The lines as chains; `passed` is the cheap draft if its nodes have passed layers of the target."""
        places = None
        if passed is not None:
            places = [_places(passed, row, line) for row, line in enumerate(lines)]
        return chains_of(self._run, [line.tokens for line in lines], [line.q_V for line in lines], places=places)


class _Tips(Prefixes):
    """The prefix of each row's last node."""

    def by_length(self) -> dict[int, list[list[tuple[int, Tensor]]]]:
        groups: dict[int, list[list[tuple[int, Tensor]]]] = {}
        for row, size in enumerate(self.trees.sizes):
            prefix = torch.cat([self.sequences.prefix(row), self.trees.tokens_BN[row, :size]])
            groups.setdefault(len(prefix), [[] for _ in self.trees.sizes])[row].append((0, prefix))
        return dict(sorted(groups.items()))


def _places(cheap: Draft, row: int, line: _Line) -> list[int]:
    places = [node if cheap.places is None else cheap.places[row][node] for node in line.cheap_path]
    return [*places, *[-1] * (len(line.tokens) - len(places))]
