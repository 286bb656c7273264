"""prepare() and unprepare(): a model's linears and decoder layers are swapped in place, and back."""

import copy
import itertools
import logging
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import DynamicCache

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.hf import CACHE, num_processes
from specdec.kernels import native
from specdec.kernels.model import device_int4
from specdec.kernels.model.layer import FusedLayer, contiguous, is_supported
from specdec.kernels.model.layer_trial import matches_reference
from specdec.kernels.model.linear import BANDS, NATIVE, calibrate, is_dense, is_plain, small_batch_forward
from specdec.kernels.model.native_model import NativeModel, Once
from specdec.kernels.model.origin import files_of, note_files
from specdec.kernels.model.packed_file import release
from specdec.kernels.model.packing import PackedWeights, head_of
from specdec.kernels.model.persistence import guard
from specdec.kernels.model.prepared import MARK, Prepared, prepared
from specdec.kernels.model.quantized_linear import LINEARS, Int8Linear, QuantizedLinear, check_product
from specdec.model_options import QuantizedWeights
from specdec.stages import stage

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("specdec")


def prepare(model: Model, weights: str | None = None, compile: bool = False) -> Model:
    """Makes forwards of 1 to 64 rows cheap; returns the model, changed in place. Inference only. On a CPU:

    weights: None or "float" keeps the float32 weights and logits within rounding (a float32 model gets linears that
        stream the weights once for up to 32 rows). A bfloat16 model keeps its weights as they are, in 2 bytes, and its
        outputs bfloat16; its products, and all within a layer, are computed in float32, also of prompts: nearer to the
        float32 model than its own forward is, and a token's logits are the same bits whatever else is in its forward
        (within the layout named below). Other dtypes and devices are left as they are. "int8" replaces every
        `nn.Linear`, the LM head included, by 8-bit weights; "int4" by weights of 4 bits, with a scale and an offset for
        every 32 inputs (5 bits in all), but the LM head, whose errors show most, by 8-bit ones. Tied embeddings stay
        float, and so do linears whose weight the model's code reads itself (some routers). The float weights are then
        gone, what remains becomes float32, and `unprepare` refuses. So do `to(dtype)`, `to(device)`, `state_dict`,
        `load_state_dict` and `save_pretrained`; copies, pickles and `torch.save(model)` work. Activations are quantised
        too, for more speed, where all of the model is native and a token's logits are the same bits whatever else is in
        its forward (the layout of Llama, Mistral, Qwen2 and Qwen3); elsewhere they stay float32 (weight-only), so that
        a token verified beside others gets the logits that it gets alone, up to rounding.
        On a CUDA device there is "int4" alone, by torchao (the extra `int4`; not measured), for bfloat16 models: 5 bits
        in all again, without the LM head and linears whose inputs are no multiple of 32, which stay as they are; all
        else stays bfloat16 on the device, and the same is refused.
    compile: refused: torch.compile was slower than the native kernels on CPUs, and CUDA is not covered yet.

    Idempotent. Weights of a float model may change in between. Where nothing could be done, a warning says so (logger
    `specdec`); it says at level INFO what was done.
    Raises UnsupportedOptionError for an unknown or impossible option, UnsupportedModelError for a model that is on
    another device, or has no `nn.Linear` that can have such weights.
    """
    weights = None if weights == "float" else weights
    before = prepared(model)
    if before is not None and before.weights == weights:
        return model
    with stage("packing weights" if weights is None else f"packing weights to {weights}"):
        _prepare(model, weights, compile, must_be_exact=True)
    _tell(model)
    return model


def _tell(model: nn.Module) -> None:
    """Say what was done, or that nothing was."""
    done = prepared(model)
    assert done is not None
    if done.num_linears or done.num_fused_layers:
        counts = f"{done.num_linears} linears and {done.num_fused_layers} layers"
        by = device_int4.describe() if done.weights and device_int4.serves(model) else native.describe()
        _log.info("prepared %s: %s, %s", type(model).__name__, counts, by)
        return
    first = next(model.parameters())
    _log.warning(
        "prepare() has changed nothing: %s is %s on %s, and float kernels are for float32 on a CPU (and bfloat16, "
        "where they are native: %s). Load it with dtype=torch.float32, or give weights='int8' on a CPU",
        type(model).__name__,
        str(first.dtype).removeprefix("torch."),
        first.device.type,
        native.describe(),
    )


