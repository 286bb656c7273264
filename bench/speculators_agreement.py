"""Whether the speculators package reads what `specdec train-head` writes, and computes the same from it.

    python -m bench.speculators_agreement

Writes a small random DSpark head, has speculators load it, and compares weights and blocks. The package asks for other
versions of its dependencies than this one: install it without them (`pip install --no-deps speculators loguru
pydantic-settings datasets`).

Shape legend: T positions, A anchors, S slots of a block, C channels, V draft vocabulary.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.head.dspark import DSpark
from specdec.testing import tiny_model
from specdec.training.heads.blocks import block_logits, run_blocks
from specdec.training.heads.corpus import Batch
from specdec.training.heads.export import save_head
from specdec.training.heads.initial import initial_block
from specdec.training.heads.recipes import BlockRecipe
from specdec.tree_model.layer_views import LayerViews

LAYERS, LENGTH, ANCHORS, SLOTS = (1, 3), 20, (5, 9), 4
BOUND = 1e-4


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    target = tiny_model("llama", num_hidden_layers=3)
    head = random_head(target)
    with TemporaryDirectory() as folder:
        target.save_pretrained(Path(folder) / "target")
        save_head(Path(folder) / "head", head, target, str(Path(folder) / "target"), {}, SLOTS)
        other = load(Path(folder) / "head", target)
    theirs = other.state_dict()
    different = [name for name, weight in head.named_parameters() if not torch.equal(theirs[name].float(), weight)]
    print(f"weights that differ: {different or 'none'}")
    errors = compare(head, target, other)
    for name, error in errors.items():
        print(f"{name}: largest difference {error:.1e}")
    if different or max(errors.values()) > BOUND:
        raise SystemExit("speculators and specdec do not agree")


def random_head(target: Any) -> DSpark:
    """With weights that bfloat16 holds."""
    recipe = BlockRecipe(vocabulary=100, block_size=SLOTS, markov_rank=8)
    head = initial_block(target, torch.arange(0, 200, 2), recipe, LAYERS)
    assert head.confidence_head is not None
    with torch.no_grad():
        head.confidence_head.proj.weight.normal_()
        for weight in head.parameters():
            weight.copy_(weight.bfloat16())
    return head


def load(folder: Path, target: Any) -> Any:
    """In float32, the embeddings too, which it has from the target in the dtype of the head."""
    package = importlib.import_module("speculators.models.dspark")
    config = package.DSparkSpeculatorConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    head = package.DSparkDraftModel.from_pretrained(str(folder), config=config).float().eval()
    with torch.no_grad():
        head.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    return head


@torch.no_grad()
def compare(head: DSpark, target: Any, other: Any) -> dict[str, float]:
    """Largest differences of what the LM head reads, of logits and of confidence."""
    tokens_1T = torch.randint(0, 200, (1, LENGTH))
    view = LayerViews(target).whole(LAYERS)
    view.model(input_ids=tokens_1T, use_cache=False)
    anchors_1A = torch.tensor([ANCHORS])
    nothing = torch.empty(0)
    batch = Batch(tokens_1T, dict(view.states), view.states[LAYERS[-1]], nothing, nothing, nothing)
    ours_ASC = run_blocks(head, target.get_input_embeddings().weight, batch, anchors_1A)[0]
    before_AS = torch.stack([tokens_1T[0, anchor : anchor + SLOTS] for anchor in ANCHORS])
    theirs_ASC, logits_ASV, confidence_AS = blocks_of(other, batch, anchors_1A[0], before_AS)
    ours_ASV = block_logits(head, ours_ASC.flatten(0, 1), before_AS.flatten()).view_as(logits_ASV)
    said_AS = head.confidence(ours_ASC, before_AS)
    assert said_AS is not None
    pairs = {
        "slots": (ours_ASC, theirs_ASC), "logits": (ours_ASV, logits_ASV), "confidence": (said_AS, confidence_AS)
    }  # fmt: skip
    return {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}


def blocks_of(other: Any, batch: Batch, anchors_A: Tensor, before_AS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What speculators computes: of the slots, their logits and their confidence."""
    core = importlib.import_module("speculators.models.dflash.core")
    core.select_anchors = lambda *_args, **_kwargs: (anchors_A, torch.ones_like(anchors_A, dtype=torch.bool))  # type: ignore[attr-defined]
    states_1TX = torch.cat([batch.hidden[layer] for layer in LAYERS], -1)
    ones_1T, zeros_1T = torch.ones(1, LENGTH), torch.zeros(1, LENGTH, dtype=torch.long)
    slots, logits, *_ = other._backbone_forward(
        states_1TX, batch.tokens_BT, ones_1T, batch.final_BTC, zeros_1T, max_anchors=len(anchors_A)
    )
    slots_ASC = slots.view(*before_AS.shape, -1)
    known_ASR = other.markov_head.prev_embeddings(before_AS)
    bias_ASV = other.markov_head.block_bias(prev_token_ids=before_AS, hidden_states=slots_ASC, prev_emb=known_ASR)
    return (
        slots_ASC,
        logits.view(*before_AS.shape, -1) + bias_ASV,
        other.confidence_head(torch.cat([slots_ASC, known_ASR], -1)),
    )


if __name__ == "__main__":
    main()
