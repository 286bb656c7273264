"""The model that speaks, and what drafts for it: the contracts, and models of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from specdec.cli.chat.conversation import Conversation
from specdec.cli.chat.dialogue import Dialogue
from specdec.drafters import Drafter
from specdec.loading import LoadedPair, have_same_ids, load_draft, load_pair
from specdec.model_options import ModelOptions
from specdec.models import LoadedModel
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

    def converse(self, **state: Any) -> Dialogue:
        """Begin or go on with a dialogue; arguments as of `Dialogue`."""


class Loader(Protocol):
    """Where speakers come from."""

    def load_instead(self, speaker: Any, model: str) -> Speaker:
        """Another model in place of `speaker`, which stays as it is.

        Raises:
            SpecdecError, ValueError, OSError: there is none of that name.
        """

    def with_drafter(self, speaker: Any, name: str, draft: str | None = None) -> Speaker:
        """The same model with another drafter, given as after --drafter (and --draft).

        Raises:
            ValueError: an unknown drafter, or one that lacks its draft model.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalSpeaker:
    """A loaded model and its drafter.

    Args:
        draft: the draft model that was loaded for it, also while another drafter is at work.
    """

    loaded: LoadedModel
    drafter_spec: DrafterSpec
    drafter: Drafter | str
    draft: LoadedModel | None = None

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def drafter_name(self) -> str:
        return self.drafter_spec.text

    @property
    def tells_drafted(self) -> bool:
        return True

    def converse(self, **state: Any) -> Conversation:
        return Conversation(self.loaded.model, self.loaded.tokenizer, drafter=self.drafter, **state)


@dataclass(frozen=True)
class SpeakerLoader:
    """Loads models as the options of the command say."""

    options: ModelOptions

    def load(self, model: str, drafter_spec: DrafterSpec, draft: str | None = None) -> LocalSpeaker:
        """Load a model, and its draft model if one is named.

        Raises:
            ModelError, DraftError: as `load_pair`.
        """
        pair = load_pair(model, draft, self.options, translates=drafter_spec.translates)
        return _speaker(pair, drafter_spec)

    def load_instead(self, speaker: LocalSpeaker, model: str) -> LocalSpeaker:
        kept = DrafterSpec.parse(AUTO) if speaker.drafter_spec.needs_draft else speaker.drafter_spec
        return self.load(model, kept)

    def with_drafter(self, speaker: LocalSpeaker, name: str, draft: str | None = None) -> LocalSpeaker:
        spec = DrafterSpec.parse(name)
        small = _usable(speaker, spec) if draft is None else None
        if small is None:
            check_draft([spec], draft)
        if draft is not None:
            small = load_draft(draft, speaker.loaded, self.options, translates=spec.translates)
        return _speaker(LoadedPair(speaker.loaded, small), spec)


def _usable(speaker: LocalSpeaker, spec: DrafterSpec) -> LoadedModel | None:
    """The draft model that is there already, unless the drafter would use it and cannot."""
    small = speaker.draft
    if small is None or spec.translates or not spec.may_use_draft:
        return small
    return small if have_same_ids(speaker.loaded.tokenizer, small.tokenizer) else None


def _speaker(pair: LoadedPair, spec: DrafterSpec) -> LocalSpeaker:
    return LocalSpeaker(loaded=pair.target, drafter_spec=spec, drafter=pair.build(spec), draft=pair.draft)
