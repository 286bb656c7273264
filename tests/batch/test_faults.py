"""`specdec batch` where disks are full, outputs no files and inputs odd: told in a line, and nothing is lost."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.batch import Settings, Worker, run_batch
from specdec.batch import lines as batch_lines
from specdec.batch.lines import read_lines
from specdec.cli import common
from specdec.cli.app import app
from specdec.errors import BatchError, ModelError
from specdec.models import load
from specdec.testing import ByteTokenizer, tiny_model
from tests.support.batch_process import SETTINGS, make_worker
from tests.support.batches import Echo, read, write_prompts
from tests.support.tiny_models import save_tiny_model

COMMAND = """
from specdec.cli.common import err_console, friendly_errors
@friendly_errors
def command():
    err_console.print('working')
    print('done')
"""


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes: the last write before the limit is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "in.jsonl", [f"prompt {number}" if number % 4 else 7 for number in range(1, 30)])


def both(output: Path) -> tuple[bytes, bytes]:
    return output.read_bytes(), output.with_name(f"{output.stem}.errors.jsonl").read_bytes()


def no_pool() -> Echo:
    raise AssertionError("a model was loaded")


# full disks


def test_a_disk_that_fills_at_any_byte(source: Path, tmp_path: Path) -> None:
    """Between lines or inside one: what is there is a beginning of the whole, and the next run completes it."""
    run_batch(source, tmp_path / "whole.jsonl", Echo, Settings())
    whole = both(tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    for room in range(1, len(whole[0]), 97):
        output.unlink(missing_ok=True)
        output.with_name("out.errors.jsonl").unlink(missing_ok=True)
        with (
            disk_of(room),
            pytest.raises(BatchError, match=r"jsonl cannot be written: File too large\. .* is kept"),
        ):
            run_batch(source, output, Echo, Settings())
        assert output.read_bytes() == whole[0][:room] or len(output.read_bytes()) < room
        assert whole[0].startswith(output.read_bytes())
        run_batch(source, output, Echo, Settings())
        assert both(output) == whole


def test_a_disk_that_is_full_again_and_again(source: Path, tmp_path: Path) -> None:
    run_batch(source, tmp_path / "whole.jsonl", Echo, Settings())
    whole, output = both(tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    for room in range(200, len(whole[0]), 400):
        with disk_of(room), pytest.raises(BatchError, match="File too large"):
            run_batch(source, output, Echo, Settings())
    run_batch(source, output, Echo, Settings())
    assert both(output) == whole


def test_the_command_on_a_full_disk(tiny: str, tmp_path: Path) -> None:
    """One line on stderr and no traceback; the resumed job is that of a run which nothing disturbed."""
    source = write_prompts(tmp_path / "in.jsonl", [f"prompt {number}" for number in range(8)])
    command = ["batch", str(source), "OUT", "-m", tiny, "-n", "6", "--max-rows", "2", "--drafter", "prompt-lookup"]

    def run(output: str) -> Any:
        return CliRunner().invoke(app, [str(tmp_path / output) if word == "OUT" else word for word in command])

    assert run("whole.jsonl").exit_code == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    with disk_of(len(whole) // 2):
        result = run("out.jsonl")
    assert result.exit_code == 2
    *progress, told = result.stderr.splitlines()  # lines of progress where it takes longer than two seconds
    assert all(line.startswith("answering") for line in progress)
    assert told.startswith(f"error: {tmp_path / 'out.jsonl'} cannot be written: File too large.")
    assert len((tmp_path / "out.jsonl").read_bytes()) == len(whole) // 2
    assert run("out.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_flush_that_fails(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Some disks say only then that they are full. The lock is let go and the files are closed nevertheless."""
    output, flush = tmp_path / "out.jsonl", os.fsync

    def fail(file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BatchError, match=os.strerror(number)):
        run_batch(source, output, Echo, Settings())
    monkeypatch.setattr(os, "fsync", flush)
    assert run_batch(source, output, Echo, Settings()).num_skipped > 0
    assert len(read(output)) == 22


