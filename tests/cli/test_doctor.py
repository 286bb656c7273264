"""`specdec doctor`, `specdec pull` and the frame around every command. No network."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn
from typer.testing import CliRunner, Result

import specdec
from specdec import models
from specdec.cli.app import app
from specdec.cli.common import USER_ERROR, friendly_errors
from specdec.cli.doctor import _verdict
from specdec.errors import ModelError
from specdec.kernels import native
from specdec.testing import tiny_model
from tests.support.tiny_models import save_tiny_model
from tests.support.wrapped import bare, quantised_dynamically

COMMANDS = ("pull", "generate", "chat", "bench", "doctor")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, for specdec's models and for the hub's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "specdec"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def write_demo_model(home: Path) -> None:
    folder = home / models.DEMO_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    (home / f"{models.DEMO_NAME}.gguf").write_bytes(bytes(1 << 20))


def test_doctor_prints_one_json_document(cache: Path) -> None:
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["python"] == platform.python_version()
    assert report["packages"]["torch"].startswith("2.")
    assert report["devices"][0]["device"] == "cpu"
    assert "kernels" in report["kernels"]
    assert report["threads"]["torch"] >= 1
    assert "--dtype" in report["advice"][0]
    assert report["models"] == []


def test_doctor_lists_and_clears_caches(cache: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    answered = run("generate", "hello", "--raw", "-n", "4", "--model", folder, "--weights", "int8", "--device", "cpu")
    assert answered.exit_code == 0
    listed = {kept["name"]: kept for kept in json.loads(run("doctor", "--json").stdout)["caches"]}
    assert set(listed) == {"measurements", "packed-weights", "prefixes"}
    assert listed["packed-weights"]["num_bytes"] > 0 or native.library() is None
    assert listed["measurements"]["num_files"] > 0
    assert "packed-weights (0 files, 0.0 MB)" in run("doctor", "--clear-cache").stdout
    assert all(kept["num_files"] == 0 for kept in json.loads(run("doctor", "--json").stdout)["caches"])


def test_doctor_measures_threads_for_a_model(cache: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    report = json.loads(run("doctor", "--json", "--model", folder).stdout)
    assert 1 <= report["threads"]["best"] <= report["threads"]["cores"]
    assert report["forward_ms"]["1"] > 0
    assert f"--threads {report['threads']['best']}" in report["advice"][1]


def test_doctor_says_what_can_be_done_with_a_model(cache: Path, tmp_path: Path) -> None:
    verdict = json.loads(run("doctor", "--json", "--model", save_tiny_model(tmp_path / "tiny")).stdout)["verdict"]
    assert verdict["speculation"] == "exact"
    assert verdict["weights"] == "torch.float32"
    assert verdict["gpu"].startswith("CUDA graphs")


class PackedLinear(nn.Module):
    """As a library packs weights: codes and a scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.float() * self.scale)


def test_doctor_knows_weights_of_other_libraries() -> None:
    model = bare()
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    verdict = _verdict(model)
    assert verdict == {
        "weights": "torch.int8",
        "speculation": "exact",
        "gpu": "CUDA graphs, tried before they are used",
        "gpu_int4": "12 linears of 4 bits",
    }


def test_doctor_names_what_would_not_be_quantised_on_a_gpu() -> None:
    words = _verdict(tiny_model("llama", intermediate_size=72))["gpu_int4"]
    assert words == "12 linears of 4 bits; stay as they are: model.layers.*.mlp.down_proj"


def test_doctor_refuses_activations_that_are_rounded() -> None:
    assert _verdict(quantised_dynamically())["speculation"].startswith("refused: products of LlamaForCausalLM round")


def test_doctor_names_what_keeps_a_model_from_graphs() -> None:
    model = bare()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in _verdict(model)["gpu"]


def test_doctor_finds_the_models_of_the_cache(cache: Path) -> None:
    write_demo_model(cache)
    found = {
        model["path"]: (model["name"], model["size_mib"])
        for model in json.loads(run("doctor", "--json").stdout)["models"]
    }
    assert found == {
        str(cache / models.DEMO_NAME): (models.DEMO_NAME, 3),
        str(cache / f"{models.DEMO_NAME}.gguf"): (f"{models.DEMO_NAME}.gguf", 1),
    }


def test_doctor_reads_well_without_models(cache: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "specdec pull demo" in result.stdout


def test_pull_prints_the_folder(cache: Path) -> None:
    write_demo_model(cache)
    assert run("pull", "demo").stdout == f"{cache / models.DEMO_NAME}\n"


def test_pull_installs_where_it_is_told(cache: Path, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "elsewhere")
    result = run("pull", "demo", "--to", str(tmp_path / "elsewhere"))
    assert result.stdout == f"{tmp_path / 'elsewhere' / models.DEMO_NAME}\n"


def test_pull_of_anything_else_is_one_clear_line() -> None:
    result = run("pull", "gpt2")
    assert result.exit_code == USER_ERROR
    assert result.stdout == ""
    assert result.stderr.startswith("error: cannot pull 'gpt2'; only 'demo' is pulled")
    assert result.stderr.count("\n") == 1


def test_errors_of_several_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    @friendly_errors
    def command() -> None:
        raise ModelError("no [such]\n  model")

    with pytest.raises(typer.Exit) as raised:
        command()
    assert raised.value.exit_code == USER_ERROR
    assert capsys.readouterr().err == "error: no [such] model\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    @friendly_errors
    def command() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        command()


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_the_command_line_starts_without_the_heavy_imports() -> None:
    program = "import sys, specdec.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_version_is_the_package_version() -> None:
    assert run("--version").stdout == f"{specdec.__version__}\n"
