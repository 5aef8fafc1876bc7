"""PerCE in TRL, written like TRL's own scripts: `python examples/trl_sft.py --config examples/trl_sft.yaml`.

Rows are in any of TRL's formats, with one more field, `persona`: a text, or a list of texts.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from perce.integrations.trl import PerceSFTConfig, PerceSFTTrainer

script_args, training_args, model_args = TrlParser(
    (ScriptArguments, PerceSFTConfig, ModelConfig)
).parse_args_and_config()
dataset = load_dataset(script_args.dataset_name)
trainer = PerceSFTTrainer(
    model_args.model_name_or_path,
    training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
