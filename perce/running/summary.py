"""The output of a run: the lines at its start, the progress while it runs, the report and the table at its end."""

import itertools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from perce.config.commands import TrainOptions
from perce.data.rows import Document
from perce.data.sharing import Sharing
from perce.data.splits import RunPairs
from perce.data.stream import PairStream
from perce.errors import first_line
from perce.files.outputs import in_one_move
from perce.measuring.scores import scored_tokens
from perce.model.auxiliary import Router
from perce.model.passes import TokenStatistics
from perce.model.positions import needs_long_factors, switch_length
from perce.model.reach import beside_text
from perce.report.curves import write_curves
from perce.report.heatmap import ScoredResponse
from perce.report.page import Weighed, write_page
from perce.report.terminal import facts, show, table
from perce.running.diagnosis import best_evaluation
from perce.training.arguments import PerceArguments
from perce.training.best import is_evaluated, kept_step, kept_weights
from perce.training.checkpoints import disk_errors
from perce.training.datasets import longest_sequence
from perce.training.divergence import check_logged
from perce.training.meters import peak_memory_mib
from perce.training.shared import counted
from perce.training.trainer import PerceTrainer
from perce.visible import say

LOSSES = {
    "loss_with_persona": "loss with persona",
    "loss_without_persona": "loss without persona",
    "loss_personal_tokens": "loss on personal tokens",
    "pir_mean": "mean PIR",
}
DOCUMENT_LOSSES = {
    "loss_with_persona": "loss, long context",
    "loss_without_persona": "loss, short context",
    "pir_mean": "mean log-ratio",
}
BAR = ("on_train_begin", "on_step_end", "on_prediction_step", "on_train_end")  # events of the progress bar alone
COUNTED_BATCHES = 50  # batches whose tokens are counted before training, in a second or two
SHOWN_TOKENS = 1500  # tokens of a document that the report shows: its end, where long and short context differ


def loss_labels(format: str) -> dict[str, str]:
    """Names of the evaluation's numbers for rows of this format; in documents the long context is the "persona"."""
    return DOCUMENT_LOSSES if format == "text" else LOSSES


class Progress(ProgressCallback):
    """The Trainer's progress bar with one readable line per log; keeps the first and the latest evaluation.

    The first is also kept on disk, so that a resumed run shows the same "before".
    """

    def __init__(self, output_dir: Path, labels: Mapping[str, str]) -> None:
        super().__init__()
        self.labels = labels
        self.evaluated_at = -1
        self.after: dict[str, float] = {}
        self._first = output_dir / "before.pt"
        # Of the evaluation before training; empty if there was none (eval_on_start false).
        self.before: dict[str, float] = {}
        self.before_by_token: list[TokenStatistics] = []
        self._trainer: PerceTrainer | None = None

    def attach(self, trainer: PerceTrainer, resumed: bool) -> None:
        """Replace the Trainer's own reporters; in a run that is resumed, read the first evaluation."""
        self._trainer = trainer
        if trainer.args.disable_tqdm:
            for event in BAR:
                setattr(self, event, lambda *_, **__: None)
        if resumed and trainer.is_world_process_zero() and self._first.is_file():
            self._read_first()
        for default in (ProgressCallback, PrinterCallback):
            for callback in [x for x in trainer.callback_handler.callbacks if type(x) is default]:
                trainer.remove_callback(callback)

    def _read_first(self) -> None:
        """The first evaluation from the disk. If the file is damaged, stderr says so, and the run continues without."""
        try:
            with zipfile.ZipFile(self._first) as archive:
                if part := archive.testzip():  # torch does not look at the checksums
                    raise ValueError(f"{part} has changed")
            saved = torch.load(self._first, weights_only=True)
            statistics = [TokenStatistics(**fields) for fields in saved["statistics"]]
            self.before, self.before_by_token = saved["metrics"], statistics
        except Exception as error:  # whatever damage raises
            say(f"{self._first}: damaged ({first_line(error)}); no numbers from before training are shown.", error=True)

    def before_and_after(self) -> dict[str, list[float]]:
        """The validation's numbers by label: before training if it was evaluated then, and after."""
        parts = [part for part in (self.before, self.after) if part]
        return {label: [part[f"eval_{name}"] for part in parts] for name, label in self.labels.items()}

    def evaluate_what_is_saved(self, trainer: PerceTrainer) -> None:
        """Evaluate the weights as they are after training, if their numbers are not known yet.

        If they are those of an earlier step, the best, their numbers are not logged: at the last step the log and the
        curves have the last weights' numbers. Numbers that a resumed run's log already has are not logged again.
        """
        best = kept_step(trainer) is not None
        if best or (self.evaluated_at != trainer.state.global_step and is_evaluated(trainer.state)):
            self.after = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").metrics or {}
            super().on_evaluate(trainer.args, trainer.state, trainer.control)  # closes the bar
            check_logged(trainer, self.after)
        elif self.evaluated_at != trainer.state.global_step:
            trainer.evaluate()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        self.after, self.evaluated_at = kwargs["metrics"], state.global_step
        if state.global_step == 0 and state.is_world_process_zero and self._trainer:
            self.before, self.before_by_token = self.after, self._trainer.last_evaluation
            statistics = [vars(example) for example in self.before_by_token]
            with disk_errors(self._first.parent), in_one_move(self._first) as unfinished:
                torch.save({"metrics": self.after, "statistics": statistics}, unfinished)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = _evaluation_line(logs, self.labels) if "eval_loss_with_persona" in logs else _training_line(logs)
        if line:
            write = say if self.training_bar is None else self.training_bar.write
            write(f"step {state.global_step:>5}  {line}")


