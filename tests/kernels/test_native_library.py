"""How the native library is found, built and trusted, and what it does when memory runs out.

Most tests build with a compiler of their own: a script that copies what the real one has built once.
"""

import ctypes
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from specdec import kernels
from specdec.errors import UnsupportedOptionError
from specdec.kernels import native
from specdec.kernels.model import quantized_linear
from specdec.kernels.model.quantized_linear import Int8Linear
from specdec.kernels.native import build, compiling, structs
from specdec.kernels.trees import token_source, verification
from specdec.testing import tiny_model
from trees import Draft, TokenTree, TreeBatch

needs_native = pytest.mark.skipif(native.library() is None, reason=native.describe())

FOREIGN = next((Path(torch.__file__).parent / "lib").glob("libshm.*"))
"""A library of somebody else."""


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The library of this machine, as a file."""
    if native.library() is None:
        pytest.skip(native.describe())
    return build.load(lambda file: _copy(file, tmp_path_factory.mktemp("real") / "real.so"))


def _copy(file: Path, target: Path) -> Path:
    target.write_bytes(file.read_bytes())
    return target


class Machine:
    """A cache and a PATH of a test's own."""

    def __init__(self, home: Path) -> None:
        self.programs, self.home, self.log = home / "bin", home / "cache", home / "log"
        self.programs.mkdir()
        self.home.mkdir(mode=0o700)

    @property
    def cache(self) -> Path:
        return self.home / "specdec" / "kernels"

    def install(self, name: str, built: Path | None) -> None:
        """A compiler that gives out a file, or fails."""
        give = "echo it is broken >&2; exit 1" if built is None else f'/bin/cp "{built}" "$2"'
        script = self.programs / name
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {name} 1.0 && exit\n'
            f'case "$*" in *-shared*) echo {name} >> "{self.log}";; *) exit 0;; esac  # one source was compiled\n'
            f'while [ "$1" != -o ]; do shift; done\n{give}\n'
        )
        script.chmod(0o755)

    def runs(self) -> list[str]:
        """The compilers that have built, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def kept(self) -> list[Path]:
        return sorted(self.cache.glob("*"))


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(machine.programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.home))
    return machine


def load() -> ctypes.CDLL:
    return build.load(native.open_library)


# ---- building and keeping ----


def test_a_machine_that_can_have_the_kernels_has_them():
    """Sources that did not compile once made every test of the kernels skip itself, and the run green."""
    if (
        not sys.platform.startswith("linux")
        or platform.machine() != "x86_64"
        or not any(map(shutil.which, build.COMPILERS))
    ):
        pytest.skip("needs Linux on x86-64 with a C compiler")
    assert native.library() is not None, native.describe()


def test_it_is_built_once_and_kept_for_its_user_alone(machine, real):
    machine.install("cc", real)
    load()
    (kept,) = machine.kept()
    assert stat.S_IMODE(machine.cache.stat().st_mode) == 0o700
    assert not kept.stat().st_mode & 0o022
    load()
    assert machine.runs() == ["cc"]


@pytest.mark.parametrize("is_current", [True, False])
def test_the_library_of_an_installed_package_needs_no_compiler(machine, real, tmp_path, monkeypatch, is_current):
    sources = tmp_path / "installed"
    shutil.copytree(
        compiling.SOURCES, sources, ignore=lambda folder, names: [n for n in names if n[-2:] not in (".c", ".h")]
    )
    for module in (build, compiling):
        monkeypatch.setattr(module, "SOURCES", sources)
    _copy(real, sources / compiling.packaged_name())
    if is_current:
        load()
        assert not machine.cache.exists()
    else:
        (sources / "native.c").write_text("/* edited */")
        with pytest.raises(OSError, match="no C compiler found"):
            load()


@pytest.mark.parametrize("built", ["fails", "gives junk"])
def test_the_next_compiler_is_tried(machine, real, tmp_path, built):
    junk = tmp_path / "junk"
    junk.write_text("no library")
    machine.install("cc", None if built == "fails" else junk)
    machine.install("gcc", real)
    load()
    assert machine.runs() == ["cc", "gcc"]
    load()
    assert machine.runs() == ["cc", "gcc"], "what gcc has built is found before cc is tried again"


def test_every_compiler_that_fails_is_named(machine):
    machine.install("cc", None)
    machine.install("clang", None)
    with pytest.raises(OSError, match=r"bin/cc failed: it is broken; .*bin/clang failed: it is broken"):
        load()


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "disguised"])
def test_a_damaged_file_is_built_again(machine, real, damage):
    """A truncated file once meant torch's kernels for ever, and a library of somebody else an AttributeError."""
    machine.install("cc", real)
    load()
    (kept,) = machine.kept()
    content = {"truncated": real.read_bytes()[:5000], "empty": b""}.get(damage, FOREIGN.read_bytes())
    kept.unlink()
    kept.write_bytes(content)
    if damage == "disguised":  # its name says what it holds
        kept.rename(machine.cache / f"{kept.stem[:-16]}{build.digest(content)}.so")
    load()
    assert machine.runs() == ["cc", "cc"]
    assert kept.read_bytes() == real.read_bytes()


