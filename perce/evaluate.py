"""python -m perce.evaluate: does a model use the persona, and at what cost? Losses and generated replies.

examples → pairs → losses (with, without, and with another user's persona) → replies → records → intervals
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from perce.config import DataConfig, EvaluateConfig, InferenceConfig, SplitConfig, is_training_option
from perce.options import Options

OPTIONS = Options(
    prog="python -m perce.evaluate",
    description="Evaluate a model on a split: losses with, without and with a wrong persona, on personal and other "
    "tokens; ROUGE, METEOR and persona use of generated replies; bootstrap intervals; comparison of two models.",
    sections={"model": InferenceConfig, "data": DataConfig, "examples": SplitConfig, "evaluate": EvaluateConfig},
    passes_over=is_training_option,
)


@dataclass(frozen=True)
class Config:
    model: InferenceConfig
    data: DataConfig
    examples: SplitConfig
    evaluate: EvaluateConfig


main = OPTIONS.command(Config, lambda config: run(config))


def run(config: Config) -> None:
    """Evaluate, write, print; an interrupted run resumes after its last example."""
    from perce.environment import quiet_libraries
    from perce.files import claim_files

    quiet_libraries()
    options = config.evaluate
    output = Path(options.output).expanduser() if options.output else None
    claim_files([options.output])

    from tqdm import tqdm

    from perce.dataset import make_persona_builder
    from perce.evaluation import Evaluator, plan, texts_key
    from perce.evaluation_report import compare, print_result, read_result, summarise, write_result
    from perce.inference import load, load_split, model_facts, split_seed, training_rows_note
    from perce.metrics import Meteor
    from perce.records import RecordFile

    other = read_result(Path(options.compare_with).expanduser()) if options.compare_with else None
    meteor = Meteor() if options.generate else None
    seed = split_seed(config.examples, config.model.model)
    rows, split = load_split(config.data, config.examples, seed)
    examples: list = list(rows)
    model, tokenizer, device = load(config.model)
    builder = make_persona_builder(tokenizer, config.data, rows.format)
    run_facts = {
        "command": "evaluate", **model_facts(config.model, model), "split": split,
        "split_seed": seed, "examples": len(examples), "texts": texts_key(examples),
        **{name: getattr(options, name) for name in ("generate", "temperature", "max_new_tokens", "seed")},
        **asdict(config.data),
    }  # fmt: skip
    file = RecordFile(None if output is None else output.with_suffix(".jsonl"), run_facts)
    work = plan(examples, builder, config, device)
    evaluator = Evaluator(model, tokenizer, device, options, meteor)
    done = {record["example"] for record in file.records}
    for number, batch in enumerate(tqdm(work.batches, desc="evaluating", unit="batch", leave=False)):
        if not {item.index for item in batch} <= done:
            fresh = evaluator.evaluate(batch, number)
            file.append([record for record in fresh if record["example"] not in done])
    notes = [f"examples: {split}", *training_rows_note(config.data, split), *work.notes]
    result = summarise(file.records, notes, run_facts, meteor.name if meteor else None)
    comparison = compare(file.records, run_facts, other, str(options.compare_with)) if other else None
    if output:
        write_result(output, result, comparison)
    print_result(result, comparison)
    if output:
        print(f"written  {output}, {output.with_suffix('.jsonl')}")


if __name__ == "__main__":
    sys.exit(main())
