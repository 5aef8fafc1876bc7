"""What `python -m perce.score` shows of its records: terminal, HTML page, JSON summary."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from perce.config.commands import ScoreOptions
from perce.config.options import number
from perce.config.schema import WeightingConfig
from perce.config.yaml_file import read_yaml
from perce.data.rows import Example
from perce.files.outputs import write_json, written
from perce.files.runs import CONFIG_NAME, run_directory
from perce.measuring.identification import Identified
from perce.report.heatmap import Cells, Histogram, ScoredResponse, ScoredToken, terminal_text
from perce.report.page import Weighed, write_page
from perce.report.terminal import Console, facts, plain, show, table

BINS = 21  # of the histogram, between the clip's ends: 0.2 nats each for PerCE's own
BINS_BELOW, BINS_ABOVE = 14, 5
TOP_TOKENS = 20
CONTEXT_TOKENS = 6  # before a token in the list of the most personal ones

Records = Sequence[dict[str, Any]]


def means(records: Records, options: ScoreOptions) -> dict[str, float]:
    """Means over all response tokens of the records."""
    logp, logp_cf, pir, weight = (
        np.concatenate([record[name] for record in records]) for name in ("logp", "logp_cf", "pir", "weight")
    )
    found = {
        "examples": len(records), "tokens": len(logp), "loss_with_persona": float(-logp.mean()),
        "loss_without_persona": float(-logp_cf.mean()), "pir_mean": float(pir.mean()),
        "weight_mean": float(weight.mean()),
    }  # fmt: skip
    if options.score.weighting.signal:
        found["frac_at_floor"], found["frac_at_ceiling"] = _at_the_ends(records, options)
    return found


def _at_the_ends(records: Records, options: ScoreOptions) -> tuple[float, float]:
    """Shares of the tokens at or below the clip's lower end, and at or above its upper one."""
    tint, (low, high) = np.concatenate([_tint(record, options) for record in records]), _clip(options)
    return float((tint <= low).mean()), float((tint >= high).mean())


def _tint(record: Mapping[str, Any], options: ScoreOptions) -> np.ndarray:
    """What the tints of a record's tokens are clipped from: the signal, or PIR if every weight is 1. In fp32, as the
    weights were computed."""
    return np.asarray(record["signal" if options.score.weighting.signal else "pir"], dtype=np.float32)


def _clip(options: ScoreOptions) -> tuple[float, float]:
    return options.score.weighting.clip_min, options.score.weighting.clip_max


def _lines(records: Records, options: ScoreOptions, left_out: Sequence[str]) -> list[tuple[str, str]]:
    m = means(records, options)
    ends = [("tinted by", f"PerCE's weight, {options.score.weighting.reported}")]
    if options.score.weighting.signal:
        ends = [("at the floor", f"{m['frac_at_floor']:.1%}"), ("at the ceiling", f"{m['frac_at_ceiling']:.1%}")]
    return [
        ("weights", _weights(options)), ("examples", f"{m['examples']:,}"), ("response tokens", f"{m['tokens']:,}"),
        ("loss with persona", f"{m['loss_with_persona']:.4f}"),
        ("loss without persona", f"{m['loss_without_persona']:.4f}"), ("mean PIR", f"{m['pir_mean']:+.4f}"),
        ("mean weight", f"{m['weight_mean']:.3f}"), *ends, *(("data", note) for note in left_out),
    ]  # fmt: skip


def _weights(options: ScoreOptions) -> str:
    """What tokens are weighted by; of a model of a run, compared with what it trained with."""
    score, run = options.score, run_directory(options.model.model)
    if run is None:
        return str(score.weighting)
    saved = read_yaml(str(run / CONFIG_NAME), "--model")
    own = WeightingConfig(**{x.name: number(saved[x.name]) for x in fields(WeightingConfig) if x.name in saved})
    if (own.objective, str(own.weighting)) != (score.objective, str(score.weighting)):
        return f"{score.weighting}; those of the run: {own.weighting}"
    normalize, schedule, estimate = (saved.get(name) for name in ("normalize", "clip_schedule", "estimate"))
    later = [f"normalisation over each {normalize}"] * (normalize in ("batch", "sequence"))
    later += [f"{schedule} clip"] * (schedule in ("rising", "falling")) + ["permutation"] * bool(score.entry.over_step)
    when = {"epoch": "; it estimated them once per epoch", "frozen": "; it estimated them once, before training"}
    found = f"{score.weighting}, as in the run{' before its ' * bool(later)}{' and '.join(later)}"
    return found + when.get(str(estimate), "")


def print_tokens(records: Records, options: ScoreOptions) -> None:
    """Responses in colour, as soon as they are scored."""
    console = Console(highlight=False)
    for record in records:
        text = terminal_text(_tokens(record, options), _clip(options))
        console.print(plain(f"{record['source']}  {record['user_id'] or ''}".rstrip(), "dim"))
        console.print(text, "", sep="\n")