@needs_native
def test_a_library_without_our_functions_is_refused():
    with pytest.raises(OSError, match="is not specdec's library: it has no specdec_select"):
        native.open_library(FOREIGN)


@pytest.mark.parametrize("place", ["home", "folder"])
def test_a_cache_that_others_can_write_is_neither_read_nor_written(machine, real, caplog, place):
    machine.install("cc", real)
    load()
    folder = {"home": machine.home, "folder": machine.cache}[place]
    folder.chmod(0o777)
    (before,) = machine.kept()
    before.unlink()  # in place, it would change under this process, which has loaded it
    before.write_bytes(b"planted")
    load()
    load()
    assert machine.runs() == ["cc"] * 3, "for each process its own"
    assert machine.kept() == [before]
    assert before.read_bytes() == b"planted"
    assert f"others can write {folder}" in caplog.text
    assert "cannot be kept" in caplog.text


def test_a_file_that_others_can_write_is_built_again(machine, real):
    machine.install("cc", real)
    load()
    (kept,) = machine.kept()
    kept.chmod(0o666)
    load()
    assert machine.runs() == ["cc", "cc"]
    assert not kept.stat().st_mode & 0o022


def test_a_link_is_not_followed(machine, real, tmp_path):
    machine.install("cc", real)
    load()
    (kept,) = machine.kept()
    kept.replace(tmp_path / "elsewhere.so")
    kept.symlink_to(tmp_path / "elsewhere.so")
    load()
    assert machine.runs() == ["cc", "cc"]
    assert not kept.is_symlink()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_loaded(machine, real, monkeypatch, caplog, what):
    machine.install("cc", real)
    load()
    (kept,) = machine.kept()
    if os.geteuid() == 0:  # root's own files are trusted by everybody, so it takes another user's
        os.chown(kept if what == "file" else machine.cache, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65533)
    load()
    assert machine.runs() == ["cc", "cc"]
    if what == "folder":
        assert "belongs to user" in caplog.text


def test_an_unwritable_cache_is_no_obstacle(machine, real, caplog):
    machine.install("cc", real)
    (machine.home / "specdec").write_text("a file where the folder should be")
    load()
    assert "cannot be kept, so every process builds its own" in caplog.text


def test_a_user_without_a_home_has_the_kernels_too(machine, real, monkeypatch):
    def no_home(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    machine.install("cc", real)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(no_home))
    load()


def test_the_temporary_folder_does_not_stay(machine, real, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    machine.install("cc", real)
    machine.home.chmod(0o777)
    dll = load()
    assert list(temporary.iterdir()) == []
    assert dll.specdec_packed_bytes(64, 64, 8) == 64 * 64, "what is loaded stays"


def test_several_at_once_are_safe(machine, real):
    machine.install("cc", real)
    failed = []

    def work():
        try:
            load()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [file.read_bytes() for file in machine.kept()] == [real.read_bytes()]


# ---- layout ----


REORDERED = tuple(structs.Matrix._fields_[i] for i in (0, 1, 2, 4, 3, 5))  # k before n: the same size
LONGER = (*structs.Matrix._fields_, ("padding", ctypes.c_int64))


@pytest.mark.parametrize(
    ("fields", "named"), [(REORDERED, r"Matrix\.k, Matrix\.n"), (LONGER, r"Matrix, Matrix\.padding")]
)
def test_structures_that_differ_are_refused(real, monkeypatch, fields, named):
    """One field moved in one of the two languages would write where nobody expects it."""
    altered = type("Matrix", (ctypes.Structure,), {"_fields_": fields})
    others = [structure for structure in native.STRUCTURES if structure is not structs.Matrix]
    monkeypatch.setattr(native, "STRUCTURES", (altered, *others))
    with pytest.raises(OSError, match=f"disagree about the layout of {named}$"):
        native.open_library(real)


@needs_native
def test_every_structure_is_compared():
    ours = {kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)}
    assert ours == set(native.STRUCTURES)


# ---- what is said ----


@pytest.fixture
def unloaded():
    """As in a fresh process."""
    forget = native.library, native._announced, native._load, quantized_linear.check_product
    for function in forget:
        function.cache_clear()
    yield
    for function in forget:
        function.cache_clear()


