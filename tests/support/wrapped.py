"""What people wrap around models, and what docs/compatibility.md says of it: `exact`, or the refusal's words."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specdec.testing import tiny_model

EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A way to wrap a model.

    Args:
        build: makes one; skips the test where a library is not installed.
        says: of a call.
        copy_says: of a call that an int8 copy of it drafts for.
    """

    build: Callable[[], Any]
    says: str = EXACT
    copy_says: str = EXACT


def bare() -> PreTrainedModel:
    return tiny_model("llama", hidden_size=64, intermediate_size=128)


def lora() -> Any:
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return pytest.importorskip("peft").LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")


def add_lora(model: PreTrainedModel, name: str = "default", seed: int = 0) -> PreTrainedModel:
    config = lora()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, name)
    return model.eval()


def peft_model() -> Any:
    return pytest.importorskip("peft").get_peft_model(bare(), lora()).eval()


def merged_in_place() -> PreTrainedModel:
    model = peft_model()
    model.merge_adapter()
    return model.get_base_model()


def prompt_tuned() -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bare(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for weights in model.prompt_encoder.parameters():
        torch.nn.init.normal_(weights)
    return model


def quantised(config: str, **settings: Any) -> PreTrainedModel:
    quantization, model = pytest.importorskip("torchao.quantization"), bare()
    quantization.quantize_(model, getattr(quantization, config)(**settings))
    return model


def quantised_dynamically() -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(bare(), {torch.nn.Linear})


def compiled_in_place() -> PreTrainedModel:
    model = bare()
    model.compile(backend="eager")
    return model


def with_compiled_parts() -> PreTrainedModel:
    model = bare()
    for index, layer in enumerate(model.model.layers):
        layer.mlp = torch.compile(layer.mlp, backend="eager")
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def offloaded() -> PreTrainedModel:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(bare(), tempfile.mkdtemp(), execution_device="cpu")


_ROUNDS = (
    "products of LlamaForCausalLM round what goes into them (quantised activations), so that a token's logits jump "
    "with the tokens beside it: quantise the weights alone, or use model.generate()"
)
_NO_INT8 = (
    "no linear of LlamaForCausalLM has weights that can become int8 (another library has quantised them already, or "
    "their code reads them): leave weights='int8' and QuantizedSelf out"
)
_NOT_A_MODEL = "model is a transformers PreTrainedModel, got "

WRAPPED = {
    "peft: LoRA, by `model.add_adapter()`": Wrapped(build=lambda: add_lora(bare())),
    "peft: LoRA, in `peft_model.get_base_model()`": Wrapped(build=lambda: peft_model().get_base_model()),
    "peft: LoRA, `merge_adapter()`": Wrapped(build=merged_in_place),
    "peft: LoRA, `merge_and_unload()`": Wrapped(build=lambda: peft_model().merge_and_unload()),
    "peft: the `PeftModel` itself": Wrapped(
        build=peft_model,
        says=_NOT_A_MODEL + "PeftModelForCausalLM: pass model.get_base_model(), in which the adapters are active",
    ),
    "peft: learned prompts": Wrapped(
        build=prompt_tuned,
        says=_NOT_A_MODEL
        + "PeftModelForCausalLM: prompts that were learned are no part of the model inside, use its own generate()",
    ),
    "torchao: `Int8WeightOnlyConfig`": Wrapped(build=partial(quantised, "Int8WeightOnlyConfig"), copy_says=_NO_INT8),
    "torchao: `IntxWeightOnlyConfig`, int4": Wrapped(
        build=lambda: quantised("IntxWeightOnlyConfig", weight_dtype=torch.int4), copy_says=_NO_INT8
    ),
    "torchao: `Int8DynamicActivationInt8WeightConfig`": Wrapped(
        build=partial(quantised, "Int8DynamicActivationInt8WeightConfig"), says=_ROUNDS
    ),
    "torchao: `Int8DynamicActivationIntxWeightConfig`": Wrapped(
        build=partial(quantised, "Int8DynamicActivationIntxWeightConfig"), says=_ROUNDS
    ),
    "torch: `quantize_dynamic`": Wrapped(build=quantised_dynamically, says=_ROUNDS),
    "torch: `model.compile()`": Wrapped(build=compiled_in_place),
    "torch: compiled layers and MLPs": Wrapped(build=with_compiled_parts),
    "torch: `torch.compile(model)`": Wrapped(
        build=lambda: torch.compile(bare(), backend="eager"),
        says=_NOT_A_MODEL + "OptimizedModule: compile it in place, with model.compile()",
    ),
    "accelerate: weights on the disk": Wrapped(
        build=offloaded, copy_says="weights='int8' is for models on the CPU; move it there first"
    ),
}
