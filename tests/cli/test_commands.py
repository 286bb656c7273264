"""The commands as a user types them, on tiny models on disk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import specdec
from specdec.bench.harness import Harness
from specdec.cli.bench_output import TABLE_WIDTH
from tests.support.commands import CONTEXT_LENGTH, PROMPT, error_of, plain_text, specdec_command
from tests.support.tiny_models import save_tiny_model


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from specdec.cli.app import app; from typer.testing import CliRunner; "
        "CliRunner().invoke(app, ['bench', '--help']); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# generate


@pytest.mark.parametrize("drafter", ["auto", "plain", "prompt-lookup:num_tokens=4", "small-model"])
def test_generate_streams_what_transformers_says(tiny: str, tiny_draft: str, drafter: str) -> None:
    draft = ["--draft", tiny_draft] if drafter == "small-model" else []
    result = specdec_command("generate", PROMPT, "-m", tiny, "-n", "16", "--drafter", drafter, *draft)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain_text(tiny, PROMPT) + "\n"
    assert "tokens per round" in result.stderr


@pytest.mark.parametrize("tree", ["chain:3", "fixed:2x1", "dyspec:budget=8,max_depth=4"])
def test_generate_grows_trees(tiny: str, tiny_draft: str, tree: str) -> None:
    result = specdec_command("generate", PROMPT, "-m", tiny, "-d", tiny_draft, "-n", "16", "--tree", tree, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["text"] == plain_text(tiny, PROMPT)
    assert document["stats"]["draft_forwards"] > 0
    assert (document["stats"]["num_drafted"] > document["stats"]["num_levels"]) == (tree != "chain:3")


def test_generate_verifies_by_traversal(tiny: str, tiny_draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    generate = specdec.generate
    monkeypatch.setattr(specdec, "generate", lambda *a, **kw: asked.update(kw) or generate(*a, **kw), raising=False)
    options = ("--sample", "--seed", "1", "--tree", "dyspec:8", "--verify", "traversal")
    result = specdec_command("generate", PROMPT, "-m", tiny, "-d", tiny_draft, "-n", "16", *options)
    assert result.exit_code == 0, result.output
    assert asked["verify"] == "traversal"


def test_generate_is_exact_to_the_bit(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    generate = specdec.generate
    monkeypatch.setattr(specdec, "generate", lambda *a, **kw: asked.update(kw) or generate(*a, **kw), raising=False)
    options = ("--drafter", "prompt-lookup", "--weights", "stock", "-n", "16", "--json")
    texts = [
        json.loads(specdec_command("generate", PROMPT, "-m", tiny, *options, *more).stdout)["text"]
        for more in ((), ("--exact", "bits"))
    ]
    assert asked["exact"] == "bits"
    assert texts[0] == texts[1]


def test_generate_reads_stdin(tiny: str) -> None:
    result = specdec_command("generate", "-m", tiny, "-n", "16", stdin=PROMPT + "\n")
    assert result.stdout == plain_text(tiny, PROMPT) + "\n"


def test_generate_raw_leaves_the_template_out(tiny: str, tiny_without_template: str) -> None:
    raw = specdec_command("generate", PROMPT, "-m", tiny, "-n", "16", "--raw")
    assert raw.stdout == plain_text(tiny, PROMPT, raw=True) + "\n"
    untemplated = specdec_command("generate", PROMPT, "-m", tiny_without_template, "-n", "16")
    assert untemplated.stdout == plain_text(tiny_without_template, PROMPT, raw=True) + "\n"


def test_generate_prints_one_json_document(tiny: str, tiny_draft: str) -> None:
    result = specdec_command("generate", PROMPT, "-m", tiny, "-d", tiny_draft, "-n", "16", "--json")
    document = json.loads(result.stdout)
    assert list(document) == ["text", "tokens", "stats"]
    assert document["text"] == plain_text(tiny, PROMPT)
    stats = document["stats"]
    assert stats["num_new_tokens"] == len(document["tokens"]) == len(stats["token_seconds"])
    assert {"tokens_per_round", "acceptance_rate", "accepted_histogram", "ttft_seconds"} <= set(stats)


def test_generate_stops_at_a_string(tiny: str) -> None:
    stop = next(char for char in plain_text(tiny, PROMPT) if char.isalpha())
    result = specdec_command("generate", PROMPT, "-m", tiny, "-n", "16", "--stop", stop, "--json")
    text = json.loads(result.stdout)["text"]
    assert text.count(stop) == 1
    assert text.endswith(stop)


def test_generate_samples_by_seed(tiny: str) -> None:
    def sampled(seed: int) -> str:
        options = ("--sample", "-t", "0.9", "--top-p", "0.95", "--top-k", "50", "--seed", str(seed))
        return specdec_command("generate", PROMPT, "-m", tiny, "-n", "16", *options).stdout

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_generate_passes_the_system_prompt(tiny: str) -> None:
    result = specdec_command("generate", PROMPT, "-m", tiny, "-n", "16", "--system", "Be brief.")
    by_hand = f"system: Be brief.\nuser: {PROMPT}\nassistant: "
    assert result.stdout == plain_text(tiny, by_hand, raw=True) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drafter", "eagle"], "unknown method 'eagle'; choose from: auto, plain, prompt-lookup, small-model"),
        (["--drafter", "small-model"], "give it with --draft"),
        (["--drafter", "prompt-lookup:num_tokens=0"], "num_tokens"),
        (["--drafter", "plain", "--draft", "x"], "--draft is for auto, small-model"),
        (["--tree", "bush"], "unknown tree 'bush'; choose from: chain, fixed"),
        (["--tree", "dyspec:4", "--drafter", "plain"], "plain does not take the tree dyspec:4: use prompt-lookup or"),
        (["--tree", "fixed:2x1"], "auto does not take the tree fixed:2x1: use small-model or "),
        (["--tree", "sequoia:8"], "specdec bench --tree sequoia:8"),
        (["--tree", "dyspec:0", "--drafter", "prompt-lookup"], "budget is a positive integer"),
        (["--verify", "traversal"], "--verify traversal needs --sample"),
        (["--temperature", "0.5"], "--temperature needs --sample"),
        (["--top-k", "5"], "--top-k needs --sample"),
        (["--seed", "5"], "--seed needs --sample"),
        (["--raw", "--system", "Be brief."], "--raw leaves out"),
        (["--dtype", "float8"], "float8"),
        (["--device", "tpu"], "tpu"),
        (["-m", "no/such/folder"], "no/such/folder"),
        (["-n", "0"], "--max-new-tokens"),
        (["--sample", "-t", "0"], "temperature"),
    ],
)
def test_generate_refuses_wrong_options(tiny: str, options: list[str], message: str) -> None:
    model = [] if "-m" in options else ["-m", tiny]
    assert message in error_of(specdec_command("generate", PROMPT, *model, *options))


def test_generate_refuses_an_empty_prompt(tiny: str) -> None:
    assert "the prompt is empty" in error_of(specdec_command("generate", " ", "-m", tiny))
    assert "the prompt is empty" in error_of(specdec_command("generate", "-m", tiny, stdin=""))


def test_generate_refuses_a_system_prompt_without_a_template(tiny_without_template: str) -> None:
    result = specdec_command("generate", PROMPT, "-m", tiny_without_template, "--system", "Be brief.")
    assert "no chat template" in error_of(result)


def test_generate_refuses_a_draft_with_another_tokenizer(tiny: str, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    tokenizer_file = tmp_path / "other" / "tokenizer.json"
    document = json.loads(tokenizer_file.read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer_file.write_text(json.dumps(document))
    result = specdec_command("generate", PROMPT, "-m", tiny, "--draft", other)
    assert "another tokenizer" in error_of(result)


def test_template_that_refuses_a_conversation_is_reported(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system role') }}"
    picky = save_tiny_model(tmp_path / "picky", chat_template=template)
    assert "chat template refuses" in error_of(specdec_command("generate", PROMPT, "-m", picky))


# bench

FAST = ("-n", "8", "-r", "1", "--warmup", "0")


def write_prompts(path: Path, *prompts: str) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "category": "few"}) + "\n" for prompt in prompts))
    return str(path)


@pytest.fixture
def few(tmp_path: Path) -> str:
    return write_prompts(tmp_path / "few.jsonl", PROMPT, "one", "two")


def test_bench_prints_a_table(tiny: str, tiny_draft: str, few: str) -> None:
    result = specdec_command("bench", "-m", tiny, "--draft", tiny_draft, "--prompts", few, *FAST)
    assert result.exit_code == 0, result.output
    for method in ("transformers", "plain", "prompt-lookup", "small-model"):
        assert method in result.stdout
    assert "counts the bonus token" in result.stdout
    assert "greedy, new tokens: 8, batch: 1" in " ".join(result.stdout.split())


def test_bench_says_every_call_where_nobody_sees_a_bar(tiny: str, few: str) -> None:
    result = specdec_command(
        "bench", tiny, "--prompts", few, "--limit", "1", "--methods", "plain", "-n", "8", "-r", "1"
    )
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if re.match(r"\d/4 ", line)]
    assert [line.rpartition(": ")[0] for line in lines] == [
        "1/4 warm-up: few, transformers",
        "2/4 warm-up: few, plain",
        "3/4 few, transformers",
        "4/4 few, plain",
    ]
    assert all(re.search(r": \d+\.\d tokens/s$", line) for line in lines)


def test_bench_is_quick(tiny: str, tmp_path: Path) -> None:
    """One prompt each of a few categories, auto only; what is given besides still holds."""
    categories = ("a", "b", "c", "d", "e")
    lines = [json.dumps({"prompt": f"{PROMPT} {name}", "category": name}) for name in categories for _ in range(2)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(lines))
    result = specdec_command("bench", tiny, "--prompts", str(path), "--quick", "-n", "8", "--warmup", "0")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"auto: \d+\.\d\d x transformers, \d+\.\d\d x plain; identical on all 3 prompts *", last)
    assert "new tokens: 8, batch: 1, repetitions: 1 after 0" in " ".join(result.stdout.split())
    options = ("--quick", "--category", "b", "--methods", "plain", "-r", "2", "--limit", "2", "--json", "--warmup", "0")
    result = specdec_command("bench", tiny, "--prompts", str(path), *options)
    document = json.loads(result.stdout)
    assert {row["category"] for row in document["methods"]} == {"b", "all"}
    assert {row["name"] for row in document["methods"]} == {"transformers", "plain"}
    settings = document["environment"]["settings"]
    assert (settings["max_new_tokens"], settings["repetitions"]) == (48, 2)


def test_bench_prints_one_json_document(tiny: str, few: str) -> None:
    options = ("--methods", "prompt-lookup:num_tokens=4", "--limit", "2", "--batch-size", "2", "--json")
    result = specdec_command("bench", "-m", tiny, "--prompts", few, *options, *FAST)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["suite"] == "few.jsonl"
    rows = [(method["name"], method["category"], method["num_prompts"]) for method in document["methods"]]
    names = ("transformers", "plain", "prompt-lookup:num_tokens=4")
    assert rows == [(name, category, 2) for category in ("few", "all") for name in names]


def test_bench_measures_every_batch_size_and_length(tiny: str, few: str) -> None:
    sizes = ("--batch-size", "1,2", "--output-len", "4,6", "-r", "1", "--warmup", "0")
    result = specdec_command("bench", "-m", tiny, "--prompts", few, "--methods", "plain", *sizes, "--json")
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(result.stdout)["methods"] if (row["name"], row["category"]) == ("plain", "all")]
    measured = [(row["max_new_tokens"], row["batch_size"], row["num_tokens"]) for row in rows]
    assert measured == [(4, 1, 12), (4, 2, 12), (6, 1, 18), (6, 2, 18)]


def test_bench_cuts_prompts_to_a_length(tiny: str) -> None:
    options = ("--input-len", "5,40", "--category", "math", "--methods", "plain", "--json")
    result = specdec_command("bench", "-m", tiny, *options, *FAST)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["suite"] == "builtin, cut"
    rows = [(row["category"], row["num_prompts"]) for row in document["methods"] if row["name"] == "plain"]
    assert rows == [("5 tokens", 2), ("40 tokens", 2), ("all", 4)]


def test_bench_runs_peers(tiny: str, tiny_draft: str, few: str) -> None:
    peers = ("--peers", "transformers,transformers/early-exit:exit_layer=1", "--methods", "plain", "--json")
    result = specdec_command("bench", "-m", tiny, "-d", tiny_draft, "--prompts", few, "--limit", "1", *peers, *FAST)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    modes = ("prompt-lookup", "assistant", "early-exit:exit_layer=1")
    names = ["transformers", "plain", *(f"transformers/{mode}" for mode in modes)]
    assert [row["name"] for row in document["methods"] if row["category"] == "all"] == names
    assert {row["identical_to_plain"] for row in document["methods"]} == {True}
    assert document["not_available"] == []


def test_bench_writes_files_beside_the_table(tiny: str, few: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = {ending: tmp_path / f"out.{ending}" for ending in ("json", "jsonl", "csv", "md", "txt")}
    for path in written.values():
        plot = ("--plot", str(tmp_path / "figure.svg")) if path == written["json"] else ()
        files = ("--output", str(path), *plot, "--limit", "1", "--methods", "plain")
        result = specdec_command("bench", "-m", tiny, "--prompts", few, *files, *FAST)
        assert result.exit_code == 0, result.output
        assert "speed-up" in result.stdout
    assert json.loads(written["json"].read_text())["suite"] == "few.jsonl"
    assert json.loads(written["jsonl"].read_text().splitlines()[-1])["name"] == "plain"
    assert written["csv"].read_text().startswith("model,suite,")
    assert "| category | method |" in written["md"].read_text()
    assert "counts the bonus token" in written["txt"].read_text()
    assert (tmp_path / "figure.svg").stat().st_size > 10_000


def test_bench_prints_other_formats(tiny: str, few: str) -> None:
    for name, start in (("csv", "model,suite,"), ("md", "**"), ("jsonl", '{"schema_version": 1')):
        options = ("-o", name, "--limit", "1", "--methods", "plain")
        result = specdec_command("bench", "-m", tiny, "--prompts", few, *options, *FAST)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(start)


def test_bench_drafts_trees(tiny: str, tiny_draft: str, few: str) -> None:
    trees = ("--tree", "chain:3", "--tree", "sequoia:8", "--tree", "dyspec:budget=8,max_depth=4")
    result = specdec_command("bench", "-m", tiny, "--draft", tiny_draft, "--prompts", few, *trees, *FAST)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= TABLE_WIDTH
    for text in ("small-model sequoia:8", "dyspec:budget=8,max_depth=4", "calls", "depth", "nodes"):
        assert text in result.stdout
    assert "depth and nodes of a row's tree" in result.stdout


def test_bench_measures_ranks_once_for_each_drafter(
    tiny: str, tiny_draft: str, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("specdec.bench.building.measure_ranks", lambda *args: asked.append(args[2]) or (0.5, 0.25))
    options = ("--methods", "small-model,quantized-self", "--tree", "sequoia:4", "--tree", "sequoia:8", "--json")
    result = specdec_command("bench", "-m", tiny, "-d", tiny_draft, "--prompts", few, "--limit", "1", *options, *FAST)
    assert result.exit_code == 0, result.output
    assert [type(drafter).__name__ for drafter in asked] == ["SmallModel", "QuantizedSelf"]
    trees = json.loads(result.stdout)["environment"]["settings"]["trees"]
    assert trees["quantized-self sequoia:8"] == "Sequoia(budget=8, acceptance=(0.5, 0.25))"
    assert len(trees) == 4


def test_bench_verifies_drawn_trees_by_traversal(tiny: str, tiny_draft: str, few: str) -> None:
    options = ("--sample", "--verify", "traversal", "--tree", "dyspec:8", "--limit", "1", "--json")
    result = specdec_command("bench", "-m", tiny, "-d", tiny_draft, "--prompts", few, *options, *FAST)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["environment"]["settings"]["verify"] == "traversal"


def test_bench_samples(tiny: str, few: str) -> None:
    options = ("--sample", "--temperature", "0.8", "--seed", "5", "--limit", "1", "--json")
    result = specdec_command("bench", "-m", tiny, "--prompts", few, *options, *FAST)
    assert result.exit_code == 0, result.output
    assert all(method["identical_to_plain"] is None for method in json.loads(result.stdout)["methods"])


def test_bench_exits_with_1_if_an_output_differs(tiny: str, few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.testing import equality

    monkeypatch.setitem(equality.TIE_BOUND, AutoModelForCausalLM.from_pretrained(tiny).dtype, 0.0)
    generate = specdec.generate

    def generate_wrongly(*args: object, **kwargs: object) -> object:
        out = generate(*args, **kwargs)
        out.sequences[:, -1] = (out.sequences[:, -1] + 1) % 250
        return out

    monkeypatch.setattr(specdec, "generate", generate_wrongly, raising=False)
    result = specdec_command("bench", "-m", tiny, "--prompts", few, "--limit", "1", "--json", *FAST)
    assert result.exit_code == 1
    assert "plain differs from transformers on few prompt" in result.stderr
    methods = json.loads(result.stdout)["methods"]
    assert {method["name"]: method["identical_to_plain"] for method in methods} == {
        "transformers": True,
        "plain": False,
        "prompt-lookup": False,
        "auto": False,
    }


def test_bench_reports_what_was_measured_before_an_interrupt(
    tiny: str, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all, num_batches = Harness._run_all, 0

    def interrupt_the_third(*args: object) -> object:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 3:
            raise KeyboardInterrupt
        return run_all(*args)

    monkeypatch.setattr(Harness, "_run_all", interrupt_the_third)
    result = specdec_command("bench", "-m", tiny, "--prompts", few, "--json", *FAST)
    assert result.exit_code == 130
    assert {method["num_prompts"] for method in json.loads(result.stdout)["methods"]} == {2}
    assert "interrupted" in result.stderr


def test_bench_fails_when_a_method_fails(tiny: str, few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(specdec, "generate", broken, raising=False)
    result = specdec_command("bench", "-m", tiny, "--prompts", few, "--json", *FAST)
    assert "plain failed on the prompt 'to be" in error_of(result)
    assert "RuntimeError: out of ideas" in error_of(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "plain,eagle"], "choose from: transformers, auto, plain, prompt-lookup, small-model"),
        (["--methods", "small-model"], "give it with --draft"),
        (["--methods", "plain", "--draft", "x"], "--draft is for auto, small-model"),
        (["--tree", "bush"], "unknown tree 'bush'; choose from: chain, fixed"),
        (["--tree", "sequoia:8"], "no method takes the tree sequoia:8: ask for small-model or "),
        (["--tree", "dyspec:0"], "budget is a positive integer"),
        (["--verify", "traversal"], "verify=traversal needs sampling"),
        (["--category", "poetry"], "unknown category 'poetry'"),
        (["--prompts", "missing.jsonl"], "cannot read the prompts"),
        (["--temperature", "0.5"], "temperature"),
        (["--reference", "prompt-lookup"], "--reference"),
        (["--peers", "vllm"], "unknown peer 'vllm'; choose from: transformers, llama.cpp"),
        (["--peers", "transformers/assistant"], "give it with --draft"),
        (["--peers", "transformers/early-exit:exit_layer=9"], "exit_layer must be from 1 to 1 for this model"),
        (["--gguf", "x.gguf"], "--gguf and --draft-gguf are for --peers llama.cpp"),
        (["--batch-size", "1,many"], "--batch-size takes a whole number or several, separated by commas"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--input-len", "0"], "--input-len must be at least 1"),
        (["-o", "yaml"], "yaml"),
        (["--output", "results.yaml"], "the ending says what is written; it may be .json, .jsonl, .csv, .md, .txt"),
        (["--output", "no/such/folder/results.json"], "there is no folder no/such/folder"),
        (["--plot", "figure.gif"], "the ending says what is written; it may be .png, .svg, .pdf"),
        (["--max-new-tokens", str(CONTEXT_LENGTH)], "positions of the model"),
    ],
)
def test_bench_refuses_wrong_options(tiny: str, options: list[str], message: str) -> None:
    assert message in error_of(specdec_command("bench", "-m", tiny, *options))
