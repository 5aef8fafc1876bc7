"""Trainers of tiny models, and the plain loop that they are compared with."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import get_linear_schedule_with_warmup

from perce import LossConfig, PerceArguments, PerceTrainer
from perce.model.loading import add_adapter
from perce.model.patch import prepare_model
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer

PAIRS = demo_pairs(20)

LOSS = LossConfig(clip_min=0.05, clip_max=5.0)  # a random model's PIR is small: the paper's floor would hide it

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


def arguments(directory, **options):
    defaults = {
        "output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 2, "max_steps": 5,
        "loss": LOSS, "dataloader_pin_memory": False,
    }  # fmt: skip
    return PerceArguments(**(defaults | options))


def model_for(kind="full", dropout=0.0, architecture="llama"):
    model = prepare_model(tiny_model(architecture))
    if kind == "full":
        return model
    torch.manual_seed(1)
    model = add_adapter(model, LoraConfig(**LORA, lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, where the adapters of A would have no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def trainer_for(model, args, pairs=PAIRS, **options):
    return PerceTrainer(
        model, args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer(), **options
    )


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def plain_loss(model, pairs, loss):
    """The paper's formula, one unpadded sequence at a time, full logits."""
    total, count, weights = 0.0, 0, 0.0
    for pair in pairs:
        ids, n = list(pair["input_ids"]), pair["response_length"]
        start, end = pair["persona_span"]
        target = torch.tensor(ids[-n:])[:, None]
        logp = [
            model(input_ids=torch.tensor([sequence])).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, target)[:, 0]
            for sequence in (ids, ids[:start] + ids[end:])
        ]
        weight = plain_weight(model, ids, n, logp, loss)
        total = total - (weight * logp[0]).sum()
        count, weights = count + n, weights + weight.sum()
    return total / (weights if loss.normalize == "batch" else count)


def plain_weight(model, ids, n, logp, loss):
    signal = {"perce": logp[0] - logp[1], "lossce": -logp[0], "ce": torch.ones_like(logp[0])}
    if loss.objective == "ce":
        return signal["ce"]
    if loss.objective == "entce":
        logits = model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1]
        signal["entce"] = torch.distributions.Categorical(logits=logits).entropy()
    return signal[loss.objective].detach().clamp(loss.clip_min, loss.clip_max)


def plain_loop(model, batches, losses, learning_rate=1e-2, warmup=2):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    history = []
    for batch, loss in zip(batches, losses, strict=True):
        value = plain_loss(model, batch, loss)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append([value.item(), norm.item()])
    return history