def _prepare(
    model: Model, weights: str | None, compile: bool = False, *, must_be_exact: bool, is_copy: bool = False
) -> Model:
    """`must_be_exact`: the logits of a token must not depend on the others in its forward, but for rounding. `is_copy`:
    the weights are another model's too."""
    if weights not in (None, *LINEARS):
        raise UnsupportedOptionError(f"weights={weights!r} is not known: use None or 'float', 'int8' or 'int4'")
    if compile:
        raise UnsupportedOptionError("compile=True is not available: leave it out, native kernels are faster on CPUs")
    done: Prepared | None = model.__dict__.get(MARK)
    if done is not None:
        if done.weights == weights:
            return model
        unprepare(model)  # refuses where the float weights are gone
    check_whole(model)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UnsupportedModelError(f"{type(model).__name__} has no nn.Linear to prepare (GPT-2 uses Conv1D)")
    files = files_of(model)
    if weights and device_int4.serves(model):
        _to_device_int4(model, weights, files)
        return model
    num_linears = _to_quantized(model, weights, files, is_copy=is_copy) if weights else _to_small_batch(model)
    _finish(model, weights, num_linears, must_be_exact)
    if files is not None and weights is not None:
        note_files(model, f"{files} {weights}")
    return model


def adopt(model: Model, weights: str) -> Model:
    """What `prepare` does to a model whose linears are quantised already, as they are read from a file."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    floats = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in floats if native.library() else []:  # rows of torch's products depend on their company
        linear.__dict__["forward"] = small_batch_forward(linear, dict.fromkeys(BANDS, NATIVE))
    _guard(model, weights)
    _finish(model, weights, len(linears), must_be_exact=True)
    _tell(model)
    return model


def _finish(model: nn.Module, weights: str | None, num_linears: int, must_be_exact: bool) -> None:
    """The layers, and whether activations are quantised."""
    num_layers = _to_lean_layers(model) if native.library() else 0
    activations = "float"
    if weights and native.library():
        if must_be_exact and not rows_are_independent(model):
            _to_weight_only(model)
            num_layers = 0
        else:
            activations = "int8"
    setattr(model, MARK, Prepared(weights, num_linears, num_layers, activations))


def check_whole(model: nn.Module) -> None:
    """Raises UnsupportedModelError for a model of which this process holds a part."""
    if num_processes(model) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is split over processes (tp_plan), and its products are those of the split: "
            "leave prepare() out"
        )


def prepare_like(part: Model, model: nn.Module) -> Model:
    """Prepares a drafting module beside a model that has been prepared. It has 8 bits, beside float32 weights too: a
    draft may be wrong, and costs a quarter so. Beside 4 bits it has 8, as which of its linears is a head is not known;
    on a CUDA device, where there are no 8, it stays as it is.
    """
    done, dtype = prepared(model), next(model.parameters()).dtype
    if done is None or device_int4.serves(part):
        return part
    is_quantized = done.weights or (dtype is torch.float32 and native.library() is not None)
    return _prepare(part, Int8Linear.weights if is_quantized else None, must_be_exact=False)


def unprepare(model: Model) -> Model:
    """Undoes prepare(model): modules and weights are those from before, bit for bit.

    Refuses an int8 or int4 model (UnsupportedOptionError): its float weights are gone, load the model again.
    """
    done: Prepared | None = model.__dict__.get(MARK)
    if done is None:
        return model
    if done.weights:
        raise UnsupportedOptionError(
            f"the model was prepared with weights={done.weights!r}: its float weights are gone, reload it"
        )
    for module in model.modules():
        if isinstance(module, nn.Linear) or isinstance(module.__dict__.get("forward"), FusedLayer):
            module.__dict__.pop("forward", None)
    delattr(model, MARK)
    return model


def quantized_copy(model: Model, weights: QuantizedWeights = "int8") -> Model:
    """An int8 (or int4) copy of a float model, which is left as it is. Embeddings and norms in float32 are shared,
    so it costs only the int8 weights: a quarter of the float ones (int4: a sixth, and a quarter of the LM head). It is
    a draft, and may be wrong: its activations are always quantised on a CPU. On a CUDA device (int4 alone) all that is
    not quantised is shared, the LM head too."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    if (files := files_of(model)) is not None:
        note_files(copied, files)
    return _prepare(copied, weights, must_be_exact=False, is_copy=True)


