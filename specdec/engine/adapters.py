"""Several LoRA adapters of one base, which requests choose by name: rows of different ones never share a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.engine.request import Generation, Request
from specdec.errors import CapacityError
from specdec.stages import stage

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapters(folders: Mapping[str, Path]) -> None:
    """Check what can be told without the model.

    Args:
        folders: where each adapter was saved by peft, by name.

    Raises:
        ValueError: peft is not installed, or a folder holds no LoRA adapter.
    """
    if folders and find_spec("peft") is None:
        raise ValueError("LoRA adapters are loaded by peft, which is not installed: pip install peft")
    for name, folder in folders.items():
        _check_folder(name, folder)


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> dict[str, str]:
    """Put LoRA adapters into a model, which is decoded without them until one is chosen.

    Args:
        folders: where each was saved by peft, by the name that requests have for it.

    Returns:
        For each of these names the one that the adapter has inside the model (`model.set_adapter`).

    Raises:
        ValueError: peft is not installed, a folder holds no LoRA adapter, or one does not fit the model. Nothing has
            been changed where the folder or peft is at fault.
    """
    if not folders:
        return {}
    check_adapters(folders)
    inside = {name: f"lora_{number}" for number, name in enumerate(folders)}  # a module's name may have no dots
    for name, folder in folders.items():
        try:
            with stage(f"loading the LoRA adapter {name}"):
                model.load_adapter(str(folder), adapter_name=inside[name])
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(
                f"the LoRA adapter {name!r} in {folder} does not fit {model.name_or_path}: {error}"
            ) from error
    model.eval()
    model.disable_adapters()
    return inside


def _check_folder(name: str, folder: Path) -> None:
    from peft import PeftConfig

    if not (folder / _CONFIG).is_file():
        raise ValueError(f"the LoRA adapter {name!r}: {folder} has no {_CONFIG}; give the folder that peft has saved")
    try:
        kind = str(PeftConfig.from_pretrained(str(folder)).peft_type)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the LoRA adapter {name!r}: {folder / _CONFIG} cannot be read: {error}") from error
    if kind.rpartition(".")[2] != "LORA":
        raise ValueError(f"{name!r} in {folder} is an adapter of type {kind}: only LoRA adapters are served")
    if not (folder / _WEIGHTS).is_file():  # peft would take a pickle
        raise ValueError(
            f"the LoRA adapter {name!r}: {folder} has no {_WEIGHTS}, the only file that its weights are read from; "
            "save the adapter again with save_pretrained(..., safe_serialization=True)"
        )


class LoraEngine:
    """An engine for the base and one for each of its LoRA adapters, all on one model, whose rounds take turns.

    A forward has rows of one adapter only, so that each says what the model with that adapter says; every engine has
    prefixes, queue and rows of its own, and a share of the key/value memory. To be used as an `Engine`.

    Args:
        model: the base, with its adapters (`load_adapters`).
        adapters: the names that requests have for them -> those that they have inside the model.
        make: makes an engine on the model.
        max_cached_tokens: slots of all engines together; None: half of the memory that is free now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, str],
        make: Callable[[int | None], Engine],
        max_cached_tokens: int | None = None,
    ):
        self.model = model
        self._inside: dict[str | None, str | None] = {None: None}
        self._inside.update(adapters)
        self._active: str | None = None
        self._engines: dict[str | None, Engine] = {}
        share = None if max_cached_tokens is None else max(max_cached_tokens // len(self._inside), 1)
        for name in self._inside:
            self._activate(name)
            self._engines[name] = make(share)
            if share is None:  # of what was free before there was any
                share = max(self._engines[name].max_cached_tokens // len(self._inside), 1)
                self._engines[name].close()
                self._engines[name] = make(share)
            self._engines[name].adapter = name
        self._turns = list(self._engines)

    @property
    def adapters(self) -> list[str]:
        """The names that requests may have for an adapter."""
        return [name for name in self._engines if name is not None]

    @property
    def max_rows(self) -> int:
        """Of one forward."""
        return self._engines[None].max_rows

    @property
    def max_waiting(self) -> int:
        return self._engines[None].max_waiting

    @property
    def max_cached_tokens(self) -> int:
        """For the requests of one adapter."""
        return self._engines[None].max_cached_tokens

    @property
    def num_rows(self) -> int:
        return sum(engine.num_rows for engine in self._engines.values())

    @property
    def num_waiting(self) -> int:
        return sum(engine.num_waiting for engine in self._engines.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(engine.num_cached_tokens for engine in self._engines.values())

    def submit(self, request: Request) -> Generation:
        """As `Engine.submit`, to the engine of its adapter.

        Raises:
            CapacityError: as there, and if twice `max_waiting` requests wait for all adapters together.
            ValueError: as there, and for an adapter that there is not.
        """
        engine = self._engines.get(request.adapter)
        if engine is None:
            raise ValueError(
                f"there is no adapter {request.adapter!r}: there are {', '.join(map(repr, self.adapters))}"
            )
        if self.num_waiting >= 2 * self.max_waiting:
            raise CapacityError(f"{self.num_waiting} requests wait, and no more may: try again later")
        return engine.submit(request)

    def step(self) -> bool:
        """A step of the next engine that has anything to do; returns whether anything is left to do."""
        for name in list(self._turns):
            engine = self._engines[name]
            if engine.is_idle:
                continue
            self._turns.remove(name)
            self._turns.append(name)
            self._activate(name)
            engine.step()
            break
        return any(not engine.is_idle for engine in self._engines.values())

    def cancel(self, generation: Generation) -> None:
        """As `Engine.cancel`."""
        self._engines[generation.request.adapter].cancel(generation)

    def run(self) -> None:
        """`step` until nothing is left to do."""
        while self.step():
            pass

    def close(self) -> None:
        """Cancel everything that is under way; the model is the base again."""
        for engine in self._engines.values():
            engine.close()
        self._activate(None)

    def _activate(self, name: str | None) -> None:
        """The model is that of this adapter from now on."""
        if name == self._active:
            return
        if self._active is None:
            self.model.enable_adapters()
        inside = self._inside[name]
        if inside is None:
            self.model.disable_adapters()
        else:
            self.model.set_adapter(inside)
        self._active = name
