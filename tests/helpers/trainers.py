"""Trainers of tiny models, and the plain loop that they are compared with."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import get_linear_schedule_with_warmup

from perce import LossConfig, PerceArguments, PerceTrainer
from perce.model.loading import add_adapter
from perce.model.memory import CHECKPOINTING
from perce.model.patch import prepare_model
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer, with_drawn_adapter

PAIRS = demo_pairs(20, facts=1)

LOSS = LossConfig(clip_min=0.05, clip_max=5.0)  # a random model's PIR is small, so the paper's floor would hide it

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


def arguments(directory, **options):
    defaults = {
        "output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 2, "max_steps": 5,
        "loss": LOSS, "dataloader_pin_memory": False,
    }  # fmt: skip
    return PerceArguments(**(defaults | options))


def model_for(kind="full", dropout=0.0, architecture="llama", **changes):
    model = prepare_model(tiny_model(architecture, **changes))
    if kind == "full":
        return model
    torch.manual_seed(1)
    return with_drawn_adapter(add_adapter(model, LoraConfig(**LORA, lora_dropout=dropout)), std=0.02)


def trainer_for(model, args, pairs=PAIRS, **options):
    return PerceTrainer(
        model, args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer(), **options
    )


def trained(tmp_path, model, checkpointing=False, **options):
    """A trainer of the model after one step."""
    trainer = trainer_for(model, arguments(tmp_path, max_steps=1, **{CHECKPOINTING: checkpointing}, **options))
    trainer.train()
    return trainer


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def plain_statistics(model, pair):
    """(logp, logp_cf, entropy) of one example's response, each (n,), from one unpadded sequence at a time, full logits;
    for a document, logp_cf is computed window by window."""
    ids, n = list(pair["input_ids"]), pair["response_length"]
    start, end = pair.get("persona_span", (0, 0))
    pieces = [(ids[a:b], count) for a, b, count in pair.get("windows", [])] or [(ids[:start] + ids[end:], n)]

    def logits(sequence, count):
        return model(input_ids=torch.tensor([sequence])).logits[0, -count - 1 : -1]

    def logp(z, target):
        return z.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]

    factual = logits(ids, n)
    with torch.no_grad():
        logp_cf = torch.cat([logp(logits(piece, count), piece[-count:]) for piece, count in pieces])
    return logp(factual, ids[-n:]), logp_cf, torch.distributions.Categorical(logits=factual.detach()).entropy()


def pir(logp, logp_cf, *_):
    return logp - logp_cf


def plain_loss(model, pairs, loss, formula=pir, step=0):
    """−Σ w·logp / n with w = clip(formula(logp, logp_cf, entropy, personal)) over the tokens of a step. Formula "1" is
    plain cross-entropy; the second of a pair is applied to (signals, seed of the step). Weights of the data multiply
    w."""
    logp, logp_cf, entropy = map(torch.cat, zip(*(plain_statistics(model, pair) for pair in pairs), strict=True))
    data = torch.cat([torch.full((pair["response_length"],), pair.get("data_weight", 1.0)) for pair in pairs])
    if formula == "1":
        return -(data * logp).mean()
    formula, *rearrange = formula if isinstance(formula, tuple) else (formula,)
    personal = torch.tensor([flag for pair in pairs for flag in pair["personal"]])
    signal = formula(logp.detach(), logp_cf, entropy, personal)
    for over_step in rearrange:
        signal = over_step(signal, 42 * 1_000_003 + step)  # computed from the run's seed and the step
    weight = signal.clamp(loss.weighting.clip_min, loss.weighting.clip_max)
    if loss.normalize == "sequence":
        parts = weight.split([pair["response_length"] for pair in pairs])
        weight = torch.cat([part / part.mean() for part in parts])
    return -(data * weight * logp).sum() / (weight.sum() if loss.normalize == "batch" else len(logp))


def plain_loop(model, batches, losses, learning_rate=1e-2, warmup=2, formula=pir):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    history = []
    for step, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        value = plain_loss(model, batch, loss, formula, step)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append([value.item(), norm.item()])
    return history