def _to_quantized(model: nn.Module, weights: str, files: str | None, *, is_copy: bool) -> int:
    """Replaces the linears one by one, so that at most one is held in both forms. An LM head's are of 8 bits: one of
    4 changed one in seven of the demo model's likeliest tokens."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnsupportedModelError(f"weights={weights!r} is for models on the CPU; move it there first")
    quantized = LINEARS[weights]
    check_product(quantized.weights)
    packed = PackedWeights.of(model, quantized, files, keeps_weights=is_copy)
    if not packed.kinds:
        raise UnsupportedModelError(
            f"no linear of {type(model).__name__} has weights that can become {weights} (another library has quantised "
            f"them already, or their code reads them): leave weights={weights!r} and QuantizedSelf out"
        )
    replaced: dict[nn.Module, QuantizedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child in packed.kinds:
                if child not in replaced:
                    replaced[child] = packed.make(child)
                setattr(parent, name, replaced[child])
                if files is not None and not is_copy:  # mapped: what is the process's own would be written to swap
                    release(child.weight)
                child._parameters["weight"] = None  # whoever still holds the old module must not hold its weights
    _to_float32(model, packed)
    _guard(model, quantized.weights)
    return len(replaced)


def _to_device_int4(model: nn.Module, weights: str, files: str | None) -> None:
    linears, left = device_int4.quantise(model, weights)
    if left:
        _log.warning("%s: no weights of 4 bits for %s", type(model).__name__, ", ".join(left))
    like, taken = torch.zeros(1, dtype=device_int4.DTYPE, device=linears[0].weight.device), set(linears)
    for module in model.modules():
        if any(part in taken for part in module.modules()):
            guard(module, weights, like)
    setattr(model, MARK, Prepared(weights, len(linears), 0))
    if files is not None:
        note_files(model, f"{files} {weights} of a device")


def _guard(model: nn.Module, weights: str) -> None:
    for module in model.modules():
        if any(isinstance(part, QuantizedLinear) for part in module.modules() if part is not module):
            guard(module, weights)


def _to_float32(model: nn.Module, packed: PackedWeights) -> None:
    """What `model.float()` does, but in new tensors: the old ones may be another model's too (`quantized_copy`)."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if (
                    tensor is not None
                    and is_dense(tensor)
                    and tensor.is_floating_point()
                    and tensor.dtype != torch.float32
                ):
                    if tensor not in made:
                        made[tensor] = packed.float32(tensor)
                        if isinstance(tensor, nn.Parameter):
                            made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
                    tensors[name] = made[tensor]


def _to_small_batch(model: nn.Module) -> int:
    dtypes = (torch.float32, torch.bfloat16) if native.library() else (torch.float32,)
    linears = [module for module in model.modules() if type(module) is nn.Linear and is_plain(module.weight)]
    linears = [linear for linear in linears if linear.weight.dtype in dtypes]
    by_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Linear]] = {}
    for linear in linears:
        by_shape.setdefault((linear.weight.shape, linear.weight.dtype), []).append(linear)
    for (_, dtype), group in by_shape.items():
        choices = calibrate(group) if dtype is torch.float32 else dict.fromkeys(BANDS, NATIVE)
        for linear in group:
            linear.__dict__["forward"] = small_batch_forward(linear, choices)
    return len(linears)


@torch.no_grad()
def rows_are_independent(model: nn.Module) -> bool:
    """Whether the logits of a token are the same bits whatever else is in its forward.

    All quantised products must lie in native layers or be the LM head, and a forward of four tokens must say what four
    forwards of one say.
    """
    fused = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), FusedLayer)]
    inside = {id(part) for layer in fused for part in layer.modules()}
    inside.add(id(head_of(model)))
    if not fused or any(isinstance(part, QuantizedLinear) and id(part) not in inside for part in model.modules()):
        return False
    config: Any = model.config
    input_ids = torch.arange(1, 9).unsqueeze(0) * 7919 % config.get_text_config(decoder=True).vocab_size
    past = DynamicCache(config=config)
    model(input_ids[:, :4], **{CACHE: past}, use_cache=True)
    ahead = copy.deepcopy(past)
    expected = model(input_ids[:, 4:], **{CACHE: ahead}, use_cache=True).logits
    steps = [model(input_ids[:, i : i + 1], **{CACHE: past}, use_cache=True).logits for i in range(4, 8)]
    return torch.equal(torch.cat(steps, 1), expected)


def _to_weight_only(model: nn.Module) -> None:
    """Activations stay float32; the native layers, which quantise them, are given up."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight_only = True
        elif isinstance(module.__dict__.get("forward"), FusedLayer):
            del module.__dict__["forward"]


def _to_lean_layers(model: nn.Module) -> int:
    layers = [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")]
    fused = [layer for layer in layers if is_supported(layer) and matches_reference(layer)]
    quantized = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    rotation, group = Once(contiguous), NativeModel(quantized) if quantized else None
    for layer in fused:
        layer.__dict__["forward"] = forward = FusedLayer(layer, rotation, group)
        if group is not None:
            group.layers.append(forward)
    return len(fused)
