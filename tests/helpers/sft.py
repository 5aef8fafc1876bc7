"""A few steps of other libraries' trainers, and of a plain loop on full logits with its own search for row tokens."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from perce.config.prompt import SYSTEM_MESSAGE
from perce.demo import DATA_DIR
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.trainers import LORA

STEPS, BATCH, RATE = 3, 4, 0.5
CLIP = 0.05, 5.0  # a random model's PIR is small, so the paper's floor would hide it
TEMPLATE = (  # marks assistant text, as assistant_only_loss needs it, and has a system prompt of its own
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = tiny_tokenizer(TEMPLATE)


def message(role, content):
    return {"role": role, "content": content}


def rows_of(kind, count=STEPS * BATCH):
    """Rows in one of TRL's formats, with a persona of two entries."""
    rows = []
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for row in [row for row in map(json.loads, lines) if "query" in row][:count]:
        said = [message("user", row["query"]), message("assistant", row["response"])]
        if kind == "completion":
            rows.append({"prompt": said[:1], "completion": said[1:]})
        elif kind == "completion-text":
            rows.append({"prompt": row["query"] + "\n", "completion": row["response"]})
        elif kind == "text":
            rows.append({"text": row["response"]})
        elif kind == "conversations":
            names = {"user": "human", "assistant": "gpt"}
            rows.append({"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in said]})
        else:  # a conversation of several turns with its own system message
            again = [message("user", "And then?"), message("assistant", row["response"][:24][::-1])]
            rows.append({"messages": [message("system", "You are Ana."), *said, *again]})
        rows[-1]["persona"] = row["persona"][:2]
    return rows


KINDS = {
    "conversation": {}, "assistant": {"assistant_only_loss": True}, "completion": {}, "completion-text": {}, "text": {},
    "all of a completion": {"completion_only_loss": False},
}  # fmt: skip
"""Kinds of rows that need different handling, by name; assistant: conversations."""


def block_of(persona):
    return "" if not persona else "About the user:\n" + "".join(f"- {entry}\n" for entry in persona) + "\n"


def told(messages, block):
    own = messages[0]["content"] if messages[0]["role"] == "system" else SYSTEM_MESSAGE
    return [message("system", block + own), *[m for m in messages if m["role"] != "system"]]


def ids_of(messages, **options):
    return TOKENIZER.apply_chat_template(messages, return_dict=False, **options)


def tokens_of(row, kind, block):
    """(ids, positions of the tokens with a loss) of a row with this persona block."""
    if kind == "text":
        ids = TOKENIZER(block + row["text"] + "<|im_end|>")["input_ids"]
        return ids, range(len(TOKENIZER(block)["input_ids"]) + 1, len(ids))
    if kind == "completion-text":
        before = TOKENIZER(block + row["prompt"])["input_ids"]
        ids = TOKENIZER(block + row["prompt"] + row["completion"] + "<|im_end|>")["input_ids"]
        return ids, range(len(before), len(ids))
    if kind == "completion":
        before, whole = told(row["prompt"], block), told(row["prompt"] + row["completion"], block)
        ids = ids_of(whole)
        return ids, range(len(ids_of(before, add_generation_prompt=True)), len(ids))
    messages = told(row["prompt"] + row["completion"] if "prompt" in row else row["messages"], block)
    ids = ids_of(messages)
    if kind == "assistant":
        places = []
        for i, said in enumerate(messages):
            if said["role"] == "assistant":
                begin = len(ids_of(messages[:i], add_generation_prompt=True))
                places += range(begin, len(ids_of(messages[: i + 1])))
        return ids, places
    start, persona = len(TOKENIZER("<|im_start|>system\n")["input_ids"]), len(TOKENIZER(block)["input_ids"])
    return ids, [*range(1, start), *range(start + persona, len(ids))]


def logp_of(model, ids, places):
    """(log-probabilities of the tokens at these positions, entropies before them)."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, [place - 1 for place in places]]
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    return logits.log_softmax(-1).gather(1, torch.tensor([[ids[place]] for place in places]))[:, 0], entropy


FORMULAE = {
    "perce": lambda logp, logp_cf, entropy: (logp - logp_cf).clamp(*CLIP),
    "ce": lambda logp, logp_cf, entropy: torch.ones_like(logp),
    "lossce": lambda logp, logp_cf, entropy: (-logp).clamp(0.8, 5.0),
    "entce": lambda logp, logp_cf, entropy: entropy.clamp(0.8, 5.0),
    "dft": lambda logp, logp_cf, entropy: logp.exp(),
    "nextquill": lambda logp, logp_cf, entropy: torch.where(logp.exp() - logp_cf.exp() > 0.05, 0.9, 0.1),
}
"""The formula of the weights, by objective."""


def plain_steps(model, rows, kind, objective="perce", steps=STEPS):
    """[(loss, gradients by name)] of each step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, found = torch.optim.SGD(trained.values(), lr=RATE), []
    per_step = len(rows) // steps
    for step in range(steps):
        factual, without = [], []
        for row in rows[step * per_step : (step + 1) * per_step]:
            (ids, places), (ids_cf, places_cf) = (
                tokens_of(row, kind, block) for block in (block_of(row["persona"]), "")
            )
            assert [ids[i] for i in places] == [ids_cf[i] for i in places_cf]
            assert (len(ids) > len(ids_cf)) == bool(row["persona"])
            factual.append(logp_of(model, ids, places))
            with torch.no_grad():
                without.append(logp_of(model, ids_cf, places_cf)[0])
        (logp, entropy), logp_cf = map(torch.cat, zip(*factual, strict=True)), torch.cat(without)
        weight = FORMULAE[objective](logp.detach(), logp_cf, entropy)
        loss = -(weight * logp).mean()
        optimizer.zero_grad()
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in trained.items()}))
        optimizer.step()
    return found


def model_for(architecture="llama", lora=False):
    """A tiny model, or one with an adapter both halves of which have gradients."""
    model = tiny_model(architecture)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


class Gradients(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
        self.found.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def options_for(directory, **options):
    """TrainingArguments with which a step is plain gradient descent on a CPU."""
    fixed = {
        "output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "no", "max_steps": STEPS, "learning_rate": RATE, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip
    return fixed | options


def steps_of(trainer, **how):
    """[(loss, gradients by name)] of a trainer's run."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(**how)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-len(gradients.found) :]
    return list(zip(losses, gradients.found, strict=True))


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for (loss, gradients), (own_loss, own) in zip(found, expected, strict=True):
        assert abs(loss - own_loss) <= tolerance * abs(own_loss)
        assert gradients.keys() == own.keys()
        for name, gradient in own.items():
            error = (gradients[name] - gradient).norm() / gradient.norm()
            assert error <= tolerance, f"{name}: {error}"
