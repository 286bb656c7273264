"""A model that `from_pretrained` can read, read carefully: safetensors and GGUF only, every failure a `ModelError`."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from specdec.errors import ModelError
from specdec.kernels.model.origin import note_files
from specdec.model_options import QuantizedWeights, Weights
from specdec.models.files import check_memory, fingerprint, weight_files

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that `from_pretrained` can read, and what to advise if it cannot."""

    name: str
    location: str
    """A folder or a hub id."""
    gguf_file: str | None = None
    is_offline: bool = False
    """Whether a hub id is looked for in the cache only."""
    remedy: str

    def read_tokenizer(self, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        with _reading(f"a tokenizer from {self.name}", self.remedy):
            return AutoTokenizer.from_pretrained(
                self.location, gguf_file=self.gguf_file, **self._options(trust_remote_code)
            )

    def read_config(self, *, trust_remote_code: bool = False) -> PreTrainedConfig:
        with _reading(f"the configuration of {self.name}", self.remedy):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.location, gguf_file=self.gguf_file, **self._options(trust_remote_code)
            )
            _check_sizes(config)
        return config

    def read_model(
        self, dtype: torch.dtype | str, *, trust_remote_code: bool = False, weights: Weights = "stock"
    ) -> PreTrainedModel:
        """
        Args:
            weights: what the model will be prepared to. Float weights that will be packed stay in their files, and in
                the type that they have there.

        Raises:
            ModelError: it cannot be read, or does not fit in memory.
        """
        files = [] if self.gguf_file is not None else weight_files(self.location)
        if files:
            with _reading(f"the model {self.name}", self.remedy):
                self._check_layers(files, trust_remote_code)
            check_memory(self.name, files, dtype, weights)
        is_packed = bool(files) and weights in get_args(QuantizedWeights) and dtype == torch.float32
        model = self._read("auto" if is_packed else dtype, trust_remote_code)
        if is_packed and _lost_precision(model):
            model = self._read(dtype, trust_remote_code)
        if files:
            note_files(model.eval(), fingerprint(files))
        return model

    def _options(self, trust_remote_code: bool) -> dict[str, bool]:
        return {"trust_remote_code": trust_remote_code, "local_files_only": self.is_offline}

    def _read(self, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": dtype, **self._options(trust_remote_code)}
        if self.gguf_file is not None:
            options |= {"gguf_file": self.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        with _reading(f"the model {self.name}", self.remedy), _without_progress_bars(self.gguf_file is not None):
            model, info = AutoModelForCausalLM.from_pretrained(
                self.location, use_safetensors=True, output_loading_info=True, **options
            )
            _check_sizes(model.config)
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"the model {self.name} lacks {len(missing)} of its weights, {missing[0]} among them. {self.remedy}"
            )
        return model

    def _check_layers(self, files: Sequence[Path], trust_remote_code: bool) -> None:
        """A damaged configuration may ask for millions of layers, which are built before any of them is missed."""
        config = AutoConfig.from_pretrained(self.location, **self._options(trust_remote_code))
        _check_sizes(config)
        num_layers, num_tensors = config.get_text_config(decoder=True).num_hidden_layers, 0
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                num_tensors += len(tensors.keys())
        if num_layers > num_tensors:
            raise ValueError(f"config.json asks for {num_layers} layers, and the files hold {num_tensors} tensors")


def _lost_precision(model: PreTrainedModel) -> bool:
    """Whether buffers that are computed, not loaded, have taken the narrow type of the weights."""
    return any(
        buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set
    )


def _check_sizes(config: PreTrainedConfig) -> None:
    """Some that are not above zero make a model without layers, or one that fails at its first forward."""
    config = config.get_text_config(decoder=True)
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name} is at least 1, and its configuration has {size}")


@contextlib.contextmanager
def _reading(what: str, remedy: str) -> Iterator[None]:
    """Tell any failure as a ModelError: on bad files the readers raise anything up to a bare `Exception`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no details").splitlines()[0].rstrip(" .:")
        raise ModelError(f"cannot read {what}: {type(error).__name__}: {reason}. {remedy}") from error


@contextlib.contextmanager
def _without_progress_bars(of_gguf: bool) -> Iterator[None]:
    """Keep transformers from drawing bars: commands draw their own, or none. No setting turns off those of GGUF."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if of_gguf else contextlib.nullcontext():
            yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()
