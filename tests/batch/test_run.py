"""`specdec batch`: what a line may say, what a killed run leaves, and the same output however it was made."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from specdec.batch import Journal, Settings, SpecdecBatch, Worker, run_batch
from specdec.batch.lines import Line, parse, read_lines
from specdec.cli.app import app
from specdec.drafters import PromptLookup
from specdec.errors import BatchError, WorkerError
from specdec.testing import ByteTokenizer, tiny_model
from specdec.text.prompting import encode_chats, user_turn
from tests.support import batch_process
from tests.support.batch_process import SETTINGS, make_worker
from tests.support.batches import Echo, read, write_prompts

NUM_LINES = 40


def line_of(document: object, number: int = 1) -> Line:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Line(number, text, 0, "")


# lines


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"{", "no JSON"),
        (b'{"prompt": "\xff"}', "no UTF-8: byte 13 of the line is 0xff"),
        (b"[" * 100_000, "no JSON"),
        ([1], "a line is an object .* got a list"),
        ("text", "got a text"),
        ({}, "either a prompt or messages"),
        ({"prompt": "a", "messages": []}, "either a prompt or messages"),
        ({"prompt": " \n"}, "got an empty text"),
        ({"prompt": 3}, "got 3"),
        ({"prompt": None}, "got null"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ({"messages": []}, "a list of"),
        ({"messages": [{"role": "user"}]}, "a list of"),
        ({"messages": [{"role": "user", "content": 1}]}, "a list of"),
        ({"prompt": "a", "id": [1]}, "id is a text or a whole number, got a list"),
        ({"prompt": "a", "max_tokens": 3}, "unknown field 'max_tokens': a line has id, prompt, .*max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 0}, "at least 1, got 0"),
        ({"prompt": "a", "max_new_tokens": True}, "at least 1, got True"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "at least 1, got 1.5"),
        ({"prompt": "a", "do_sample": 1}, "true or false, got 1"),
        ({"prompt": "a", "temperature": 1.0}, "temperature needs do_sample"),
        ({"prompt": "a", "do_sample": True, "temperature": 0}, "a number above 0, got 0"),
        ({"prompt": "a", "do_sample": True, "temperature": "hot"}, "a number above 0, got 'hot'"),
        (b'{"prompt": "a", "do_sample": true, "temperature": NaN}', "a number above 0, got nan"),
        ({"prompt": "a", "do_sample": True, "top_p": 1.5}, "at most 1, got 1.5"),
        ({"prompt": "a", "do_sample": True, "top_k": -1}, "at least 0, got -1"),
        ({"prompt": "a", "stop": ""}, "none of them empty"),
        ({"prompt": "a", "stop": 3}, "none of them empty"),
        ({"prompt": "a", "stop": ["x", 3]}, "none of them empty"),
        ({"prompt": "a", "repetition_penalty": -1}, "a number above 0"),
    ],
)
def test_a_bad_line(document: object, reason: str) -> None:
    with pytest.raises(BatchError, match=reason):
        parse(line_of(document), Settings())


def test_a_line_overrides_the_settings_of_the_job() -> None:
    defaults = Settings(max_new_tokens=9, do_sample=True, temperature=0.5, seed=3)
    job = parse(line_of({"prompt": "a", "id": "x", "max_new_tokens": 4, "stop": "b"}, 7), defaults)
    assert (job.number, job.id, job.conversation) == (7, "x", "a")
    assert job.settings.generation_kwargs == {
        "max_new_tokens": 4,
        "do_sample": True,
        "temperature": 0.5,
        "stop_strings": ["b"],
    }
    greedy = parse(line_of({"prompt": "a", "do_sample": False}), defaults).settings
    assert greedy.generation_kwargs == {"max_new_tokens": 9, "do_sample": False}
    assert greedy.seed is None


def test_every_line_has_a_seed_of_its_own() -> None:
    defaults = Settings(do_sample=True, seed=3)
    seeds = [parse(line_of({"prompt": "a"}, number), defaults).settings.seed for number in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1]
    assert parse(line_of({"prompt": "a", "seed": 5}), defaults).settings.seed == 5
    assert parse(line_of({"prompt": "a"}), Settings(do_sample=True)).settings.seed is None


def test_empty_lines_count_but_ask_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\n{"prompt": "a"}\r\n  \n{"prompt": "b"}')
    with path.open("rb") as file:
        lines = list(read_lines(file))
    assert [(line.number, line.text, line.end) for line in lines] == [
        (2, b'{"prompt": "a"}', 18),
        (4, b'{"prompt": "b"}', path.stat().st_size),
    ]


# the journal


def test_results_in_order_and_errors_apart(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(1, 30)]
    prompts[6], prompts[11] = "fail", 5  # type: ignore[call-overload]
    source = write_prompts(tmp_path / "in.jsonl", prompts)
    done = run_batch(source, tmp_path / "out.jsonl", Echo, Settings())
    results, errors = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert [result["line"] for result in results] == [number for number in range(1, 30) if number not in (7, 12)]
    assert all(result["text"] == f"prompt {result['line']}" for result in results)
    assert [(error["line"], error["error"][:10]) for error in errors] == [(7, "as it says"), (12, "prompt is ")]
    assert (done.num_lines, done.num_errors, done.num_skipped, done.num_tokens) == (27, 2, 0, 27)
    assert done.end == done.num_bytes == source.stat().st_size


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.jsonl", ["a", "fail", "c"])
    run_batch(source, tmp_path / "out.jsonl", Echo, Settings())
    before = (tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.errors.jsonl").read_bytes()
    with source.open("a") as file:
        file.write('{"prompt": "d"}\n')
    pool = Echo()
    done = run_batch(source, tmp_path / "out.jsonl", lambda: pool, Settings())
    assert pool.begun == [4]
    assert done.num_skipped == 3
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before[0])
    assert (tmp_path / "out.errors.jsonl").read_bytes() == before[1]


def test_nothing_to_do_needs_no_model(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.jsonl", ["a"])
    run_batch(source, tmp_path / "out.jsonl", Echo, Settings())

    def no_pool() -> Echo:
        raise AssertionError("there is nothing to do")

    assert run_batch(source, tmp_path / "out.jsonl", no_pool, Settings()).num_skipped == 1


def test_a_line_that_is_half_there_is_cut_off(tmp_path: Path) -> None:
    """Broken off after any byte of the last line, the file ends up the same."""
    source = write_prompts(tmp_path / "in.jsonl", ["a", "b"])
    output = tmp_path / "out.jsonl"
    run_batch(source, output, Echo, Settings())
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    for kept in range(first, len(whole)):
        output.write_bytes(whole[:kept])
        assert run_batch(source, output, Echo, Settings()).num_lines == 1
        assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda source, output: write_prompts(source, ["a", "B", "c"]), "line 2 of the input has changed"),
        (lambda source, output: write_prompts(source, ["a", "b"]), "holds 3 lines and the input has only 2"),
        (lambda source, output: output.write_text('{"text": "mine"}\n'), "line 1 of .* was not written by this"),
        (lambda source, output: output.write_bytes(output.read_bytes() * 2), "has line 1 twice"),
    ],
)
def test_an_output_that_belongs_to_something_else(
    tmp_path: Path, change: Callable[[Path, Path], object], reason: str
) -> None:
    source, output = write_prompts(tmp_path / "in.jsonl", ["a", "b", "c"]), tmp_path / "out.jsonl"
    run_batch(source, output, Echo, Settings())
    change(source, output)
    before = output.read_bytes()
    with pytest.raises(BatchError, match=reason):
        run_batch(source, output, Echo, Settings())
    assert output.read_bytes() == before


@pytest.mark.parametrize("text", [b"notes", b'{"prompt": "a"}', b'{"line": 1, "text": "mine"}\nnotes'])
def test_nothing_of_others_is_cut_off(tmp_path: Path, text: bytes) -> None:
    """A last line without an end is taken for one of ours only if it begins like one."""
    source, output = write_prompts(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.jsonl"
    output.write_bytes(text)
    with pytest.raises(BatchError, match="was not written by this command"):
        run_batch(source, output, Echo, Settings())
    assert output.read_bytes() == text


def test_the_input_is_no_output(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="is the input"):
        run_batch(source, source, Echo, Settings())
    assert source.read_text() == '{"prompt": "a"}'


def test_an_interrupt_leaves_what_is_done(tmp_path: Path) -> None:
    class Interrupted(Echo):
        closed = False

        def wait(self) -> None:
            if len(self.begun) > 8:
                raise KeyboardInterrupt
            super().wait()

        def close(self) -> None:
            self.closed = True

    source, output = write_prompts(tmp_path / "in.jsonl", [f"{number}" for number in range(20)]), tmp_path / "out.jsonl"
    pool = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run_batch(source, output, lambda: pool, Settings())
    assert pool.closed
    num_done = len(read(output))
    assert 0 < num_done < 20
    assert run_batch(source, output, Echo, Settings()).num_skipped == num_done
    assert [result["text"] for result in read(output)] == [f"{number}" for number in range(20)]


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.jsonl", ["a"])
    run_batch(source, tmp_path / "out.jsonl", Echo, Settings(), made_with="model")
    for settings, made_with in ((Settings(max_new_tokens=5), "model"), (Settings(), "another")):
        with pytest.raises(BatchError, match="begun with other options"):
            run_batch(source, tmp_path / "out.jsonl", Echo, settings, made_with=made_with)


def test_one_process_writes_an_output(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out.jsonl", "s"),
        pytest.raises(BatchError, match="another process is writing"),
    ):
        Journal(tmp_path / "out.jsonl", "s")
    Journal(tmp_path / "out.jsonl", "s").__exit__(None, None, None)


def test_an_input_is_read_as_it_is_needed(tmp_path: Path) -> None:
    """No line is taken before there is room for it in the window."""
    source = write_prompts(tmp_path / "in.jsonl", [f"prompt {number}" for number in range(100)])
    pool = Echo()
    ahead = []

    def look(progress: Any) -> None:
        ahead.append(len(pool.begun) - progress.num_lines)

    run_batch(source, tmp_path / "out.jsonl", lambda: pool, Settings(), on_progress=look)
    assert max(ahead) <= Echo.window


# a model at work


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of several lengths, in several forms; two lines are bad."""
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    documents: list[object] = []
    for number in range(NUM_LINES):
        document: dict[str, Any] = {"prompt": "to be or not " * (1 + number % 4), "id": f"row {number}"}
        if number % 5 == 0:
            document = {"messages": [{"role": "user", "content": f"say {number}"}], "max_new_tokens": 5 + number}
        if number % 7 == 0:
            document |= {"do_sample": True, "temperature": 0.8, "seed": number}
        documents.append(document)
    documents[8], documents[21] = {"prompt": ""}, {"prompt": "x " * 300}
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def uninterrupted(source: Path) -> tuple[bytes, bytes]:
    """What one run makes of it."""
    output = source.with_name("whole.jsonl")
    run_batch(source, output, make_worker, SETTINGS)
    return output.read_bytes(), output.with_name("whole.errors.jsonl").read_bytes()


