"""`specdec doctor`: what this machine has, and what to do with it."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specdec import __version__
from specdec.cli.common import friendly_errors, starting
from specdec.cli.model_argument import takes_model
from specdec.disk_cache.folders import MEASUREMENTS, PACKED_WEIGHTS, PREFIXES, CacheFolder, cache_folder

CACHES = (MEASUREMENTS, PACKED_WEIGHTS, PREFIXES)
_EXACT = "exact"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "gguf", "torchao")


def register(app: typer.Typer) -> None:
    app.command()(doctor)


@friendly_errors
@takes_model
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Load this model, say whether and how it can be decoded by drafts, and measure threads and forwards.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    clear_cache: Annotated[
        bool,
        typer.Option(
            "--clear-cache", help="Remove measurements, packed weights and kept prefixes first; they are made again."
        ),
    ] = False,
) -> None:
    """Show versions, devices, threads, dtype advice, caches and the models found on this machine."""
    if clear_cache:
        for folder in CACHES:
            folder.clear()
    report = examine(model)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        Console(markup=False).print(_table(report))  # names and paths are no markup


def examine(model: str | None = None) -> dict[str, Any]:
    """The report of `specdec doctor`, ready for JSON; with a model, its threads and forwards are measured."""
    devices, measured = _devices(), {} if model is None else _measure(model)
    threads = _threads() | ({"best": measured["threads"]} if "threads" in measured else {})
    return {
        "specdec": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "devices": devices,
        "kernels": _kernels(),
        "cuda_graphs": _cuda_graphs(),
        "cuda_int4": _cuda_int4(),
        "threads": threads,
        "forward_ms": measured.get("forward_ms"),
        "verdict": measured.get("verdict"),
        "advice": _advice(devices, threads),
        "caches": [_described(folder) for folder in CACHES],
        "models": _demo_models() + _hub_models(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    with starting():
        import torch
        import transformers  # noqa: F401

    cpu = {"device": "cpu", "name": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    gpus = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "memory_mib": torch.cuda.get_device_properties(index).total_memory >> 20,
        }
        for index in range(torch.cuda.device_count())
    ]
    return [cpu, *gpus]


def _kernels() -> str:
    from specdec.kernels import describe

    return describe()


def _cuda_graphs() -> str:
    from specdec import cuda

    return cuda.describe()


def _cuda_int4() -> str:
    from specdec.kernels.model import device_int4

    return device_int4.describe()


def _threads() -> dict[str, int | None]:
    import torch

    return {
        "cores": os.cpu_count(),
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
    }


def _measure(source: str) -> dict[str, Any]:
    """The best number of threads; with the present one, what forwards cost: tokens -> milliseconds; what can be done
    with the model at all."""
    from specdec.control.costs import measure_forwards
    from specdec.kernels import calibrate_threads
    from specdec.models import load

    loaded = load(source, device="cpu").model
    verdict = _verdict(loaded)
    if not verdict["speculation"].startswith(_EXACT):
        return {"verdict": verdict}
    threads = calibrate_threads(loaded)
    return {
        "verdict": verdict,
        "threads": threads,
        "forward_ms": {width: round(1000 * seconds, 1) for width, seconds in measure_forwards(loaded).items()},
    }


def _verdict(model: Any) -> dict[str, str]:
    """Of a model as it was loaded, quantised by another library, too: its weights, whether it can be decoded by drafts,
    and what it would have on a GPU."""
    from specdec import cuda
    from specdec.errors import UnsupportedModelError
    from specdec.kernels.model import device_int4
    from specdec.tree_model.compatibility import check_model
    from specdec.tree_model.quantised import weights_of

    kinds = sorted(getattr(kind, "__name__", str(kind)) for kind in weights_of(model).kinds)
    try:
        check_model(model)
        speculation = _EXACT
    except UnsupportedModelError as error:
        speculation = f"refused: {error}"
    return {
        "weights": ", ".join(kinds) or str(model.dtype),
        "speculation": speculation,
        "gpu": cuda.describe(model),
        "gpu_int4": device_int4.describe(model),
    }


def _advice(devices: list[dict[str, Any]], threads: dict[str, int | None]) -> list[str]:
    if len(devices) > 1:
        return ["--dtype auto: the checkpoint's own dtype on the GPU, float32 on the CPU."]
    advice = ["--dtype auto is float32 here: on a CPU bfloat16 is slower once a few rows are verified together."]
    if "best" in threads:
        advice.append(f"--threads {threads['best']} was the fastest for this model just now.")
    elif threads["torch"] != 1:
        advice.append("--threads 1 can be faster for small models when other programs keep the cores busy.")
    return advice


def _described(folder: CacheFolder) -> dict[str, Any]:
    return {
        "name": folder.name,
        "path": str(folder.path),
        "num_files": len(folder.files()),
        "num_bytes": folder.num_bytes(),
    }


def _demo_models() -> list[dict[str, Any]]:
    home = cache_folder()
    configs = [*sorted(home.glob("*/config.json")), *sorted(home.glob("gguf/*/config.json"))]
    folders = [config.parent for config in configs]
    return [_found(path.name, path) for path in [*folders, *sorted(home.glob("*.gguf"))]]


def _hub_models() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        _found(repo.repo_id, repo.repo_path)
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def _found(name: str, path: Path) -> dict[str, Any]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return {"name": name, "path": str(path), "size_mib": sum(file.stat().st_size for file in files) >> 20}


def _table(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("specdec", report["specdec"])
    table.add_row("python", f"{report['python']} on {report['platform']}")
    for package, number in report["packages"].items():
        table.add_row(package, number or "not installed")
    for device in report["devices"]:
        memory = f", {device['memory_mib']} MiB" if "memory_mib" in device else ""
        table.add_row(device["device"], f"{device['name']}{memory}")
    table.add_row("kernels", report["kernels"])
    table.add_row("CUDA graphs", report["cuda_graphs"])
    table.add_row("int4 on a GPU", report["cuda_int4"])
    threads = report["threads"]
    table.add_row("threads", f"{threads['torch']} for torch ({threads['cores']} cores)")
    if (verdict := report["verdict"]) is not None:
        table.add_row("this model", f"weights: {verdict['weights']}; drafts: {verdict['speculation']}")
        table.add_row("on a GPU", f"{verdict['gpu']}; with int4: {verdict['gpu_int4']}")
    if report["forward_ms"]:
        costs = ", ".join(f"{width}: {ms:.1f}" for width, ms in report["forward_ms"].items())
        table.add_row("forward, ms", f"{costs} (by tokens verified at once)")
    for advice in report["advice"]:
        table.add_row("advice", advice)
    for cache in report["caches"]:
        size = f"{cache['num_files']} files, {cache['num_bytes'] / 1e6:.1f} MB"
        table.add_row("cache", f"{cache['name']} ({size}) {cache['path']}")
    for model in report["models"]:
        table.add_row("model", f"{model['name']} ({model['size_mib']} MiB) {model['path']}")
    if not report["models"]:
        table.add_row("model", "none found; `specdec pull demo` fetches one")
    return table
