"""Sets up a routed run: two writers around the target and the draft model, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from routers import Router, Segmenter
from specdec.compatibility import check_positions, position_limit
from specdec.drafters import PromptLookup, Run, SmallModel
from specdec.drafters.base import DraftSession
from specdec.errors import UnsupportedOptionError
from specdec.recording import Recorder
from specdec.routing.loop import StepLoop
from specdec.routing.session import WriterSession
from specdec.routing.writer import StepStop, StepWriter
from specdec.sampling import Sampler
from specdec.sequences import Sequences
from specdec.stopping import StopChecker
from specdec.streaming import StreamFeed
from specdec.target import TreeModel
from trees import Chain

_COPIED = PromptLookup(num_tokens=4, min_match=3)
"""Speeds the draft's own writing up; short, because a wrong copy costs the draft a wider forward."""
_TURN = "\x01"
"""Stands for the text of a turn while the chat template is looked at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """How a call is routed.

    Args:
        router: decides.
        drafter: holds the draft model, and how many tokens of it the target verifies at a time in steps of its own.
        tokenizer: of both models; steps are found by what its tokens spell.
    """

    router: Router
    drafter: SmallModel
    tokenizer: PreTrainedTokenizerBase

    def start(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        others: dict[str, Any],
        *,
        sampler: Sampler,
        criteria: StoppingCriteriaList,
        capacity: int,
        config: GenerationConfig,
        recorder: Recorder,
        feed: StreamFeed | None,
        started: float,
    ) -> StepLoop:
        """The loop of a call whose prompt and options transformers has prepared.

        Args:
            others: further inputs of the target's prefill, [B, ...] each.
            capacity: tokens to make room for at the start.

        Raises:
            DraftError: the draft model does not fit the target.
            UnsupportedOptionError: the draft model has too few positions.
        """
        target_model, draft_model = TreeModel(model), TreeModel(self.drafter.model)
        segmenter = Segmenter(self.router.steps, self.decode)

        def run(reader: TreeModel) -> Run:
            return Run(
                target=reader,
                vocab_size=target_model.vocab_size,
                sequences=Sequences(input_ids, attention_mask, capacity),
                sampler=sampler,
                tree=None,
                input_ids=input_ids,
                attention_mask=attention_mask,
            )

        def writer(run: Run, session: DraftSession, inputs: dict[str, Any], wants_signals: bool) -> StepWriter:
            return StepWriter(
                target=run.target,
                session=session,
                sampler=sampler,
                stop=StepStop(criteria, segmenter, [len(tokens) for tokens in run.sequences.tokens]),
                sequences=run.sequences,
                recorder=recorder,
                feed=None,
                context_length=position_limit(run.target.model),
                started=started,
                prefill=_prefill(input_ids, attention_mask, inputs, config, capacity),
                vocab_size=target_model.vocab_size,
                wants_signals=wants_signals,
                wants_hidden=wants_signals and self.router.wants_hidden,
            )

        targets, drafts = run(target_model), run(draft_model)
        self.drafter.check_fit(targets)
        _check_draft_positions(draft_model.model, input_ids.shape[1], StopChecker(criteria).max_length)
        draft = writer(drafts, _COPIED.start(drafts), {}, True)
        assert isinstance(self.drafter.policy, Chain)
        session = WriterSession(targets, draft, self.drafter.policy.length)
        return StepLoop(
            self.router,
            draft,
            writer(targets, session, others, False),
            decode=self.decode,
            ask=self.ask,
            token_of=self.token_of,
            recorder=recorder,
            feed=feed,
            started=started,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def token_of(self, text: str) -> int:
        """The id of a text of one token.

        Raises:
            ValueError: it has more.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens here: a router can ask for answers of one token only")
        return ids[0]

    def ask(self, question: str, opening: str) -> list[int]:
        """What follows a step to put a question about it: in a turn of its own, where the tokenizer has turns."""
        text = f"\n\n{question}\n{opening}"
        if self.tokenizer.chat_template is not None:
            turns = [{"role": role, "content": _TURN} for role in ("user", "assistant")]
            turns.append({"role": "user", "content": question})
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            text = rendered.split(_TURN)[-1] + opening
        return self.tokenizer.encode(text, add_special_tokens=False)


def _prefill(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    inputs: dict[str, Any],
    config: GenerationConfig,
    capacity: int,
) -> Callable[[TreeModel, Sequence[int]], None]:
    def prefill(model: TreeModel, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=input_ids.device)
        mask = None if attention_mask is None else attention_mask[chosen].to(model.device)
        readable = input_ids[chosen].clamp(max=model.vocab_size - 1).to(model.device)
        others = {name: value[chosen].to(model.device) for name, value in inputs.items() if value is not None}
        model.prefill(readable, attention_mask=mask, generation_config=config, capacity=capacity, **others)

    return prefill


def _check_draft_positions(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """A draft that only proposes tokens may do so past its positions; one that writes may not."""
    limit = position_limit(model)
    if max_length > limit:
        raise UnsupportedOptionError(
            f"the run may reach {max_length} tokens but the draft {type(model).__name__} has {limit} positions: lower "
            "max_new_tokens, or take another draft"
        )
    check_positions(model, prompt_length, max_length)
