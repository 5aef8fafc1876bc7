"""python -m perce.evaluate: whether a model uses the persona, and at what cost, by losses and generated replies.

examples → pairs → losses (with, without, and with another user's persona) → replies → records → intervals
"""

import sys

from perce.config.commands import EVALUATE, EvaluateOptions
from perce.files.outputs import check_writable, write_json
from perce.measuring.records import RecordFile
from perce.visible import say


def run(options: EvaluateOptions) -> None:
    """Evaluate, write and print; an interrupted run is resumed after its last finished example."""
    check_writable(options.evaluate.output)
    with RecordFile(options.evaluate.records) as file:
        evaluate_into(file, options)


def evaluate_into(file: RecordFile, options: EvaluateOptions) -> None:
    """Evaluate the examples that are not in the file yet, and report on all."""
    from tqdm import tqdm

    from perce.data.rows import labels_key, texts_key
    from perce.data.splits import training_rows_note
    from perce.measuring.comparison import check_same, compare, print_comparison, read_result, users_of
    from perce.measuring.evaluation import Evaluator, make_batches
    from perce.measuring.evaluation_report import FORM, cut_replies, print_result, quoting, summarise
    from perce.measuring.inference import load_subject
    from perce.measuring.metrics import ROUGE_NOTE, reply_scorers
    from perce.model.positions import settle_lengths

    wanted = options.evaluate
    other = read_result("--compare_with", wanted.compare_with) if wanted.compare_with else None
    scorers = reply_scorers() if wanted.generate else {}
    subject = load_subject(options, "evaluate", unanswered=wanted.generate)
    examples: list = list(subject.examples)
    facts = subject.facts | {"form": FORM, "examples": len(examples), "texts": texts_key(examples)}
    facts |= {name: getattr(wanted, name) for name in ("generate", "temperature", "max_new_tokens", "seed")}
    work = make_batches(examples, subject, options)
    if other:
        ours = {item.key: item.example.user_id for item in work.items}
        check_same(ours, users_of(other), f"--compare_with {wanted.compare_with}")
    file.begin(facts | {"labels": labels_key(examples)})
    reply = wanted.max_new_tokens if wanted.generate else 0
    settle_lengths(subject.model, lambda: work.longest(reply))
    evaluator = Evaluator(subject.model, subject.tokenizer, subject.device, wanted, scorers, subject.sharing)
    done = {record["example"] for record in file.records}
    for batch in tqdm(work.batches, desc="evaluating", unit="batch", leave=False):
        for records in evaluator.evaluate(batch, done):
            file.append(records)
    notes = [f"examples: {subject.split}", *training_rows_note(options.data, subject.split), *work.notes]
    notes += [*cut_replies(file.records, wanted.max_new_tokens), *quoting(file.records)]
    notes += [ROUGE_NOTE] if scorers else []
    result = summarise(file.records, notes, facts)
    comparison = compare({"this result": result}, {str(wanted.compare_with): other}) if other else None
    if wanted.output:
        write_json(wanted.output, result | ({"comparison": comparison} if comparison else {}))
    print_result(result)
    if comparison:
        say("")
        print_comparison(comparison)
    if wanted.output:
        say(f"written  {wanted.output}, {wanted.records}")


main = EVALUATE.main(run)

if __name__ == "__main__":
    sys.exit(main())
