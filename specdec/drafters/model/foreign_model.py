"""A small model with another tokenizer drafts.

Greedy chains go by text: what the draft writes is read with the target's tokenizer (universal assisted decoding; Timor
et al. 2025, string-level exact match). Sampled drafts, and trees, keep to the tokens that both vocabularies have: the
draft's distribution is restricted to them before the user's processors see it (token-level intersection, ibid.). Both
are lossless: q is what was drawn from, and without a draw the target decides alone.

Shape legend: B rows, M nodes of a layer, W pending tokens, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.model.growing import GrowingSession
from specdec.drafters.model.runner import read_ragged
from specdec.errors import DraftError, UnsupportedModelError, UnsupportedOptionError
from specdec.text.translation import BROKEN, Translator, continuation, decode_from, shared_tokens
from specdec.tree_model.compatibility import check_model
from specdec.tree_model.layer_kinds import keeps_states
from specdec.tree_model.model import TreeModel
from trees import Chain, Draft, GrowingTrees, GrowthPolicy, TokenTree, TreeBatch


class ForeignModel(Drafter):
    """Drafts with a causal LM of another tokenizer.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer.
        target_tokenizer: the target's.
        num_tokens: length of the chain that it drafts, in its own tokens; unless the call names a tree.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        ValueError: `num_tokens` is not a positive integer, or a tokenizer is none.
        DraftError: at the call, if the vocabularies share nothing or there are no prompt tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_tokenizer: PreTrainedTokenizerBase,
        num_tokens: int = 5,
    ):
        self.policy: GrowthPolicy = Chain(num_tokens)
        for name, value in (("tokenizer", tokenizer), ("target_tokenizer", target_tokenizer)):
            if not isinstance(value, PreTrainedTokenizerBase):
                raise ValueError(f"ForeignModel({name}={value!r}): {name} is a tokenizer of transformers")
        check_model(model)
        if keeps_states(model.config):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps states, which cannot take back what is translated otherwise when more "
                "of the text is there: take a draft model whose layers attend, or specdec.drafters.PromptLookup()"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.target_tokenizer = target_tokenizer

    @cached_property
    def shared(self) -> list[tuple[int, int]]:
        """Ids, of draft and target, of the tokens that both vocabularies have."""
        return shared_tokens(self.tokenizer, self.target_tokenizer)

    def models(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def start(self, run: Run) -> DraftSession:
        if len(run.input_ids) and not run.input_ids.shape[1]:
            raise UnsupportedOptionError(
                "a draft model cannot read inputs_embeds made for the target: pass input_ids, or draft with "
                "specdec.drafters.PromptLookup()"
            )
        policy = run.tree or self.policy
        if not run.sampler.do_sample and type(policy) is Chain:
            return _TextSession(self, run, policy.length)
        return _SharedTokensSession(self, run, policy)


class _Reader:
    """The draft model with a cache that holds each row's text in the draft's tokens."""

    def __init__(self, drafter: ForeignModel, run: Run):
        self._run = run
        self._tokenizer = drafter.tokenizer
        self.model = TreeModel(drafter.model)
        self._translators = [Translator(drafter.target_tokenizer, drafter.tokenizer) for _ in run.sequences.rows]
        self._padding: list[int] = []
        self._cached: list[list[int]] | None = None
        self.is_aligned: list[bool] = []
        """For each row whether the draft has read all of the text."""

    @property
    def texts(self) -> list[list[int]]:
        return [translator.ids for translator in self._translators]

    def read(self) -> Tensor:
        """Bring the cache up to the committed text; logits [B, 1, *] after it."""
        rows = zip(self._translators, self._run.sequences.tokens, strict=True)
        self.is_aligned = [translator.update(tokens) for translator, tokens in rows]
        wanted = [ids or [self._tokenizer.eos_token_id or 0] for ids in self.texts]
        if self._cached is None:
            return self._prefill(wanted)
        seen = [_common(cached, ids) for cached, ids in zip(self._cached, wanted, strict=True)]
        self.model.cache.truncate_committed([skipped + size for skipped, size in zip(self._padding, seen, strict=True)])
        sizes = [len(ids) - size for ids, size in zip(wanted, seen, strict=True)]
        tokens_BW = torch.zeros((len(sizes), max(sizes)), dtype=torch.long, device=self.model.device)
        for row, (ids, size) in enumerate(zip(wanted, sizes, strict=True)):
            tokens_BW[row, :size] = torch.tensor(ids[-size:])
        self._cached = [list(ids) for ids in wanted]
        return read_ragged(self.model, tokens_BW, sizes)

    def keep(self, slots: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> None:
        """These tail slots of each row, which hold these tokens, may be of use in the next round."""
        if self._cached is not None and self.model.cache.tail:
            self.model.commit(slots)
            for cached, more in zip(self._cached, tokens, strict=True):
                cached.extend(more)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._translators = [self._translators[row] for row in rows]
        if self._cached is not None:
            self.model.select_rows(rows)
            self._cached = [self._cached[row] for row in rows]
            self._padding = [self._padding[row] for row in rows]

    def _prefill(self, wanted: Sequence[list[int]]) -> Tensor:
        width = max(map(len, wanted))
        self._padding = [width - len(ids) for ids in wanted]
        padded = [[0] * skipped + ids for skipped, ids in zip(self._padding, wanted, strict=True)]
        input_ids = torch.tensor(padded, device=self.model.device)
        columns = torch.arange(width, device=input_ids.device)
        mask = (columns >= torch.tensor(self._padding, device=input_ids.device)[:, None]).long()
        self._cached = [list(ids) for ids in wanted]
        return self.model.prefill(input_ids, attention_mask=mask)


class _ForeignSession(DraftSession):
    _reader: _Reader

    @property
    def num_forwards(self) -> int:
        return self._reader.model.num_forwards

    @property
    def draft_model(self) -> PreTrainedModel:
        return self._reader.model.model

    def select_rows(self, rows: Sequence[int]) -> None:
        self._reader.select_rows(rows)


class _TextSession(_ForeignSession):
    """The draft writes, the target's tokenizer reads."""

    def __init__(self, drafter: ForeignModel, run: Run, num_tokens: int):
        self._drafter = drafter
        self._run = run
        self._num_tokens = num_tokens
        self._reader = _Reader(drafter, run)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        written = self._write(min(self._num_tokens, max(max_depths)))
        chains = [
            self._translate(row, tokens, depth) if self._reader.is_aligned[row] else []
            for row, (tokens, depth) in enumerate(zip(written, max_depths, strict=True))
        ]
        return Draft(trees=TreeBatch.stack([TokenTree.chain(chain) for chain in chains], self._run.device))

    def _write(self, count: int) -> list[list[int]]:
        """The draft's next tokens of each row; all but the last of them are in its cache then."""
        reader, columns = self._reader, [self._reader.read()[:, -1].argmax(-1, keepdim=True)]
        for offset in range(count - 1):
            offsets_B1 = torch.full_like(columns[-1], offset)
            columns.append(reader.model.forward(columns[-1], offsets_B1, None)[:, -1].argmax(-1, keepdim=True))
        written = torch.cat(columns, 1).tolist()
        reader.keep([range(count - 1)] * len(written), [tokens[:-1] for tokens in written])
        return written

    def _translate(self, row: int, written: Sequence[int], max_depth: int) -> list[int]:
        """The target's tokens of what the draft has written, up to the first thing that is no text."""
        drafter, ids = self._drafter, self._reader.texts[row]
        special = drafter.tokenizer.all_special_ids
        tokens = takewhile(lambda token: token not in special, written)
        text = decode_from(drafter.tokenizer, [*ids, *tokens], len(ids)).partition(BROKEN)[0]
        committed = self._run.sequences.tokens[row]
        drafted = continuation(drafter.target_tokenizer, committed, text) if text else []
        return list(takewhile(lambda token: token < self._run.vocab_size, drafted[:max_depth]))


class _SharedTokensSession(_ForeignSession, GrowingSession):
    """The draft keeps to the tokens that both vocabularies have."""

    def __init__(self, drafter: ForeignModel, run: Run, policy: GrowthPolicy):
        super().__init__(run, policy)
        self._reader = _Reader(drafter, run)
        sizes = self._reader.model.vocab_size, run.vocab_size
        pairs = [pair for pair in drafter.shared if pair[0] < sizes[0] and pair[1] < sizes[1]]
        if not pairs:
            raise DraftError("the draft's vocabulary and the target's have no token in common: take another draft")
        own_S, target_S = torch.tensor(pairs, device=self._reader.model.device).unbind(1)
        self._own_V = torch.zeros(run.vocab_size, dtype=torch.long, device=own_S.device)
        self._own_V[target_S] = own_S
        self._own_S, self._target_S = own_S, target_S.to(run.device)
        self._draft: Draft | None = None

    @property
    def _vocab_ids(self) -> Tensor:
        return self._target_S

    def propose(self, max_depths: Sequence[int]) -> Draft:
        self._draft = None
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        self._draft = self._grow(max_depths)
        return self._draft

    def observe(self, outcome: Outcome) -> None:
        if self._draft is None:
            return
        tail = self._reader.model.cache.tail
        kept = [self._draft.grown(row, path, tail) for row, path in enumerate(outcome.own_paths)]
        tokens = [
            self._own_V[self._draft.trees.tokens_BN[row, list(path[: len(slots)])].to(self._own_V.device)].tolist()
            for row, (path, slots) in enumerate(zip(outcome.own_paths, kept, strict=True))
        ]
        self._reader.keep(kept, tokens)
        self._draft = None

    def _score_root(self) -> Tensor:
        return self._reader.read()[..., self._own_S]

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        device = self._own_V.device
        logits_BMV = self._reader.model.forward(
            self._own_V[grown.tokens_BM.to(device)],
            grown.depths_BM.to(device) - 1,
            None if grown.is_chain else grown.seen_nodes_BMN.to(device),
        )
        return logits_BMV[..., self._own_S]


def _common(cached: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning, but not all of what is wanted."""
    longest = min(len(cached), len(wanted) - 1)
    return next((index for index in range(longest) if cached[index] != wanted[index]), longest)