def test_an_input_that_cannot_be_read_to_its_end(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 300:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readline(size)

    def broken(file: Any) -> Any:
        return read_lines(Failing(file.raw))

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("specdec.batch.run.read_lines", broken)
        with pytest.raises(BatchError, match="cannot be read: Input/output error"):
            run_batch(source, output, Echo, Settings())
    run_batch(source, output, Echo, Settings())
    assert [result["line"] for result in read(output)] == [number for number in range(1, 30) if number % 4]


# outputs and inputs that are no files


def test_outputs_that_are_no_files(source: Path, tmp_path: Path) -> None:
    """Read as a journal, /dev/full never ended. All are refused before a model is loaded."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for output in (Path("/dev/full"), Path("/dev/null"), *(tmp_path / name for name in ("fifo", "folder", "link"))):
        with pytest.raises(BatchError, match=f"{output} is no file"):
            run_batch(source, output, no_pool, Settings())
    assert not Path("/dev/.full.lock").exists()


def test_errors_that_have_no_file_to_go_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.errors.jsonl").mkdir()
    with pytest.raises(BatchError, match=r"out\.errors\.jsonl is no file"):
        run_batch(source, tmp_path / "out.jsonl", no_pool, Settings())


def test_an_input_that_errors_would_be_written_to(source: Path, tmp_path: Path) -> None:
    """The errors of a job given as the input of the same job would grow while they are read."""
    source.rename(tmp_path / "out.errors.jsonl")
    with pytest.raises(ValueError, match="is the input, and cannot be written to"):
        run_batch(tmp_path / "out.errors.jsonl", tmp_path / "out.jsonl", no_pool, Settings())


def test_an_input_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no file, so that a job could not read it again"):
            run_batch(source, tmp_path / "out.jsonl", no_pool, Settings())


# odd inputs


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.jsonl", ["a", "b"])
    source.write_bytes(codecs.BOM_UTF8 + source.read_bytes())
    done = run_batch(source, tmp_path / "out.jsonl", Echo, Settings())
    assert (done.num_lines, done.num_errors, done.end) == (2, 0, source.stat().st_size)
    assert run_batch(source, tmp_path / "out.jsonl", no_pool, Settings()).num_skipped == 2


def test_a_line_that_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 1 << 20)
    source, long = tmp_path / "in.jsonl", json.dumps({"prompt": "x" * (5 << 20)}).encode()
    source.write_bytes(b"\n".join([b'{"prompt": "a"}', long, b'{"prompt": "b"}', long]))
    done = run_batch(source, tmp_path / "out.jsonl", Echo, Settings())
    errors = read(tmp_path / "out.errors.jsonl")
    assert [result["line"] for result in read(tmp_path / "out.jsonl")] == [1, 3]
    assert [error["line"] for error in errors] == [2, 4]
    assert all(error["error"].startswith("the line is longer than 1 MiB") for error in errors)
    assert done.end == source.stat().st_size
    assert run_batch(source, tmp_path / "out.jsonl", no_pool, Settings()).num_skipped == 4
    source.write_bytes(source.read_bytes()[:-3] + b'y"}')
    with pytest.raises(BatchError, match="line 4 of the input has changed"):
        run_batch(source, tmp_path / "out.jsonl", no_pool, Settings())


@pytest.mark.parametrize("extra", [0, 1])
def test_the_longest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 20)
    for end in (b"", b"\n", b"\nnext"):
        file = io.BufferedReader(io.BytesIO(b"a" * (20 + extra) + end))  # type: ignore[arg-type]
        texts = [line.text for line in read_lines(file)]
        assert texts == [None if extra else b"a" * 20] + [b"next"] * end.endswith(b"next")


def test_long_lines_take_little_memory(tmp_path: Path) -> None:
    """Read in pieces, a line of 160 MiB is never in memory as a whole."""
    source = tmp_path / "in.jsonl"
    with source.open("wb") as file:
        file.seek(160 << 20)  # a hole, which takes no disk
        file.write(b"x\n")
    tracemalloc.start()
    try:
        with source.open("rb") as file:
            assert len(list(read_lines(file))) == 1
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "document",
    [
        {"prompt": "a" * 10_000_000},
        {"prompt": "to be or not to be " * 500_000},
        {"messages": [{"role": "user", "content": "x " * 5_000_000}]},
        {"prompt": "a", "stop": "b" * 10_000_000},
        {"prompt": "a", "max_new_tokens": "9" * 10_000_000},
        {"prompt": "a", "x" * 10_000_000: 1},
    ],
    ids=["word", "words", "messages", "stop", "setting", "field"],
)
def test_ten_megabytes_are_refused_quickly(tmp_path: Path, document: dict[str, Any]) -> None:
    """Such a prompt was encoded as a whole before its length was looked at: minutes, in which no line was begun."""
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps(each) for each in ({"prompt": "a"}, document, {"prompt": "b"})))
    began = process_time()
    run_batch(source, tmp_path / "out.jsonl", make_worker, SETTINGS)
    assert process_time() - began < 20, "encoding ten megabytes takes longer"
    assert [result["line"] for result in read(tmp_path / "out.jsonl")] == [1, 3]
    (error,) = read(tmp_path / "out.errors.jsonl")
    assert error["line"] == 2
    assert len(error["error"]) < 1100


def test_a_text_is_refused_for_its_tokens_not_its_characters() -> None:
    """Many characters may be few tokens: only what a tokenizer makes of them counts."""
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["a" * 60])
    worker = Worker(tiny_model("llama", vocab_size=260), tokenizer, max_rows=1)
    try:
        worker._check_length("a" * 60 * 250)
        with pytest.raises(ValueError, match="more than 512 tokens but the model has 256 positions"):
            worker._check_length("b" * 5000)
    finally:
        worker.close()


# configurations


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("vocab_size", -5),
        ("max_position_embeddings", 0),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path: Path, name: str, value: int) -> None:
    """A model of -1 layers loaded, and failed at its first forward."""
    folder = Path(save_tiny_model(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ModelError, match="cannot read"):
        load(folder)


# what every command does


def failing(error: BaseException) -> Callable[[], None]:
    @common.friendly_errors
    def command() -> None:
        raise error

    return command


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "error: a.json: No space left on device"),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), "error: a and b: Cross-device link"),
        (PermissionError(errno.EACCES, "Permission denied", Path("a")), "error: a: Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: Broken pipe"),
        (OSError("no C compiler"), "error: no C compiler"),
        (MemoryError(), "error: out of memory: fewer rows"),
        (OutOfMemoryError("CUDA out of memory"), "error: out of memory (CUDA out of memory): fewer rows"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory (Def"),
    ],
)
def test_errors_in_a_line(capsys: pytest.CaptureFixture[str], error: Exception, told: str) -> None:
    with pytest.raises(common.typer.Exit) as end:
        failing(error)()
    assert end.value.exit_code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(told)
    assert stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))()
    with pytest.raises(KeyError):
        failing(KeyError("a"))()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with disk_of(10), pytest.raises(OSError, match=r"File too large: '.*a\.json'"), common.naming(tmp_path / "a.json"):
        (tmp_path / "a.json").write_text("x" * 100)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("redirection", "code"), [("| true", 141), ("> /dev/full", 2)])
def test_a_standard_output_that_fails(unbuffered: str, redirection: str, code: int) -> None:
    """Found when the interpreter ends, it was a complaint of Python's own, or exit code 120."""
    command = f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"'
    ran = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", f"{COMMAND}\nimport typer\ntyper.run(command)"],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == code
    told = "" if code == 141 else "error: the standard output: No space left on device\n"
    assert ran.stderr == f"working\n{told}"


def test_a_standard_error_that_nobody_reads() -> None:
    """The work goes on, and ends well."""
    for redirection in ("2> /dev/full", "2> >(true)"):
        ran = subprocess.run(
            ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", f"{COMMAND}command()"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (ran.returncode, ran.stdout) == (0, "done\n")
