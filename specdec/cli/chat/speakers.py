"""The model that speaks, and what drafts for it: the contracts, and models of this process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from specdec.cli.chat.conversation import Conversation
from specdec.cli.chat.dialogue import Dialogue
from specdec.drafters import Drafter
from specdec.model_options import ModelOptions
from specdec.models import LoadedModel
from specdec.models.pair import LoadedPair, have_same_ids, load_draft, load_pair
from specdec.specs import AUTO, DrafterSpec, check_draft


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

    @property
    def samples(self) -> bool:
        """Whether its generation config says so: how it is meant to be talked with."""

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
        options: how models are loaded.
        draft: the draft model that was loaded for it, also while another drafter is at work.
        max_prefix_bytes: as of a `Conversation`.
    """

    loaded: LoadedModel
    options: ModelOptions
    drafter_spec: DrafterSpec
    drafter: Drafter | str
    draft: LoadedModel | None = None
    tells_drafted: bool = True
    max_prefix_bytes: int | None = None

    @classmethod
    def load(
        cls,
        model: str,
        options: ModelOptions,
        drafter_spec: DrafterSpec,
        draft: str | None = None,
        *,
        max_prefix_bytes: int | None = None,
    ) -> LocalSpeaker:
        """Load a model, and its draft model if one is named.

        Raises:
            ModelError, DraftError: as `load_pair`.
        """
        pair = load_pair(model, draft, options, translates=drafter_spec.translates, to_chat=True)
        speaker = cls(loaded=pair.target, options=options, drafter_spec=drafter_spec, drafter=pair.build(drafter_spec))
        return replace(speaker, draft=pair.draft, max_prefix_bytes=max_prefix_bytes)

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def drafter_name(self) -> str:
        return self.drafter_spec.text

    @property
    def samples(self) -> bool:
        config = self.loaded.model.generation_config
        return config is not None and bool(config.do_sample)

    def converse(self, **state: Any) -> Conversation:
        model, tokenizer, _ = self.loaded
        return Conversation(model, tokenizer, drafter=self.drafter, max_prefix_bytes=self.max_prefix_bytes, **state)

    def with_model(self, name: str) -> LocalSpeaker:
        kept = DrafterSpec.parse(AUTO) if self.drafter_spec.needs_draft else self.drafter_spec
        return self.load(name, self.options, kept, max_prefix_bytes=self.max_prefix_bytes)

    def with_drafter(self, name: str, draft: str | None = None) -> LocalSpeaker:
        spec = DrafterSpec.parse(name)
        small = self._usable_draft(spec) if draft is None else None
        if small is None:
            check_draft([spec], draft)
        if draft is not None:
            small = load_draft(draft, self.loaded, self.options, translates=spec.translates)
        drafter = LoadedPair(self.loaded, small).build(spec)
        return replace(self, drafter_spec=spec, drafter=drafter, draft=small)

    def _usable_draft(self, spec: DrafterSpec) -> LoadedModel | None:
        """The draft model that is there already, unless the drafter would use it and cannot."""
        small = self.draft
        if small is None or spec.translates or not spec.may_use_draft:
            return small
        return small if have_same_ids(self.loaded.tokenizer, small.tokenizer) else None
