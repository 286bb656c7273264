"""The model that speaks, and what drafts for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from specdec.bench.methods import SMALL_MODEL, DrafterSpec, choose_drafter
from specdec.cli.loading import load_draft, load_target
from specdec.drafters import Drafter
from specdec.models import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Speaker:
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


@dataclass(frozen=True, kw_only=True)
class SpeakerLoader:
    """Loads models as the options of the command say."""

    dtype: str
    device: str
    threads: int | None
    weights: str
    trust_remote_code: bool

    def load(self, model: str, drafter_spec: DrafterSpec, draft: str | None = None) -> Speaker:
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
        return Speaker(loaded=loaded, drafter_spec=drafter_spec, drafter=drafter_spec.build(small), draft=small)

    def with_drafter(self, speaker: Speaker, name: str, draft: str | None = None) -> Speaker:
        """The same model with another drafter, given as after --drafter (and --draft).

        Raises:
            ValueError: an unknown drafter, or one that lacks its draft model.
        """
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
