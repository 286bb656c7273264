"""The model that speaks, and what drafts for it: the contracts, and models of this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from specdec.cli.chat.conversation import Conversation
from specdec.cli.chat.dialogue import Dialogue
from specdec.drafters import Drafter
from specdec.loading import load_draft, load_target
from specdec.models import LoadedModel
from specdec.names.methods import AUTO, SMALL_MODEL, DrafterSpec, choose_drafter


class Speaker(Protocol):
    """A model that can be talked with."""

    @property
    def name(self) -> str: ...

    @property
    def drafter_name(self) -> str:
        """What drafts, as typed after --drafter."""

    @property
    def drafter(self) -> Drafter | str | None:
        """The same as a `Dialogue` takes it."""

    @property
    def tells_drafted(self) -> bool:
        """Whether it is known which tokens were drafted."""

    def converse(self, **state: Any) -> Dialogue:
        """Begin or go on with a dialogue; arguments as of `Dialogue`."""

    def with_model(self, name: str) -> Speaker:
        """Another model in place of this one, which stays as it is.

        Raises:
            SpecdecError, ValueError, OSError: there is none of that name.
        """

    def with_drafter(self, name: str, draft: str | None = None) -> Speaker:
        """The same model with another drafter, given as after --drafter (and --draft).

        Raises:
            ValueError: an unknown drafter, or one that lacks its draft model.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalSpeaker:
    """A loaded model and its drafter.

    Args:
        options: how models are loaded, as of `load_target`.
        draft: the draft model that was loaded for it, also while another drafter is at work.
    """

    loaded: LoadedModel
    options: Mapping[str, Any]
    drafter_spec: DrafterSpec
    drafter: Drafter | str
    draft: PreTrainedModel | None = None
    tells_drafted: bool = True

    @classmethod
    def load(cls, model: str, drafter_spec: DrafterSpec, draft: str | None = None, **options: Any) -> LocalSpeaker:
        """Load a model, and its draft model if one is named.

        Raises:
            ModelError, DraftError: as `load_pair`.
        """
        loaded = load_target(model, **options)
        small = None if draft is None else _load_draft(draft, loaded, options)
        drafter = drafter_spec.build(small)
        return cls(loaded=loaded, options=options, drafter_spec=drafter_spec, drafter=drafter, draft=small)

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def drafter_name(self) -> str:
        return self.drafter_spec.text

    def converse(self, **state: Any) -> Conversation:
        return Conversation(self.loaded.model, self.loaded.tokenizer, drafter=self.drafter, **state)

    def with_model(self, name: str) -> LocalSpeaker:
        kept = DrafterSpec.parse(AUTO) if self.drafter_spec.needs_draft else self.drafter_spec
        return self.load(name, kept, **self.options)

    def with_drafter(self, name: str, draft: str | None = None) -> LocalSpeaker:
        if draft is None and self.draft is not None and name.partition(":")[0] == SMALL_MODEL:
            spec, small = DrafterSpec.parse(name), self.draft
        else:
            spec = choose_drafter(name, draft)
            small = self.draft if draft is None else _load_draft(draft, self.loaded, self.options)
        return replace(self, drafter_spec=spec, drafter=spec.build(small), draft=small)


def _load_draft(draft: str, target: LoadedModel, options: Mapping[str, Any]) -> PreTrainedModel:
    return load_draft(draft, target, **{name: value for name, value in options.items() if name != "threads"})
