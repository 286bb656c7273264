"""States of texts' beginnings on disk: what one process has read, the next one need not read again.

A file holds the keys and values of a block of tokens, a tensor [H, S, D] for each part of each layer (safetensors,
https://huggingface.co/docs/safetensors). Its name is a digest of all that these bytes depend on (the model, how it is
executed, the tokens of the block and all before them), and the SHA-256 of its content. So texts share what they begin
with, and a text is found as far as it is the same.

Keys and values of a token stay what they are whatever comes after it, in layers with a window too, of which all are
kept. What does not is refused: states of recurrences, rotary embeddings that change with the length.

Shape legend: H heads, S slots, D head size.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from specdec.disk_cache.folders import PREFIXES, CacheFolder
from specdec.errors import UnsupportedModelError
from specdec.hf import home_device
from specdec.kernels import native
from specdec.kernels.model.changes import structure_name
from specdec.kernels.model.origin import files_of
from specdec.tree_model.cache import RowStates
from specdec.tree_model.compatibility import rotation_limit
from specdec.tree_model.layer_kinds import keeps_states
from specdec.tree_model.pages import PAGE, PagePool, RowPages, as_pages, one_after_another

BLOCK = 8 * PAGE
"""Tokens of a file."""

_log = logging.getLogger(__name__)
_VERSION = 1


class PrefixFiles:
    """The files of one model.

    Args:
        max_bytes: of the files of all models together; those go first that were not used for the longest time.

    Raises:
        UnsupportedModelError: what is read of a text is more than its tokens' keys and values, or the model is not
            what files hold.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int):
        if (reason := _why_not(model)) is not None:
            raise UnsupportedModelError(f"no prefixes are kept on disk for {type(model).__name__}, which {reason}")
        self._model = model
        self.folder = CacheFolder(PREFIXES.name, max_bytes)

    def of_text(self, tokens: Sequence[int]) -> TextFiles:
        """What is kept of a text, and may be."""
        return TextFiles(self.folder, list(_names(self._model, tokens)), home_device(self._model))


