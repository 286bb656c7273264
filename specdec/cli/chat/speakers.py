"""The model that speaks, and what drafts for it: the contracts, and models of this process."""

from __future__ import annotations

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
    draft: PreTrainedModel | None = None

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


@dataclass(frozen=True, kw_only=True)
class SpeakerLoader:
    """Loads models as the options of the command say."""

    dtype: str
    device: str
    threads: int | None
    weights: str
    trust_remote_code: bool

    def load(self, model: str, drafter_spec: DrafterSpec, draft: str | None = None) -> LocalSpeaker:
        """Load a model, and its draft model if one is named.

        Raises:
            ModelError, DraftError: as `load_pair`.
        """
        loaded = load_target(
            model,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            weights=self.weights,
            trust_remote_code=self.trust_remote_code,
        )
        small = None if draft is None else self._load_draft(draft, loaded)
        return LocalSpeaker(loaded=loaded, drafter_spec=drafter_spec, drafter=drafter_spec.build(small), draft=small)

    def load_instead(self, speaker: LocalSpeaker, model: str) -> LocalSpeaker:
        kept = DrafterSpec.parse(AUTO) if speaker.drafter_spec.needs_draft else speaker.drafter_spec
        return self.load(model, kept)

    def with_drafter(self, speaker: LocalSpeaker, name: str, draft: str | None = None) -> LocalSpeaker:
        if draft is None and speaker.draft is not None and name.partition(":")[0] == SMALL_MODEL:
            spec, small = DrafterSpec.parse(name), speaker.draft
        else:
            spec = choose_drafter(name, draft)
            small = speaker.draft if draft is None else self._load_draft(draft, speaker.loaded)
        return replace(speaker, drafter_spec=spec, drafter=spec.build(small), draft=small)

    def _load_draft(self, draft: str, target: LoadedModel) -> PreTrainedModel:
        return load_draft(
            draft,
            target,
            dtype=self.dtype,
            device=self.device,
            weights=self.weights,
            trust_remote_code=self.trust_remote_code,
        )
