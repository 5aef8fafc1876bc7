"""python -m perce.score: which tokens of a reply are personal according to PerContrast, for any model and data.

examples → pairs → both passes → records (JSON lines) → heat maps, histogram, means, token identification
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

from perce.config.commands import SCORE, ScoreOptions
from perce.errors import UserError
from perce.files.outputs import check_writable
from perce.measuring.records import RecordFile
from perce.visible import say


def run(options: ScoreOptions) -> None:
    """Score the examples, write what was asked for, and print a summary."""
    score = options.score
    check_writable(score.output, score.summary, str(score.exported or "") or None)
    with RecordFile(Path(score.jsonl).expanduser() if score.jsonl else None) as file:
        score_into(file, options)


def score_into(file: RecordFile, options: ScoreOptions) -> None:
    """Score the examples that are not in the file yet, and report on all."""
    from perce.measuring.exports import write_export
    from perce.measuring.identification import identify
    from perce.measuring.inference import load_subject
    from perce.measuring.score_report import print_summary, print_tokens, write_report, write_summary
    from perce.measuring.scores import FORM, scored

    subject, score = load_subject(options, "score"), options.score
    weighting = score.weighting
    facts = {"labels": score.labels, "signal": weighting.signal_name, "sample": options.examples.sample}
    facts |= {"clip_min": weighting.clip_min, "clip_max": weighting.clip_max}
    file.begin(subject.facts | facts | {"form": FORM})
    shown: list[Any] = list(islice(subject.examples, score.shown))
    limit = options.examples.limit
    records = [record for record in file.records if limit is None or record["example"] < limit]
    print_tokens(records[: score.terminal], options)
    for fresh in scored(subject, records[:], options):
        print_tokens(fresh[: max(score.terminal - len(records), 0)], options)
        file.append(fresh)
        records += fresh
    if not records:
        raise UserError(subject.source.nothing_left())
    found, left_out = identify(records) if score.labels else None, subject.left_out
    print_summary(records, found, options, left_out)
    if score.summary:
        write_summary(score.summary, records, found, options, left_out)
    if score.output:
        write_report(Path(score.output).expanduser(), records, shown, found, options, subject.split, left_out)
    if score.exported:
        write_export(score.exported, records, subject.tokenizer)
    for path in filter(None, (score.output, score.jsonl, score.summary, score.exported)):
        say(f"written  {path}")


main = SCORE.main(run)

if __name__ == "__main__":
    sys.exit(main())
