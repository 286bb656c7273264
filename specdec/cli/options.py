"""Options that several commands have in common, beside those of every command in `common`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from specdec.cli.common import MODEL_PANEL
from specdec.cli.grafting import FieldOptions
from specdec.model_options import ModelOptions
from specdec.specs import AUTO, DRAFTERS, DRAFTERS_OF_AN_ENGINE, FOREIGN_MODEL

MODEL_OPTIONS: FieldOptions = {
    "dtype": typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16; auto: float32 on CPU, the checkpoint's own on GPU.",
        rich_help_panel=MODEL_PANEL,
    ),
    "device": typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MODEL_PANEL),
    "threads": typer.Option(
        "--threads", min=1, help="CPU threads for torch; torch's own choice if absent.", rich_help_panel=MODEL_PANEL
    ),
    "weights": typer.Option(
        "--weights",
        metavar="FORMAT",
        help="Of both models. float: as loaded, with faster kernels on a CPU. stock: with torch's own. int8, int4: "
        "weights of 8 or 4 bits on a CPU (int4: on a GPU too), which change the output. gguf: the blocks of a .gguf "
        "file, as they are.",
        rich_help_panel=MODEL_PANEL,
    ),
    "trust_remote_code": typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with the model.", rich_help_panel=MODEL_PANEL
    ),
}
LoadingOptions = Annotated[ModelOptions, MODEL_OPTIONS]
LOADING = ModelOptions()
"""The default values of `LoadingOptions`."""

MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)]


def _draft_option(tokenizers: str) -> Any:
    help_text = f"A smaller model that drafts for --model, of the same tokenizer{tokenizers}; or the folder of a head."
    return typer.Option("--draft", "-d", metavar="MODEL", help=help_text, rich_help_panel=MODEL_PANEL)


DraftOption = Annotated[str | None, _draft_option(f" unless the drafter is {FOREIGN_MODEL}")]
EngineDraftOption = Annotated[str | None, _draft_option("")]


def _drafter_option(names: Sequence[str]) -> Any:
    help_text = f"{', '.join(names)}; with parameters: prompt-lookup:num_tokens=8. Without it: {AUTO}."
    return typer.Option("--drafter", metavar="NAME", help=help_text)


DrafterOption = Annotated[str | None, _drafter_option(DRAFTERS)]
EngineDrafterOption = Annotated[str | None, _drafter_option(DRAFTERS_OF_AN_ENGINE)]
PrefixCacheOption = Annotated[
    float | None,
    typer.Option(
        "--prefix-cache",
        metavar="GB",
        min=0.001,
        help="Keep the keys and values of what is read in the user's cache, at most so many GB: of a text that begins "
        "like an earlier one, only the rest is read, also after a restart.",
        show_default=False,
    ),
]


def prefix_bytes(prefix_cache_gb: float | None) -> int | None:
    """Of `PrefixCacheOption`."""
    return None if prefix_cache_gb is None else int(prefix_cache_gb * 1e9)


StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="Stop after this text; may be given several times.")
]
_SAMPLING = "Sampling"
_SAMPLE = typer.Option(
    "--sample", help="Sample; the default is greedy decoding.", show_default=False, rich_help_panel=_SAMPLING
)
_TEMPERATURE = typer.Option(
    "--temperature", "-t", help="With --sample; the model's own value if absent.", rich_help_panel=_SAMPLING
)
SampleOption = Annotated[bool, _SAMPLE]
TemperatureOption = Annotated[float | None, _TEMPERATURE]
VerifyOption = Annotated[
    Literal["topdown", "traversal"],
    typer.Option(
        "--verify",
        metavar="NAME",
        help="With --sample: topdown or traversal, how a drawn tree is verified; both are exact.",
        rich_help_panel=_SAMPLING,
    ),
]

ExactOption = Annotated[
    Literal["bits"] | None,
    typer.Option(
        "--exact",
        metavar="bits",
        help="Forwards of one shape: the output is the same bits whoever drafts, at some cost.",
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


SAMPLING_OPTIONS: FieldOptions = {
    "sample": _SAMPLE,
    "temperature": _TEMPERATURE,
    "top_p": typer.Option("--top-p", help="With --sample; the model's own value if absent.", rich_help_panel=_SAMPLING),
    "top_k": typer.Option("--top-k", help="With --sample; the model's own value if absent.", rich_help_panel=_SAMPLING),
    "seed": typer.Option(
        "--seed", min=0, help="With --sample: the same seed gives the same text.", rich_help_panel=_SAMPLING
    ),
}
SamplingOptions = Annotated[Sampling, SAMPLING_OPTIONS]
GREEDY = Sampling()
"""The default values of `SamplingOptions`."""