def test_answers_are_those_of_plain_decoding(source: Path, uninterrupted: tuple[bytes, bytes]) -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    asked = read(source)
    results = [json.loads(text) for text in uninterrupted[0].splitlines()]
    assert len(results) == NUM_LINES - 2
    for result in results:
        document = asked[result["line"] - 1]
        assert result.get("id") == document.get("id")
        if "seed" in document:
            continue
        messages = document.get("messages") or user_turn(document["prompt"])
        inputs = encode_chats(tokenizer, [messages])
        length = inputs["input_ids"].shape[1]
        num_new = document.get("max_new_tokens", SETTINGS.max_new_tokens)
        tokens = model.generate(**inputs, max_new_tokens=num_new, do_sample=False)[0, length:].tolist()
        assert result["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (result["prompt_tokens"], result["completion_tokens"]) == (length, len(tokens))
        assert result["finish_reason"] == ("stop" if tokens[-1] == tokenizer.eos_token_id else "length")


def test_lines_that_cannot_be_answered(uninterrupted: tuple[bytes, bytes]) -> None:
    errors = [json.loads(text) for text in uninterrupted[1].splitlines()]
    assert [error["line"] for error in errors] == [9, 22]
    assert "empty" in errors[0]["error"]
    assert "positions" in errors[1]["error"]


def test_three_kills(source: Path, uninterrupted: tuple[bytes, bytes], tmp_path: Path) -> None:
    """Killed three times at random moments, the output is complete, without duplicates, and that of one run."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.support.batch_process"])
    output, chance = tmp_path / "out.jsonl", random.Random()
    sizes = []
    for kill in range(3):
        process = context.Process(target=batch_process.answer_file, args=(str(source), str(output)))
        process.start()
        try:
            wanted = chance.uniform(kill, kill + 1) * len(uninterrupted[0]) / 4
            wait_for(lambda wanted=wanted: output.exists() and output.stat().st_size > wanted, process)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.join()
        sizes.append(output.stat().st_size)
        written = output.read_bytes()
        assert uninterrupted[0].startswith(written[: written.rfind(b"\n") + 1])
    assert sizes == sorted(sizes)
    assert sizes[-1] < len(uninterrupted[0]), "the last kill came too late to tell anything"
    run_batch(source, output, make_worker, SETTINGS)
    assert output.read_bytes() == uninterrupted[0]
    assert output.with_name("out.errors.jsonl").read_bytes() == uninterrupted[1]


def wait_for(is_so: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    deadline = monotonic() + seconds
    while not is_so():
        assert process.is_alive(), "it ended before it was killed"
        assert monotonic() < deadline, "nothing happens"
        sleep(0.001)


def test_a_model_that_fails_is_no_fault_of_the_lines(source: Path, tmp_path: Path) -> None:
    """What is done stays, and nothing is told of the others: they are still to be done."""

    def failing_worker() -> Worker:
        worker = make_worker()
        forward, calls = worker._engine.engine.model.model.layers[0].forward, []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) > 40:
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        worker._engine.engine.model.model.layers[0].forward = fail
        return worker

    output = tmp_path / "out.jsonl"
    with pytest.raises(WorkerError, match="out of memory"):
        run_batch(source, output, failing_worker, SETTINGS)
    errors = output.with_name("out.errors.jsonl")
    assert not errors.exists() or {error["line"] for error in read(errors)} <= {9, 22}


# people's own pipelines


def test_columns_of_a_data_set(tiny: str) -> None:
    """As `ray.data` calls it: columns in, the same columns and the answers out."""
    answer = SpecdecBatch(tiny, drafter="prompt-lookup", threads=1, max_rows=2, settings={"max_new_tokens": 6})
    batch = {
        "prompt": np.array(["to be", "", "or not to be"], dtype=object),
        "max_new_tokens": np.array([4, 4, 8]),
        "label": np.array([7, 8, 9]),
    }
    out = answer(batch)
    assert list(out) == [*batch, "text", "finish_reason", "error", "prompt_tokens", "completion_tokens"]
    assert out["label"].tolist() == [7, 8, 9]
    assert out["text"][1] is None
    assert "empty" in out["error"][1]
    assert out["completion_tokens"].tolist()[1:] == [0, 8]
    messages = np.array([np.array([{"role": "user", "content": "to be"}])], dtype=object)
    again = answer({"messages": messages, "max_new_tokens": np.array([4])})
    assert again["text"][0] == out["text"][0]
    answer.worker.close()


def test_answers_that_are_alike_draft_each_other() -> None:
    """Where that is asked for, and they stay the same."""
    jobs = [parse(line_of({"prompt": "to be or not"}, number), Settings(max_new_tokens=24)) for number in range(4)]
    counts = []
    for reuses in (False, True):
        model, tokenizer = tiny_model("llama"), ByteTokenizer()
        worker = Worker(model, tokenizer, drafter=PromptLookup(min_match=4), max_rows=1, reuses_replies=reuses)
        answers = worker.answer(jobs)
        worker.close()
        assert len({answer.text for answer in answers}) == 1
        counts.append([answer.num_accepted for answer in answers])
    assert min(counts[1][1:]) > max(counts[0]) >= counts[1][0]


def test_the_number_of_rows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.worker.RowTimer.seconds", lambda timer, rows: max(1.0, rows / 4))
    worker = Worker(tiny_model("llama"), ByteTokenizer())
    assert (worker.max_rows, worker.window) == (4, 16)
    worker.close()


# the command


def test_the_command(source: Path, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [
        "batch",
        str(source),
        str(output),
        "-m",
        tiny,
        "-n",
        "6",
        "--drafter",
        "prompt-lookup",
        "--max-rows",
        "2",
        "--reuse-replies",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"{NUM_LINES - 2} lines answered; 2 could not be: see out.errors.jsonl" in result.stderr
    assert len(read(output)) == NUM_LINES - 2
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert f"0 lines answered; {NUM_LINES} were done already" in again.stderr
    other = CliRunner().invoke(app, [*command, "--sample"])
    assert other.exit_code == 2
    assert "begun with other options" in " ".join(other.stderr.split())


@pytest.mark.parametrize(
    ("words", "ray"),
    [
        (["in", "out"], None),
        (["in", "out", "--ray"], "here"),
        (["--ray", "in", "out"], "here"),
        (["in", "out", "--ray", "--workers", "2"], "here"),
        (["--ray", "auto", "in", "out"], "auto"),
        (["in", "--ray", "head.example:6379", "out"], "head.example:6379"),
        (["in", "out", "--ray=ray://head:10001"], "ray://head:10001"),
    ],
)
def test_the_address_of_a_cluster_may_be_left_out(words: list[str], ray: str | None) -> None:
    context = get_command(app).commands["batch"].make_context("batch", words)  # type: ignore[attr-defined]
    assert context.params["ray"] == ray
    assert (str(context.params["source"]), str(context.params["output"])) == ("in", "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--temperature", "1"], "--temperature needs --sample"),
        (["--workers", "2"], "--workers needs --ray"),
        (["--raw", "--system", "x"], "give only one of them"),
        (["--drafter", "magic"], "magic"),
        (["--stop", ""], "none of them empty"),
    ],
)
def test_options_that_are_refused(source: Path, tmp_path: Path, options: list[str], reason: str) -> None:
    result = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out.jsonl"), *options])
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["batch", str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")])
    assert result.exit_code == 2
    assert "there is no file" in result.stderr
