"""Options that generate, chat and bench have in common, beside those of every command in `common`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from specdec.cli.common import MODEL_PANEL

MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        "-d",
        help="A smaller model with the same tokenizer that drafts for --model.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="auto, plain, prompt-lookup, small-model, quantized-self or early-exit; with parameters: "
        "prompt-lookup:num_tokens=8. Without it: small-model if there is a --draft, otherwise auto.",
    ),
]
WeightsOption = Annotated[
    Literal["stock", "float", "int8"],
    typer.Option(
        "--weights",
        help="Of --model and --draft alike. stock: as loaded; float: the same weights in products that are quick for "
        "a few tokens on a CPU; int8: 8-bit weights on a CPU, another model than the float one.",
        rich_help_panel=MODEL_PANEL,
    ),
]
_SAMPLING = "Sampling"
SampleOption = Annotated[
    bool,
    typer.Option(
        "--sample", help="Sample; the default is greedy decoding.", show_default=False, rich_help_panel=_SAMPLING
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="With --sample; the model's own value if absent.",
        rich_help_panel=_SAMPLING,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="With --sample; the model's own value if absent.", rich_help_panel=_SAMPLING),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", help="With --sample; the model's own value if absent.", rich_help_panel=_SAMPLING),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="With --sample: the same seed gives the same text.", rich_help_panel=_SAMPLING),
]
VerifyOption = Annotated[
    Literal["topdown", "traversal"],
    typer.Option(
        "--verify", help="With --sample: how a drawn tree is verified; both are exact.", rich_help_panel=_SAMPLING
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling options of a command. Raises `ValueError` for one that has no effect without --sample."""

    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "seed"):
            if getattr(self, name) is not None and not self.sample:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} needs --sample: without it, decoding is greedy")

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """What `generate()` takes; what was not given is left to the model's own generation config."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": self.sample} | {name: value for name, value in given.items() if value is not None}

    def seed_torch(self) -> None:
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