def _training_line(logs: Mapping[str, float]) -> str:
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4f}"]
    if "weight_mean" in logs:
        parts += [
            f"ce {logs['ce']:.4f}", *([f"PIR {logs['pir_mean']:+.3f}"] if "pir_mean" in logs else []),
            f"weight {logs['weight_mean']:.3f}", f"floor {logs['frac_at_floor']:.0%}",
            f"ceiling {logs['frac_at_ceiling']:.1%}",
        ]  # fmt: skip
    if "router_aux_loss" in logs:
        parts.append(f"router {logs['router_aux_loss']:.3f}")
    parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['peak_memory_mib'] / 1024:.1f} GiB"]
    return "  ".join(parts)


def _evaluation_line(logs: Mapping[str, float], labels: Mapping[str, str]) -> str:
    return "validation  " + "  ".join(f"{label} {logs[f'eval_{name}']:.4f}" for name, label in labels.items())


def describe_run(
    config: TrainOptions, model: nn.Module, args: TrainingArguments, pairs: RunPairs, router: Router | None,
    sharing: Sharing,
) -> None:  # fmt: skip
    """Print what is about to be trained, on which data, and everything that was left out of the data."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = f"LoRA r {config.model.lora_r}" if config.model.lora_r else "all weights"
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    say(
        f"model  {config.model.model or 'SmolLM2-135M-Instruct (default)'}: {total / 1e6:,.1f} M parameters, "
        f"{trained / 1e6:,.1f} M trained ({method}), "
        f"{str(dtype).removeprefix('torch.')}{' weights, bf16 autocast' if args.bf16 else ''} on {args.device}"
    )
    if beside := beside_text(model):
        millions = sum(beside.values()) / 1e6
        say(f"       no text reaches {', '.join(beside)} ({millions:,.1f} M parameters): not trained")
    size = f"{len(pairs.train):,}" if isinstance(pairs.train, Dataset) else "a stream of"
    used = len(set(pairs.validation["example"]))  # a long document is several pairs
    validated = f"{used:,} of {pairs.uncut:,}" if pairs.uncut else f"{len(pairs.validation):,}"
    say(
        f"data   {config.data.data or 'built-in examples'} ({pairs.format}): {size} training and "
        f"{validated} validation examples"
    )
    for note in pairs.notes:
        say(f"       {note}")
    longest = longest_sequence({"train": pairs.train, "validation": pairs.validation}, config.data.max_length)
    if needs_long_factors(model.config, longest):
        say(
            f"       sequences have up to {longest:,} tokens, beyond {switch_length(model.config):,}: the position "
            "encoding (longrope) uses its long factors for all of them, also for short ones"
        )
    tokens = config.run.tokens_per_batch
    balance = f" + {router.coefficient:g} × the router's load-balancing loss" if router else ""
    one = "sequences" if sharing == "none" else "replies"
    forward = f"{tokens:,} tokens" if tokens else f"{args.per_device_train_batch_size} {one}"
    say(
        f"run    {args.output_dir}: {config.loss.objective} objective (weights: {config.loss.weighting}){balance}, "
        f"learning rate {args.learning_rate:g}, "
        f"{forward} per forward pass × {args.gradient_accumulation_steps} passes per step"
        f"{f' × {args.world_size} processes' if args.world_size > 1 else ''}"
    )


def describe_sharing(trainer: PerceTrainer) -> None:
    """Print what the replies of a conversation share, and what that saves in the first batches."""
    dataset, sharing, reason = trainer.train_dataset, trainer.sharing, trainer.not_all_shared
    saved = ""
    if sharing != "none" and isinstance(dataset, Dataset):
        loader: Any = trainer.get_train_dataloader()
        first = list(itertools.islice(loader.batch_sampler, COUNTED_BATCHES))
        loss = trainer.args.loss
        both = loss.entry.counterfactual and loss.estimate == "online"
        tokens = counted(first, dataset, trainer.data_collator, both)
        which = f"the first {len(first)} of {len(loader)} batches" if len(first) < len(loader) else "an epoch"
        saved = f": in {which} {tokens}; {tokens.alone:,} of {tokens.replies:,} replies share none"
    if sharing != "none":
        how = {"chains": "earlier ones that they begin with", "branches": "the tokens that they begin with"}[sharing]
        if (memory := trainer.args.memory).share_persona:
            who, how = f"up to {memory.share_persona} requests of a persona", "the tokens that they begin with"
        else:
            who = "replies of a conversation"
        say(f"share  {who} share {how}{saved}")
    if sharing == "none" and trainer.args.memory.share_persona > 1:
        reason = reason or "no two prompts are the same up to the persona's end (passages may be picked for each)"
    if reason:
        say(f"{'share  nothing' if sharing == 'none' else '       no more'}: {reason}")


def write_run_report(
    output_dir: Path, config: TrainOptions, trainer: PerceTrainer, pairs: RunPairs, progress: Progress
) -> None:  # fmt: skip
    """curves.png and report.html."""
    log = trainer.state.log_history
    write_curves(output_dir / "curves.png", log, documents=pairs.format == "text", marked=_marked(trainer))
    statistics = {"before training": progress.before_by_token, "after training": trainer.last_evaluation}
    scored = {name: {x.example: x for x in examples} for name, examples in statistics.items() if examples}
    evaluated = sorted(set.intersection(*(set(by_example) for by_example in scored.values())))
    shown = evenly_spread(evaluated, config.run.report_examples)
    has_passages = "passages" in pairs.validation.column_names  # documents have none
    passages = dict(zip(pairs.validation["example"], pairs.validation["passages"], strict=True)) if has_passages else {}
    responses = []
    for index in shown:
        example = pairs.examples[index]
        passes = {name: scored_tokens(by[index], trainer.processing_class) for name, by in scored.items()}
        if isinstance(example, Document):
            ends = {name: tokens[-SHOWN_TOKENS:] for name, tokens in passes.items()}
            responses.append(ScoredResponse((), (), ends, example.user_id, example.source))
            continue
        turns = tuple((turn.role, turn.content) for turn in example.turns)
        persona = tuple(example.persona[i] for i in passages[index])
        responses.append(ScoredResponse(persona, turns, passes, example.user_id, example.source))
    summary = [
        ("model", config.model.model or "SmolLM2-135M-Instruct"),
        ("data", config.data.data or "built-in examples"),
        ("objective", config.loss.objective),
        ("steps", str(trainer.state.global_step)),
        *([("saved", kept)] if (kept := kept_weights(trainer)) else []),
        *(
            (label, " → ".join(f"{value:.4f}" for value in values))
            for label, values in progress.before_and_after().items()
        ),
    ]
    weighed = Weighed(config.loss.entry, config.loss.weighting, documents=pairs.format == "text")
    if weighed.documents:
        summary.append(("persona", f"here: all that stands more than about {config.loss.short_context} tokens back"))
        summary.append(("shown", f"the last {SHOWN_TOKENS:,} tokens of a document at most"))
    write_page(
        output_dir / "report.html", responses, title=weighed.title, summary=summary, scored=len(evaluated),
        weighed=weighed,
    )  # fmt: skip


def _marked(trainer: PerceTrainer) -> tuple[int, str] | None:
    """The step that the curves mark: that of the saved weights, or of the best of several evaluations."""
    if (kept := kept_step(trainer)) is not None:
        return kept, "saved"
    log = trainer.state.log_history
    best = best_evaluation(log)
    return (best[0], "lowest validation loss") if best and sum("eval_loss" in line for line in log) > 1 else None


def evenly_spread(indices: Sequence[int], count: int) -> list[int]:
    """`count` of the indices, or all: three of eight are the first, the third and the sixth."""
    count = min(count, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def left_out_of_stream(pairs: RunPairs, args: PerceArguments) -> list[str]:
    """What a stream has left out, if this process has read it itself."""
    if not isinstance(pairs.train, PairStream):
        return []
    if args.dataloader_num_workers:
        return ["not counted: other processes (--dataloader_num_workers) read the stream"]
    return pairs.train.source.notes(
        f" (in this process's share, one of {args.world_size})" if args.world_size > 1 else ""
    )


def print_result(
    output_dir: Path, trainer: PerceTrainer, pairs: RunPairs, progress: Progress, findings: Sequence[str],
    computed: tuple[int, int], *, resumed: bool,
) -> None:  # fmt: skip
    """Print the table at the end, and what its numbers mean."""
    losses = table("validation", "before", "after", "change")
    for name, label in progress.labels.items():
        old, new = progress.before.get(f"eval_{name}"), progress.after[f"eval_{name}"]
        earlier = ("not evaluated", "") if old is None else (f"{old:.4f}", f"{new - old:+.4f}")
        losses.add_row(label, earlier[0], f"{new:.4f}", earlier[1])
    kept, seconds, loss = kept_weights(trainer), trainer.training_seconds, trainer.args.loss
    rows = [("saved", kept)] if kept else []
    if seconds:
        rows += [("training", f"{trainer.tokens_seen / seconds:,.0f} tokens/s per process")]
    if seconds and (estimation := trainer.estimation_clock.seconds()):
        what = loss.entry.cost if loss.estimate == "online" else "estimating the weights"
        rows.append((what, f"{estimation / seconds:.1%} of the training time"))
    if trainer.sharing != "none":
        since = " since the run was resumed" if resumed else ""
        rows.append(("computed", f"{computed[0]:,} tokens for {computed[1]:,} tokens of examples{since}"))
    rows += [("data", note) for note in left_out_of_stream(pairs, trainer.args)]
    rows.append(("peak memory", f"{peak_memory_mib(trainer.args.device) / 1024:.2f} GiB"))
    files = {
        "model": "", "report": "report.html", "curves": "curves.png", "options": "config.yaml",
        "log": "trainer_state.json",
    }  # fmt: skip
    rows += [(label, str(output_dir / name)) for label, name in files.items()]
    show("", losses, "", facts(rows))
    if findings:
        show("", facts(("note", text) for text in findings))
