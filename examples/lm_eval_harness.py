"""lm-evaluation-harness on an enabled model: the same score as without speculation, in less time.

python examples/lm_eval_harness.py [MODEL]     # needs: pip install lm_eval
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import specdec
from specdec.models import load

# a task of its own, so that nothing is fetched; names of the harness's tasks go into `tasks=` as they are
QUESTIONS = ("red green blue", "one two three four", "north east south west", "alpha beta gamma")
TASK = """
task: copy_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "Words: {{{{words}}}}\\nWords: {{{{words}}}}\\nWords:"
doc_to_target: " {{{{words}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""


def evaluate(harness_model: HFLM, folder: str) -> tuple[float, list[str]]:
    found = TaskManager(include_path=folder, include_defaults=False)
    results = lm_eval.simple_evaluate(harness_model, tasks=["copy_words"], task_manager=found, bootstrap_iters=0)
    texts = [sample["resps"][0][0] for sample in results["samples"]["copy_words"]]
    return results["results"]["copy_words"]["exact_match,none"], texts


def main() -> None:
    model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "words.jsonl"
        file.write_text("".join(json.dumps({"words": words}) + "\n" for words in QUESTIONS))
        (Path(folder) / "copy_words.yaml").write_text(TASK.format(file=file))
        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        scores = []
        for is_enabled in (False, True):
            if is_enabled:
                specdec.enable(model)
            started = time.perf_counter()
            scores.append(evaluate(harness_model, folder))
            seconds = time.perf_counter() - started
            print(f"{'specdec' if is_enabled else 'plain'}: {scores[-1][0]:.2f} in {seconds:.1f} s")
    print("the same score and answers:", scores[0] == scores[1])


if __name__ == "__main__":
    main()