def test_a_missing_compiler_is_said_once(machine, unloaded, caplog):
    caplog.set_level(logging.INFO, "specdec")
    assert "no C compiler found" in native.describe()
    assert caplog.records == [], "whoever asks is told, nobody else"
    for _ in range(2):
        kernels.prepare(tiny_model("llama"))
    (record,) = (record for record in caplog.records if record.levelno > logging.INFO)
    assert (record.levelno, record.name) == (logging.WARNING, "specdec")
    assert all(part in record.getMessage() for part in ("rounds are slower", "no C compiler found", "apt-get install"))


def test_another_processor_is_said_once(unloaded, monkeypatch, caplog):
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    kernels.prepare(tiny_model("llama"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "64-bit ARM on Linux and macOS, this is riscv64 on Linux" in caplog.text


@needs_native
def test_building_is_said(machine, real, caplog):
    caplog.set_level(logging.INFO, "specdec")
    machine.install("cc", real)
    load()
    load()
    begins, ends = caplog.records
    assert begins.levelno == ends.levelno == logging.INFO
    assert "building the native kernels" in begins.getMessage()
    assert ends.seconds > 0


def test_importing_builds_and_says_nothing(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = "import specdec.kernels"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "", [])
    assert "kernels" not in run.stderr


def test_int8_without_any_product_is_refused(unloaded, monkeypatch):
    """torch may have the operator and no code behind it: a RuntimeError of its own was all that was said."""

    def missing(*_: object) -> None:
        raise RuntimeError("linear_prepack: not implemented for this packed parameter type\nmore")

    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(quantized_linear, "_torch_pack", missing)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedOptionError, match="weights='int8' has no product on this machine: leave it out"):
        kernels.prepare(model, "int8")
    assert not any(isinstance(module, Int8Linear) for module in model.modules()), "nothing was changed"


# ---- memory ----


def _linear(library):
    product, x_MK = Int8Linear(nn.Linear(96, 130)), torch.ones(3, 96)
    return lambda: product(x_MK).tolist()


def _attend(library):
    query_BTHD, states_BKSD = torch.ones(1, 2, 2, 32), torch.ones(1, 2, 5, 32)
    attention = native.attention(query_BTHD, states_BKSD, states_BKSD, None, 0.2)
    return lambda: library.attend(query_BTHD, attention).tolist()


def _forward(library):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = kernels.prepare(tiny_model("llama", **sizes).requires_grad_(False), "int8")
    assert kernels.prepared(model).num_fused_layers == 2
    ids = torch.arange(1, 6)[None]
    return lambda: model(ids).logits.tolist()


def _take(library):
    scores_MV = torch.linspace(0, 1, 500).expand(2, -1).contiguous()
    return lambda: token_source.NativeTokenSource(scores_MV, sample=False, generator=None).take([0, 1], 3)


def _verify(library):
    tree = TokenTree(tokens=[2, 4, 3], parents=[-1, 0, -1], probs=None)
    draft = Draft(trees=TreeBatch.stack([tree]))
    scores_BTV = torch.linspace(0, 1, 500).expand(1, 4, -1).contiguous()
    return lambda: verification.verify(draft, scores_BTV, "walk")


CALLS = [_linear, _attend, _forward, _take, _verify]


@needs_native
@pytest.mark.parametrize("prepared_call", CALLS)
def test_whatever_allocation_fails_raises_and_the_next_call_works(prepared_call):
    """The n-th request for memory fails, for every n: abort() would have ended this process, and a server."""
    library = native.library()
    call = prepared_call(library)
    expected = call()
    try:
        for nth in range(500):
            library.fail_allocation_after(nth)
            refusal, actual = _outcome(call)
            if refusal is None:
                break
            assert "no memory left for specdec_" in refusal
            assert call() == expected
    finally:
        library.fail_allocation_after(-1)
    assert nth > 0
    assert actual == expected, "the first call that had no n-th request"


def _outcome(call):
    try:
        return None, call()
    except MemoryError as error:
        return str(error), None


@needs_native
def test_real_shortage_raises_and_the_process_lives():
    """Scores of 4 GB are asked for where 1 GB is left; then a call of the usual size is made."""
    code = (
        "import resource, torch\n"
        "from specdec.kernels import native\n"
        "torch.set_num_threads(1)\n"
        "library = native.library()\n"
        "def attend(num_queries, num_keys):\n"
        "    query_BTHD, state = torch.ones(1, num_queries, 1, 32), torch.ones(1, 1, 1, 32)\n"
        "    states_BKSD = state.expand(1, 1, num_keys, 32)\n"
        "    return library.attend(query_BTHD, native.attention(query_BTHD, states_BKSD, states_BKSD, None, 0.2))\n"
        "expected = attend(4, 9)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "try:\n"
        "    attend(4, 1 << 28)\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
        "print(torch.equal(attend(4, 9), expected))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first.startswith("no memory left for specdec_attend")
    assert second == "True"
