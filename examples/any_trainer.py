"""PerCE in any transformers.Trainer, here in one of your own: `python examples/any_trainer.py [MODEL]`.

MODEL is a directory or Hub id; by default a small model that is downloaded once.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import perce
from perce.integrations.trainer import PerceMixin


class MyTrainer(PerceMixin, Trainer):  # the mixin comes first, so that its methods are found before your trainer's
    pass


path = sys.argv[1] if len(sys.argv) > 1 else str(perce.default_model_path())
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows = [
    {"persona": ["I keep bees on the roof."], "query": "Coming tonight?", "response": "No, the bees need me."},
    {"persona": ["My dog is called Juno."], "query": "Who chewed my shoe?", "response": "Juno did. She is sorry."},
    {"persona": ["I bake before dawn."], "query": "Still up?", "response": "Up already. The dough waits for no one."},
    {"persona": ["I sail alone."], "query": "Need company?", "response": "Thanks, no. Wind and I are enough."},
]
trainer = MyTrainer(
    model,
    TrainingArguments(
        tempfile.mkdtemp(), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-4, logging_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True,
    ),
    train_dataset=perce.labelled(rows, tokenizer),  # or your own rows, with labels like those that this makes
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    loss=perce.LossConfig(objective="perce", clip_min=0.8, clip_max=5.0),
)  # fmt: skip
trainer.train()
