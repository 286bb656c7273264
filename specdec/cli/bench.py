"""`specdec bench`: is it faster, and is it the same?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from specdec.bench.methods import MethodSpec, choose_methods
from specdec.bench.peers import choose_peers
from specdec.cli.bench_options import (
    ALL_PROMPTS,
    LOSSLESS,
    NO_PEERS,
    TABLE_ONLY,
    BatchSizesOption,
    JsonOption,
    MethodsOption,
    OutputLengthsOption,
    OutputOptions,
    PeerOptions,
    PromptOptions,
    QuickOption,
    ReferenceOption,
    RepetitionsOption,
    RoutedOptions,
    SeedOption,
    TreesOption,
    WarmupOption,
    quick_values,
    whole_numbers,
)
from specdec.cli.bench_progress import BenchProgress
from specdec.cli.common import INTERRUPTED, ModelOption, err_console, friendly_errors, heeds_sigterm, starting, typed
from specdec.cli.grafting import grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import (
    LOADING,
    DraftOption,
    LoadingOptions,
    SampleOption,
    TemperatureOption,
    VerifyOption,
)
from specdec.errors import SpecdecError

if TYPE_CHECKING:
    from specdec.bench.harness import BatchResult, Harness
    from specdec.suites import Prompt

NOT_IDENTICAL = 1


def register(app: typer.Typer) -> None:
    app.command()(bench)


@friendly_errors
@heeds_sigterm
@takes_model
@grafted
def bench(
    context: typer.Context,
    model: ModelOption = "demo",
    draft: DraftOption = None,
    loading: LoadingOptions = LOADING,
    methods: MethodsOption = None,
    tree: TreesOption = None,
    routed: RoutedOptions = LOSSLESS,
    others: PeerOptions = NO_PEERS,
    reference: ReferenceOption = "transformers",
    asked: PromptOptions = ALL_PROMPTS,
    quick: QuickOption = False,
    max_new_tokens: OutputLengthsOption = "64",
    batch_size: BatchSizesOption = "1",
    repetitions: RepetitionsOption = 3,
    warmup: WarmupOption = 1,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    verify: VerifyOption = "topdown",
    seed: SeedOption = 0,
    results_in: OutputOptions = TABLE_ONLY,
    as_json: JsonOption = False,
) -> None:
    """Time drafters and peers against plain decoding and check that they say the same.

    Exit code 1: a greedy output of specdec differs from the reference by more than a numerical tie.
    """
    if quick:
        values = quick_values(typed(context), asked)
        methods = values.get("methods", methods)
        max_new_tokens = values.get("max_new_tokens", max_new_tokens)
        repetitions, asked = values.get("repetitions", repetitions), values["asked"]
    lengths, sizes = whole_numbers("--max-new-tokens", max_new_tokens), whole_numbers("--batch-size", batch_size)
    wanted = choose_peers(others.peers, draft=draft, draft_gguf=others.draft_gguf)
    drafting_peers = any(spec.needs_draft for spec in wanted.values())
    drafts_anyway = drafting_peers or bool(routed.router)
    specs = choose_methods(
        methods, reference=reference, draft=draft, model=model, trees=tree or (), peers_use_draft=drafts_anyway
    )
    suite = asked.suite()

    with starting():
        from specdec.bench.building import Models, build_methods, build_peers, build_routed, llama_files
        from specdec.bench.document import make_document
        from specdec.bench.harness import Harness, Settings
        from specdec.bench.peers.llama_cpp import describe
        from specdec.bench.routed import RouterSpec, choose_step_writer
        from specdec.models.pair import load_pair

    router_specs = [RouterSpec.parse(text) for text in dict.fromkeys(routed.router or ())]
    writer = choose_step_writer(routed.step_writer, draft, model) if router_specs else None
    peer_specs = [spec for name, spec in wanted.items() if name not in specs]
    llama = llama_files(peer_specs, model=model, draft=draft, gguf=others.gguf, draft_gguf=others.draft_gguf)
    sampling = Settings(sample=sample, temperature=temperature, verify=verify, seed=seed)
    base = replace(sampling, repetitions=repetitions, warmup=warmup, without_penalty=llama is not None)
    settings = [replace(base, max_new_tokens=length, batch_size=size) for length, size in product(lengths, sizes)]
    pair = load_pair(model, draft, loading, translates=not drafting_peers and _all_translate(specs))
    models = Models.of(pair, llama)
    built = build_methods(specs, models, suite.select(limit=1).prompts, settings[0])
    suite = asked.cut(suite, models.tokenizer)
    built += build_routed(router_specs, writer, models)
    built += build_peers(peer_specs, models, suite.prompts, max(lengths))
    harnesses = [Harness(models.target, models.tokenizer, built, one) for one in settings]
    results, was_interrupted = _measure(harnesses, suite.prompts)
    document = make_document(
        results,
        model=models.target,
        model_name=pair.target.name,
        suite_name=suite.name,
        methods=built,
        settings=settings,
        not_available=[one for harness in harnesses for one in harness.missing],
        further={"weights": loading.weights} | ({} if llama is None else describe(llama)),
    )
    (replace(results_in, format="json") if as_json else results_in).write(document, results)
    _exit(results, was_interrupted)


def _all_translate(specs: Mapping[str, MethodSpec]) -> bool:
    """Whether the draft model may have another tokenizer: whatever drafts with it translates."""
    drafters = [spec.drafter for spec in specs.values() if spec.drafter is not None]
    return all(drafter.translates for drafter in drafters if drafter.may_use_draft)


def _measure(harnesses: Sequence[Harness], prompts: list[Prompt]) -> tuple[list[BatchResult], bool]:
    """The results, and whether Ctrl-C cut them short."""
    results: list[BatchResult] = []
    with BenchProgress(err_console, sum(harness.num_calls(prompts) for harness in harnesses)) as progress:
        try:
            for harness in harnesses:
                for result in harness.run(prompts, on_call=progress.note):
                    results.append(result)
                    progress.show(results)
        except KeyboardInterrupt:
            if not results:
                raise SpecdecError("interrupted before the first prompt was measured") from None
            return results, True
    return results, False


def _exit(results: Sequence[BatchResult], was_interrupted: bool) -> None:
    from specdec.bench.report import mismatches

    differences = list(mismatches(results))
    for style, lines in (("yellow", mismatches(results, of_peers=True)), ("red", differences)):
        for line in lines:
            err_console.print(Text(line, style=style), soft_wrap=True)
    if differences:
        raise typer.Exit(NOT_IDENTICAL)
    if was_interrupted:
        err_console.print("interrupted: only the prompts measured until then are reported")
        raise typer.Exit(INTERRUPTED)
