"""Process-reward models, tiny and random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForTokenClassification, LlamaConfig

import routers
import specdec
from routers import RewardModel, RewardThreshold, Steps
from specdec.drafters import SmallModel
from specdec.testing import ByteTokenizer, random_prompts, tiny_model
from tests.support.references import with_noise

TEXTS = [("How much is 1 and 1?", ["It is 1 + 1.\n\n", "So it is 2."]), ("Why?", ["Because."])]
CONFIG = LlamaConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.3,
    num_labels=2,
)


def ids_of(problem: str, steps: list[str]) -> torch.Tensor:
    """Bytes are tokens; the separator's last one is a newline."""
    return torch.tensor([list((problem + "\n" + "".join(step.strip() + "\n" for step in steps)).encode())])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    AutoModelForTokenClassification.from_config(CONFIG).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def valued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM whose checkpoint holds a value head besides."""
    folder = tmp_path_factory.mktemp("valued")
    tiny_model("llama").save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([0.3])}
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_token_classifier_is_read_at_the_separator(classifier: Path):
    model = AutoModelForTokenClassification.from_pretrained(classifier).eval()
    expected = [float(model(ids_of(*text)).logits[0, -1].softmax(-1)[1]) for text in TEXTS]
    assert RewardModel(classifier).of_texts(TEXTS) == pytest.approx(expected, rel=1e-4)
    assert RewardModel(classifier, batch_size=1).of_texts(TEXTS) == pytest.approx(expected, rel=1e-4)


def test_a_value_head_is_read_at_the_separator(valued: Path):
    model = AutoModel.from_pretrained(valued).eval()
    tensors = load_file(valued / "model.safetensors")
    weight, bias = (tensors[f"v_head.summary.{name}"] for name in ("weight", "bias"))
    expected = [
        float((model(ids_of(*text)).last_hidden_state[0, -1] @ weight[0] + bias[0]).sigmoid()) for text in TEXTS
    ]
    assert RewardModel(valued).of_texts(TEXTS) == pytest.approx(expected, rel=1e-4)


def routed(reward: RewardModel) -> list[specdec.decoding.stats.StepRecord]:
    model = tiny_model("llama")
    out = specdec.generate(
        model,
        **random_prompts([5, 9]),
        drafter=SmallModel(with_noise(model, 0.03)),
        router=RewardThreshold(reward, threshold=0.5, steps=Steps(max_tokens=6)),
        tokenizer=ByteTokenizer(),
        max_new_tokens=24,
        return_dict_in_generate=True,
    )
    return out.stats.steps


def test_it_routes(valued: Path):
    steps = routed(RewardModel(valued))
    assert all((step.writer == "target") == (step.score > 0.5) for step in steps)


def test_one_that_says_nan_leaves_the_steps_to_the_target(valued: Path):
    reward = RewardModel(valued)
    torch.nn.init.constant_(reward.network.head.weight, torch.nan)
    steps = routed(reward)
    assert {step.writer for step in steps} == {"target"}
    assert {step.reason for step in steps} == {"no score"}
    assert sum(step.num_tokens for step in steps) == 48


def test_what_is_no_reward_model(tiny: str, tmp_path: Path):
    with pytest.raises(ValueError, match="without a value head"):
        RewardModel(tiny)
    with pytest.raises(ValueError, match="RewardModel"):
        RewardModel(tmp_path / "none")
    CONFIG.num_labels = 3
    AutoModelForTokenClassification.from_config(CONFIG).save_pretrained(tmp_path)
    CONFIG.num_labels = 2
    ByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 classes"):
        RewardModel(tmp_path)


def test_it_is_exported_but_not_imported():
    assert routers.RewardModel is RewardModel
    with pytest.raises(AttributeError, match="no attribute 'Rewards'"):
        _ = routers.Rewards