class TextFiles:
    """The files of one text, block by block.

    Args:
        names: of its blocks, without their checksums.
        device: where states are wanted.
    """

    def __init__(self, folder: CacheFolder, names: Sequence[str], device: torch.device):
        self._folder, self._names, self._device = folder, names, device
        self._files: list[Path] = []
        """Of the first blocks: those that are there."""

    def extend(self, states: RowStates | None) -> RowStates | None:
        """The states of the longest beginning that is known; those given, if the files have no more.

        Args:
            states: of the first tokens, as far as they are known without the files.
        """
        return joined(states, list(self.blocks_after(0 if states is None else states.length)))

    def blocks_after(self, length: int, pool: PagePool | None = None) -> Iterator[RowStates]:
        """The states of the blocks that bring more than the first tokens (see `joined`), each read when it is asked
        for: in a long text there is time for others between them.

        Args:
            length: of the beginning that is known without the files.
            pool: whose pages the states are to have; None: they are as a `TreeCache` has them.
        """
        if BLOCK * len(self._names) > length:
            self._find()
        if BLOCK * len(self._files) <= length:
            return
        for index in range(length // BLOCK, len(self._files)):
            part = self._read(self._files[index])
            if part is None:
                del self._files[index:]
                return
            yield part if pool is None else as_pages(pool, part)

    def keep(self, states: RowStates) -> None:
        """Write the blocks that are not there yet, as far as they are full and within the bound.

        Args:
            states: of the first tokens; copied.
        """
        num_before, num_full = len(self._files), min(len(self._names), states.length // BLOCK)
        if num_full <= num_before:
            return
        self._files += self._folder.find_all(self._names[num_before:num_full])
        for index in range(len(self._files), num_full):
            file = self._write(index, states)
            if file is None:
                break
            self._files.append(file)
        self._touch()

    def _find(self) -> None:
        """Look which of the first blocks are there."""
        self._files = self._folder.find_all(self._names)
        self._touch()

    def _touch(self) -> None:
        """The beginning counts as used last: what follows is worth nothing without it."""
        self._folder.touch(reversed(self._files))

    def _read(self, file: Path) -> RowStates | None:
        """None for a file that is gone or damaged."""
        try:
            with file.open("rb") as content:
                checksum = hashlib.file_digest(content, "sha256").hexdigest()
            if file.stem.rpartition("-")[2] != checksum:
                raise ValueError("its checksum is another")
            return RowStates(length=BLOCK, slots=_slots(file, self._device), recurrent=[])
        except OSError as error:  # another process has made room
            _log.debug("%s is not read: %s", file, error)
        except (ValueError, SafetensorError) as error:
            _log.warning("%s is damaged (%s): it is removed, and its tokens are read again", file, error)
            with suppress(OSError):
                file.unlink(missing_ok=True)
        return None

    def _write(self, index: int, states: RowStates) -> Path | None:
        part = states.part(BLOCK * index, BLOCK * (index + 1))
        slots = (part.copied() if isinstance(part, RowPages) else part).slots
        content = save(
            {
                f"{layer}.{number}": kept.cpu().clone(memory_format=torch.contiguous_format)
                for layer, parts in enumerate(slots)
                for number, kept in enumerate(parts)
            }
        )
        if not self._folder.has_room((index + 1) * len(content)):  # its beginning has to stay
            return None

        def write(path: Path) -> str:
            path.write_bytes(content)
            return f"{self._names[index]}-{hashlib.sha256(content).hexdigest()}.safetensors"

        return self._folder.write(write)


def joined(states: RowStates | None, blocks: Sequence[RowStates]) -> RowStates | None:
    """These states of the first tokens, and those of the blocks from the one on that they end in, if that is more."""
    length = 0 if states is None else states.length
    first = length // BLOCK
    if BLOCK * (first + len(blocks)) <= length:
        return states
    beginning = [] if states is None or not first else [states.part(0, BLOCK * first)]
    return one_after_another([*beginning, *blocks])


def _slots(file: Path, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """The parts of each layer, mapped: memory is taken by what is read of them."""
    with safe_open(file, framework="pt") as tensors:
        names = sorted(tensors.keys(), key=lambda name: tuple(map(int, name.split("."))))
        by_layer: dict[str, list[torch.Tensor]] = {}
        for name in names:
            by_layer.setdefault(name.partition(".")[0], []).append(tensors.get_tensor(name).to(device))
    return [tuple(parts) for parts in by_layer.values()]


def _names(model: PreTrainedModel, tokens: Sequence[int]) -> Iterator[str]:
    """Of the full blocks of a text; none for a model that has changed since it was loaded."""
    digest = _identity(model)
    if digest is None:
        return
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest = hashlib.sha256(digest + array("q", tokens[start : start + BLOCK]).tobytes()).digest()
        yield digest.hex()[:32]


def _identity(model: PreTrainedModel) -> bytes | None:
    """Of all that states depend on but the tokens; rounding is by kernels, too."""
    files = files_of(model)
    if files is None:
        return None
    device = home_device(model)
    parts = (
        *(_VERSION, BLOCK, files, model.config.to_json_string(use_diff=False), model.config._attn_implementation),
        *(structure_name(model), model.dtype, device.type, transformers.__version__, native.identity()),
        torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
    )
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def _why_not(model: PreTrainedModel) -> str | None:
    if keeps_states(model.config):
        return "keeps states that each token overwrites: they have no beginning"
    if (limit := rotation_limit(model)) is not None:
        return f"changes its rotary embedding at {limit} tokens, and with it what it has read before"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "is on several devices"
    if files_of(model) is None:
        return "was not loaded from a file by specdec.models.load, or has been changed since (by an adapter?)"
    return None
