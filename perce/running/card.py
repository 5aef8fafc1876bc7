"""README.md of a run, its model card: what it was trained from, and how to prompt it with transformers alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perce.config.commands import TrainOptions
from perce.config.yaml_file import dump_yaml
from perce.data.chat import ChatFormat
from perce.data.prompt import system_text
from perce.hub import fingerprint
from perce.training.serving import takes_persona
from perce.visible import as_json, visible

CARD = "README.md"
ENTRIES = ["I keep bees.", "My dog is called Juno."]  # shown as a persona
QUERY = "Coming tonight?"


def write_card(
    output_dir: Path,
    config: TrainOptions,
    model_path: str,
    tokenizer: Any,
    numbers: dict[str, list[float]],
    trained: str,
    findings: Sequence[str] = (),
    of_histories: bool = False,
) -> None:
    """tokenizer: as it is saved; None for documents, where nothing is prompted. numbers: the validation's numbers by
    label, before training (if it was evaluated then) and after. trained: how long, and which weights these are.
    findings: what a reader should know about the numbers. of_histories: whether the personas were passages of
    histories.

    The card has names instead of paths: it is uploaded, and the Hub refuses a card whose base model is a path."""
    base, adapter = _name(model_path), bool(config.model.lora_r)
    header: dict[str, Any] = {} if Path(model_path).expanduser().exists() else {"base_model": base}
    header |= {
        "library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation", "license": "other",
        "tags": ["perce", "personalization"],
    }  # fmt: skip
    facts = {
        "base model": f"{base} ({fingerprint(model_path)})",
        "data": _name(config.data.data) if config.data.data else "built-in examples",
        "objective": f"{config.loss.objective}, weights {config.loss.weighting}",
        "trained": f"{f'LoRA of rank {config.model.lora_r}' if adapter else 'all weights'}, {trained}",
        "licence": "not set: the licences of the base model and of the data apply",
        **{label: " → ".join(f"{value:.4f}" for value in values) for label, values in numbers.items()},
    }
    rows = "\n".join(f"| {name} | {_as_it_is(value)} |" for name, value in facts.items())
    notes = "".join(f"- {_as_it_is(text)}\n" for text in findings) + "\n" * bool(findings)
    text = f"""---
{dump_yaml(header)}---

# {_as_it_is(output_dir.resolve().name)}

A personalised language model, trained with PerCE (arXiv 2603.06595). `config.yaml` has all options.

| | |
| --- | --- |
{rows}

{notes}{"" if tokenizer is None else _asking(tokenizer, config, adapter, of_histories)}"""
    (output_dir / CARD).write_text(text, encoding="utf-8")


def _name(path: str) -> str:
    """The name of a file or directory; a Hub id is unchanged."""
    local = Path(path).expanduser()
    return local.resolve().name if local.exists() or local.is_absolute() else path


def _as_it_is(text: str) -> str:
    """The text escaped for Markdown, HTML and line breaks. Markdown takes an underscore inside a word as it is."""
    return re.sub(r"[\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", visible(text))


def _asking(tokenizer: Any, config: TrainOptions, adapter: bool, of_histories: bool) -> str:
    chat_format = ChatFormat(tokenizer, config.data.template_kwargs())
    style, block = chat_format.style, chat_format.block(ENTRIES)
    system, query = system_text(style, block), block + QUERY if style.place == "user" else QUERY
    auto = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    variables = "".join(f", {name}={value!r}" for name, value in config.data.template_kwargs().items())
    messages = [{"role": "system", "content": system}, {"role": "user", "content": query}]
    if not chat_format.has_system_role:
        messages = [{"role": "user", "content": f"{system}\n\n{query}"}]
    shown = ",\n    ".join(as_json(message) for message in messages)
    by_variable = """
The chat template also takes the persona as a list: `tokenizer.apply_chat_template([{"role": "user", "content": "…"}],
persona=["…", "…"], add_generation_prompt=True)`.
"""
    picking = "" if not of_histories or config.data.retriever == "none" else _picking(config)
    as_text = """
In training, control tokens that a persona spells, such as the end of a turn, were plain text; a server would read them
as control tokens.
"""
    return f"""## How to ask it

The model was trained with exactly these words: replace only the entries of the persona and the last message.
Nothing is needed besides transformers{" and peft" if adapter else ""}:

```python
from {auto[0]} import {auto[1]}
from transformers import AutoTokenizer, GenerationConfig

run = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(run)
model = {auto[1]}.from_pretrained(run)
messages = [
    {shown},
]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=False{variables}
)
reply = model.generate(prompt, generation_config=GenerationConfig.from_pretrained(run, max_new_tokens=200))
print(tokenizer.decode(reply[0, prompt.shape[1] :], skip_special_tokens=True))
```
{by_variable if takes_persona(tokenizer.chat_template) else ""}{picking}{
        as_text if config.data.special_tokens_in_text == "text" else ""
    }"""


def _picking(config: TrainOptions) -> str:
    data = config.data
    model = f", retriever_model={data.retriever_model!r}" if data.retriever_model else ""
    call = f"perce.pick_passages(history, request, retriever={data.retriever!r}, k={data.retrieve_k}{model})"
    which = "were the latest, the latest" if data.retriever == "recency" else "fit the request best, best"
    return f"""
The entries of a persona were the {data.retrieve_k} passages of the user's history that {which}
first. `{call}`
picks them; a history has the oldest entry first.
"""
