"""How much a copy of fewer bits could gain at most, when it drafts for its own float model.

    python -m bench.copy_bits MODEL [--bits 4,3] [--text 1024] [--verify 1.1] [--step 0.2] [--threads 1]

The weights of all linears but the LM head, which a copy has in 8 bits, are rounded in groups of 32 with an offset, as
those of an int4 copy are (the best of a few starts, fitted twice), and the text, Python source, is read by both. `same`
is the share of places where the copy's likeliest token is the model's (greedy drafts), `overlap` the mean of
sum(min(p, q)) (sampled ones). A step of a draft takes no less than reading its weights: `step` says what one of 4 bits
takes, in forwards of the model, and others are taken to be quicker or slower as their bytes are, as if to unpack them
were free. Gains are the tokens in a forward's time of the best chain, where verifying takes `verify`; `enough` is the
agreement with which a copy would gain as much as that of 4 bits. A checkpoint whose weights have been rounded to 4 bits
before flatters 4 bits. The last line of stdout is JSON.
"""

import argparse
import inspect
import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench._script import parser_of
from specdec import models

GROUP = 32
_STARTS = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.87, 0.87))
"""Parts of the lowest and of the highest weight of a group that a search begins with."""
_LONGEST = 16


def rounded(weight_NK: Tensor, bits: int) -> Tensor:
    """The nearest weights, float32 [N, K], of which groups of 32 inputs have a scale and an offset."""
    padding = -weight_NK.shape[1] % GROUP
    groups_GK = nn.functional.pad(weight_NK, (0, padding)).reshape(-1, GROUP)
    lowest, highest = groups_GK.amin(1, keepdim=True), groups_GK.amax(1, keepdim=True)
    best, least = groups_GK, torch.full_like(lowest, float("inf"))
    for low, high in _STARTS:
        scale, offset = (high * highest - low * lowest) / (2**bits - 1), low * lowest
        for _ in range(3):
            codes = ((groups_GK - offset) / scale.clamp_min(1e-12)).round_().clamp_(0, 2**bits - 1)
            found = torch.addcmul(offset, codes, scale)
            error = (found - groups_GK).square_().sum(1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
            centred = codes - codes.mean(1, keepdim=True)
            scale = (centred * groups_GK).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-12)
            offset = groups_GK.mean(1, keepdim=True) - scale * codes.mean(1, keepdim=True)
    return best.reshape(len(weight_NK), -1)[:, : weight_NK.shape[1]]


def step_bytes(model: PreTrainedModel, bits: int) -> float:
    """That a step of a copy reads: codes, a 16-bit scale and offset for each group, and the LM head in 8 bits."""
    head = model.get_output_embeddings()
    inner = sum(
        linear.weight.numel() for linear in model.modules() if isinstance(linear, nn.Linear) and linear is not head
    )
    return inner * (bits / 8 + 4 / GROUP) + head.weight.numel()


def gain(acceptance: float, step: float, verify: float) -> float:
    """Tokens in the time of one forward, of the best length of a chain."""
    return max(
        sum(acceptance**depth for depth in range(length + 1)) / (length * step + (verify if length else 1))
        for length in range(_LONGEST + 1)
    )


def enough(gained: float, step: float, verify: float) -> float:
    """The least agreement that gains so much, to three digits."""
    return next((each / 1000 for each in range(1001) if gain(each / 1000, step, verify) >= gained), float("nan"))


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", default="4,3", help="of weights, joined by commas")
    parser.add_argument("--text", type=int, default=1024, help="tokens that are read")
    parser.add_argument("--verify", type=float, default=1.1, help="what verifying takes, in forwards of one token")
    parser.add_argument("--step", type=float, default=0.2, help="what a step of 4 bits takes, in the same")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    model, tokenizer, name = models.load(arguments.model, dtype="float32", device="cpu", threads=arguments.threads)
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, : arguments.text]
    p_TV = model(ids).logits[0].softmax(-1)
    head = model.get_output_embeddings()
    linears = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    originals = [linear.weight.data for linear in linears]
    report: dict[int, dict[str, float]] = {}
    print(f"{name}, {ids.shape[1]} tokens")
    print(f"{'bits':>4}{'same':>8}{'overlap':>9}{'step':>7}{'greedy':>8}{'sampled':>9}{'enough':>8}")
    for bits in sorted(map(int, arguments.bits.split(",")), key=lambda bits: bits != 4):
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.data = rounded(original, bits)
        q_TV = model(ids).logits[0].softmax(-1)
        same = (p_TV.argmax(-1) == q_TV.argmax(-1)).float().mean().item()
        overlap = torch.minimum(p_TV, q_TV).sum(-1).mean().item()
        step = arguments.step * step_bytes(model, bits) / step_bytes(model, 4)
        greedy, sampled = (gain(acceptance, step, arguments.verify) for acceptance in (same, overlap))
        of_four = report[4]["greedy"] if 4 in report else greedy
        needed = enough(of_four, step, arguments.verify)
        report[bits] = {"same": same, "overlap": overlap, "step": step}
        report[bits] |= {"greedy": greedy, "sampled": sampled, "enough": needed}
        print(f"{bits:4}{same:8.3f}{overlap:9.3f}{step:7.3f}{greedy:7.2f}x{sampled:8.2f}x{needed:8.3f}", flush=True)
    print(json.dumps({"model": name, "tokens": ids.shape[1], "bits": report}))


if __name__ == "__main__":
    main()
