"""Whether the speculators package reads what `specdec train-head` writes, and computes the same from it.

    python -m bench.speculators_agreement

Writes a small random head of each kind, has speculators load it, and compares weights and what is said: of a DSpark
head the slots of blocks, of an EAGLE-3 head the steps of chains, of an MTP layer the first step (in training,
speculators shows later ones other keys than an engine does). The package asks for other versions of its dependencies
than this one: install it without them (`pip install --no-deps speculators hs-connectors loguru pydantic-settings
datasets`).

Shape legend: T positions, P pairs of a chain, A anchors, S slots of a block, C channels, V draft vocabulary.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.mtp import Mtp
from specdec.testing import tiny_model
from specdec.training.heads.blocks import block_logits, run_blocks
from specdec.training.heads.chains import ChainHead
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.export import save_head, stored_name
from specdec.training.heads.initial import initial_block, initial_eagle, initial_mtp
from specdec.training.heads.recipes import BlockRecipe, EagleRecipe, MtpRecipe
from specdec.tree_model.layer_views import LayerViews

LAYERS, LENGTH, ANCHORS, SLOTS, STEPS = (1, 2, 3), 20, (5, 9), 4, 3
BOUND = 1e-4
VOCAB_IDS = torch.arange(0, 200, 2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    target = tiny_model("llama", num_hidden_layers=3)
    made: list[tuple[Any, int, str, Callable[..., dict[str, float]]]] = [
        (
            initial_block(target, VOCAB_IDS, BlockRecipe(reach=SLOTS, markov_rank=8), LAYERS),
            SLOTS,
            "DSpark",
            blocks,
        ),
        (
            initial_eagle(target, VOCAB_IDS, EagleRecipe(num_layers=2), Corpus(target, [], LAYERS)),
            STEPS,
            "Eagle3",
            chains,
        ),
        (initial_mtp(target, MtpRecipe()), STEPS, "MTP", first_steps),
    ]
    is_wrong = False
    for head, length, name, compare in made:
        randomise(head)
        with TemporaryDirectory() as folder:
            target.save_pretrained(Path(folder) / "target")
            save_head(Path(folder) / "head", head, target, str(Path(folder) / "target"), {}, length)
            other = load(Path(folder) / "head", target, name)
        theirs = other.state_dict()
        weights = {stored_name(part, head.head_config.kind): weight for part, weight in head.named_parameters()}
        different = [part for part, weight in weights.items() if not torch.equal(theirs[part].float(), weight)]
        print(f"{name}: weights that differ: {different or 'none'}")
        errors = compare(head, target, other)
        for part, error in errors.items():
            print(f"{name}: {part}: largest difference {error:.1e}")
        is_wrong |= bool(different) or max(errors.values()) > BOUND
    if is_wrong:
        raise SystemExit("speculators and specdec do not agree")


@torch.no_grad()
def randomise(head: DSpark | Eagle3 | Mtp) -> None:
    """Weights that bfloat16 holds, none of them what another is."""
    for weight in head.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.1)
        weight.copy_(weight.bfloat16())


def load(folder: Path, target: Any, name: str) -> Any:
    """In float32, the embeddings and the LM head too, which it has from the target in the dtype of the head."""
    package = importlib.import_module(f"speculators.models.{name.lower()}")
    config = getattr(package, f"{name}SpeculatorConfig").from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    head = getattr(package, f"{name}DraftModel").from_pretrained(str(folder), config=config).float().eval()
    with torch.no_grad():
        head.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
        if name == "MTP":
            head.lm_head.weight.copy_(target.get_output_embeddings().weight)
    return head


def batch_of(target: Any) -> Batch:
    tokens_1T = torch.randint(0, 200, (1, LENGTH))
    view = LayerViews(target).whole(LAYERS)
    view.model(input_ids=tokens_1T, use_cache=False)
    nothing = torch.empty(0)
    return Batch(tokens_1T, dict(view.states), view.states[LAYERS[-1]], nothing, nothing, nothing)


@torch.no_grad()
def chains(head: Eagle3, target: Any, other: Any) -> dict[str, float]:
    """Largest difference of logits by step. speculators has a chain's steps where it begins."""
    batch, said = batch_of(target), []
    hook = other.lm_head.register_forward_hook(lambda _, __, logits: said.append(logits))
    states_1PX = torch.cat([batch.hidden[layer] for layer in LAYERS], -1)[:, :-1]
    no_text = torch.zeros(1, LENGTH - 1, dtype=torch.long)
    other(states_1PX, batch.tokens_BT[:, 1:], no_text, ttt_steps=STEPS)
    hook.remove()
    chain, errors = ChainHead(head, target), {}
    for step, normed_1PC in enumerate(chain.steps(batch, STEPS)):
        ours_PV, theirs_PV = chain.logits(normed_1PC[0, step:]), said[step][0, : LENGTH - 1 - step]
        errors[f"step {step}"] = (ours_PV - theirs_PV).abs().max().item()
    return errors


@torch.no_grad()
def first_steps(head: Mtp, target: Any, other: Any) -> dict[str, float]:
    """Largest difference of logits of the first step."""
    batch, chain = batch_of(target), ChainHead(head, target)
    states_1TC = LayerViews(target).final_norm(batch.final_BTC)  # type: ignore[misc]
    theirs_1PV = other(batch.tokens_BT, states_1TC)[0][0]
    ours_PV = chain.logits(next(chain.steps(batch, 1))[0])[: theirs_1PV.shape[1]]
    return {"first step": (ours_PV - theirs_1PV[0]).abs().max().item()}


@torch.no_grad()
def blocks(head: DSpark, target: Any, other: Any) -> dict[str, float]:
    """Largest differences of what the LM head reads, of logits and of confidence."""
    batch, anchors_1A = batch_of(target), torch.tensor([ANCHORS])
    tokens_1T = batch.tokens_BT
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
