"""A model whose linears and embedding are the blocks of a GGUF file: nothing is dequantised, but where floats are kept.

The file is mapped and read one tensor at a time. For Llama and what has its layout.
Letters: N outputs, K inputs.
"""

import mmap
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.errors import ModelError
from specdec.kernels.model.gguf_modules import BLOCK_TYPES, Blocks, GgufEmbedding, GgufLinear
from specdec.kernels.model.origin import note_files
from specdec.kernels.model.prepare import adopt
from specdec.models.checkpoint import Checkpoint
from specdec.models.files import fingerprint
from specdec.models.gguf import Header, Tensor, read_header
from specdec.stages import stage

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""As files name them; Mistral's is llama."""
_FLOATS = frozenset(gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""transformers' names by the file's, those of layers without their beginning."""
_ROPE_FACTORS = "rope_freqs.weight"
"""What Llama 3's frequencies are divided by, beyond what the settings say."""


def load_gguf_model(path: Path, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a file, prepared; float32, in evaluation mode, on the CPU.

    Args:
        checkpoint: of its configuration.

    Raises:
        ModelError: the file is damaged, or holds what cannot be executed as it is; nothing has been done then.
    """
    header = checked_header(path)
    config = checkpoint.read_config()
    if config.num_hidden_layers > len(header.tensors):
        raise _damaged(path, f"{config.num_hidden_layers} layers are more than its {len(header.tensors)} tensors")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _File(path, header, data).check(model)
    with stage(f"repacking {path.name}"):
        with path.open("rb") as file:  # the embedding keeps the mapping
            _File(path, header, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).fill(model)
        adopted = adopt(model.requires_grad_(False).eval(), GgufLinear.weights)
    note_files(adopted, f"{fingerprint([path])} {GgufLinear.weights}")
    return adopted


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"cannot read {path}: {why}. It may be truncated or corrupt.")


def _unsupported(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path} cannot be executed as it is: {what}. Leave weights='gguf' (--weights gguf) out: the file is then "
        "converted to float32, which weights='int4' or 'int8' packs."
    )


def checked_header(path: Path) -> Header:
    """What stands before the weights, of a file whose blocks can be executed.

    Raises:
        ModelError: they cannot, or the file is damaged.
    """
    header = read_header(path)
    if header is None:
        raise _damaged(path, "it has no GGUF header that can be read")
    if header.architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise _unsupported(
            path, f"its architecture is {header.architecture or 'not named'}, and those known are {known}"
        )
    size, has_blocks = path.stat().st_size, False
    for name, tensor in header.tensors.items():
        if _module_name(name) is None and name != _ROPE_FACTORS:
            raise _unsupported(path, f"it has {name}, which is no part of the layers that are known")
        if tensor.kind not in BLOCK_TYPES | _FLOATS:
            known = ", ".join(sorted(kind.name for kind in BLOCK_TYPES | _FLOATS))
            raise _unsupported(path, f"{name} is of type {_type_name(tensor.kind)}, and those known are {known}")
        has_blocks |= tensor.kind in BLOCK_TYPES
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        if not tensor.shape or min(tensor.shape) < 1 or tensor.shape[-1] % num_values:
            raise _damaged(path, f"{name} has a shape of {tensor.shape}")
        if header.data_offset + tensor.offset + _num_values(tensor) // num_values * num_bytes > size:
            raise _damaged(path, f"{name} ends beyond the end of the file")
    if not has_blocks:
        raise _unsupported(path, "none of its weights are quantised")
    return header


def _num_values(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _type_name(kind: int) -> str:
    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _module_name(name: str) -> str | None:
    """transformers' name of what a file calls `name`, with its "weight" or "bias"; None for what has none."""
    match = re.fullmatch(r"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)", name)
    if match is None or match["part"] not in _MODULES:
        return None
    layer = "" if match["layer"] is None else f"model.layers.{int(match['layer'])}."
    return f"{layer}{_MODULES[match['part']]}.{match['kind']}"


class _File:
    """The weights of a file, by transformers' names."""

    def __init__(self, path: Path, header: Header, data: mmap.mmap):
        self._path, self._header, self._data = path, header, data
        self._names = {_module_name(name): name for name in header.tensors}

    def check(self, model: PreTrainedModel) -> None:
        """The file has all that the model needs, in its shapes, and nothing else.

        Raises:
            ModelError: it has not.
        """
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if unknown := [n for n in self._header.tensors if _module_name(n) not in wanted and n != _ROPE_FACTORS]:
            raise _unsupported(self._path, f"{unknown[0]} has no place in a {type(model).__name__}")
        if missing := [name for name in wanted if name not in self._names]:
            raise _damaged(self._path, f"it lacks {len(missing)} of its weights, {missing[0]} among them")
        for name, shape in wanted.items():
            tensor = self._header.tensors[self._names[name]]
            if tensor.shape != shape:
                raise _damaged(self._path, f"{self._names[name]} is {tensor.shape}, and its settings ask for {shape}")
            if len(shape) != 2 and tensor.kind not in _FLOATS:
                raise _unsupported(self._path, f"{self._names[name]} is quantised")

    def fill(self, model: PreTrainedModel) -> None:
        """Every parameter; a model that the file has passed `check` for.

        Raises:
            ModelError: a tensor holds what no number is.
        """
        inner: Any = model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=model.config)
        if _ROPE_FACTORS in self._header.tensors and not model.config.rope_parameters.get("factor"):
            inner.rotary_emb.inv_freq = inner.rotary_emb.inv_freq / self._floats(_ROPE_FACTORS)
            inner.rotary_emb.original_inv_freq = inner.rotary_emb.inv_freq
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        head_name = "token_embd" if model.config.tie_word_embeddings else "output"
        names = {module: name for name, module in model.named_modules()}
        for parent in list(names):
            for name, child in list(parent.named_children()):
                if child is embedding:
                    setattr(parent, name, GgufEmbedding(self._blocks("token_embd.weight")))
                elif isinstance(child, nn.Linear):
                    weight = f"{head_name}.weight" if child is head else self._names[f"{names[child]}.weight"]
                    setattr(parent, name, self._linear(weight, model))
        for module_name, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(self._floats(self._names[f"{module_name}.{name}"]))
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    def _linear(self, weight: str, model: PreTrainedModel) -> nn.Module:
        rows_N = self._order(weight, model)
        bias = f"{weight.removesuffix('weight')}bias"
        bias_N = self._floats(bias) if bias in self._header.tensors else None
        if bias_N is not None and rows_N is not None:
            bias_N = bias_N[rows_N]
        tensor = self._header.tensors[weight]
        if tensor.kind in BLOCK_TYPES:
            try:
                linear = GgufLinear(self._blocks(weight), bias_N, rows_N)
            except OverflowError as error:
                raise _damaged(self._path, f"{weight}: {error}") from error
            self._drop(weight)
            return linear
        weight_NK = self._floats(weight)
        dense = nn.Linear(1, 1, bias=False)
        dense.out_features, dense.in_features = weight_NK.shape
        dense.weight = nn.Parameter(weight_NK if rows_N is None else weight_NK[rows_N])
        dense.register_parameter("bias", None if bias_N is None else nn.Parameter(bias_N))
        return dense

    def _order(self, name: str, model: PreTrainedModel) -> torch.Tensor | None:
        """The file's row for each of the model's: the converter to GGUF pairs the halves of Llama's heads."""
        if self._header.architecture != "llama" or not re.search(r"\.attn_[qk]\.", name):
            return None
        config = model.config
        num_heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        rows_N = torch.arange(self._header.tensors[name].shape[0])
        return rows_N.view(num_heads, -1, 2).transpose(1, 2).flatten()

    def _blocks(self, name: str) -> Blocks:
        """Mapped."""
        tensor = self._header.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = tensor.shape[-1] // num_values * num_bytes
        start, num_rows = self._header.data_offset + tensor.offset, _num_values(tensor) // tensor.shape[-1]
        rows = np.frombuffer(self._data, dtype=np.uint8, count=num_rows * row_bytes, offset=start)
        return Blocks(rows=rows.reshape(num_rows, row_bytes), block_type=kind)

    def _floats(self, name: str) -> torch.Tensor:
        return self._blocks(name).floats().view(self._header.tensors[name].shape)

    def _drop(self, name: str) -> None:
        """Give back the memory that a tensor's pages take."""
        blocks, start = self._blocks(name).rows, self._header.data_offset + self._header.tensors[name].offset
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.madvise(mmap.MADV_DONTNEED, first, start + blocks.size - first)