def print_summary(
    records: Records, found: Identified | None, options: ScoreOptions, left_out: Sequence[str]
) -> None:  # fmt: skip
    show(facts(_lines(records, options, left_out)), "")
    if found:
        identified = _identification_table(found)
        methods = table(*identified.header)
        for row in identified.rows:
            methods.add_row(*row)
        show(identified.note, methods, "")


def write_summary(
    path: str, records: Records, found: Identified | None, options: ScoreOptions, left_out: Sequence[str]
) -> None:  # fmt: skip
    """JSON of the means and, with labels, of every method."""
    score, model = options.score, options.model
    content: dict[str, Any] = {
        "kind": "perce.score", "model": model.model or "default", "data": options.data.data or "built-in",
        "objective": score.objective, "signal": score.weighting.signal_name,
        "clip": _clip(options) if score.weighting.signal else None,
        **means(records, options), "left_out": left_out,
    }  # fmt: skip
    if found:
        methods = {name: asdict(result) for name, result in found.methods.items()}
        content["identification"] = {"labelled": found.labelled, "marked": found.marked, "methods": methods}
    write_json(path, content)


def write_report(
    path: Path,
    records: Records,
    examples: Sequence[Example],
    found: Identified | None,
    options: ScoreOptions,
    split: str,
    left_out: Sequence[str],
) -> None:
    """The HTML page: means, histogram, most personal tokens, token identification, users, and the first responses."""
    responses = [
        ScoredResponse(
            persona=tuple(examples[record["example"]].persona[i] for i in record["passages"]),
            turns=tuple((turn.role, turn.content) for turn in examples[record["example"]].turns),
            passes={"response": _tokens(record, options)},
            user_id=record["user_id"],
            source=record["source"],
        )
        for record in records
        if record["example"] < len(examples)
    ]
    panels: list[Histogram | Cells] = [_histogram(records, options), _most_personal(records)]
    if found:
        panels.append(_identification_table(found))
    summary = [
        ("model", options.model.model or "SmolLM2-135M-Instruct"),
        ("data", f"{options.data.data or 'built-in examples'}, {split}"),
        *_lines(records, options, left_out),
    ]
    weighed = Weighed(options.score.entry, options.score.weighting)
    with written(path):
        write_page(
            path, responses, title=weighed.title, summary=summary, panels=panels, scored=len(records), weighed=weighed
        )  # fmt: skip


def _tokens(record: dict[str, Any], options: ScoreOptions) -> list[ScoredToken]:
    tint = _tint(record, options)
    columns = [record[name] for name in ("response_tokens", "logp", "logp_cf")]
    columns += [tint.tolist(), tint.clip(*_clip(options)).tolist()]
    return [ScoredToken(*values) for values in zip(*columns, strict=True)]


def _histogram(records: Records, options: ScoreOptions) -> Histogram:
    """Of what the tints are clipped from, if finite, in bins that the clip's ends fall on the edges of."""
    signal, clip = np.concatenate([_tint(record, options) for record in records]), _clip(options)
    signal = signal[np.isfinite(signal)]
    width = (min(clip[1], signal.max(initial=clip[0])) - clip[0]) / BINS or 0.2
    below = min(int(np.ceil((clip[0] - signal.min(initial=clip[0])) / width)), BINS_BELOW)
    edges = clip[0] + width * np.arange(-below, BINS + BINS_ABOVE + 1)
    counts, _ = np.histogram(np.clip(signal, edges[0], edges[-1]), edges)
    name, shares = options.score.weighting.reported.signal_name, _at_the_ends(records, options)
    return Histogram(name, [round(float(e), 6) for e in edges], counts.tolist(), shares)


def _most_personal(records: Records) -> Cells:
    """The tokens with the highest PIR, each with the words before it: where to look for what PIR gets wrong."""
    every = [
        (pir, record["source"], record["response_tokens"], place)
        for record in records
        for place, pir in enumerate(record["pir"])
        if np.isfinite(pir)
    ]
    top = sorted(every, key=lambda entry: -entry[0])[:TOP_TOKENS]
    rows = [
        (f"{pir:.2f}", tokens[at].strip() or "␣", "".join(tokens[max(at - CONTEXT_TOKENS, 0) : at]).strip(), source)
        for pir, source, tokens, at in top
    ]
    return Cells("Highest PIR", ("PIR", "token", "after", "row"), rows)


def _identification_table(found: Identified) -> Cells:
    rows = [
        (name, f"{x.auc:.3f}", f"{x.f1:.3f}", f"{x.precision:.3f}", f"{x.recall:.3f}", f"{x.threshold:.2f}")
        for name, x in found.methods.items()
    ]
    labels = "marked by hand"
    if found.marked < found.examples:
        marked = f"{labels} in {found.marked:,} of {found.examples:,} examples, elsewhere " if found.marked else ""
        labels = f"{marked}words that occur in the persona but not in the conversation"
    note = f"{found.labelled:,} of {found.tokens:,} tokens are personal: {labels}. F1 at the best threshold."
    return Cells("Token identification", ("method", "AUC", "F1", "precision", "recall", "threshold"), rows, note)
