"""Names that other programs have for the options of these commands, to say which option an unknown name stands for."""

NAMES = (
    ("model", "model_name_or_path model_name model_path model_id base_model pretrained_model_name_or_path"),
    (
        "data",
        "dataset datasets dataset_name dataset_path data_path data_dir data_file train_file train_data train_dataset "
        "validation_file val_file eval_file test_file eval_dataset",
    ),
    ("output_dir", "output out out_dir save_dir save_path output_path"),
    ("output", "out output_dir output_file output_path out_file html"),
    ("json", "output out output_file out_file"),
    (
        "max_length",
        "max_seq_length max_seq_len seq_length seq_len sequence_len max_len cutoff_len context_length block_size",
    ),
    ("context", "max_length max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len context_length"),
    ("learning_rate", "lr base_lr peak_lr"),
    ("num_train_epochs", "epochs num_epochs n_epochs epoch"),
    ("max_steps", "steps num_steps train_steps max_train_steps num_train_steps iters max_iters"),
    ("warmup_steps", "warmup warmup_ratio num_warmup_steps warmup_iters"),
    ("lr_scheduler_type", "scheduler lr_scheduler"),
    ("optim", "optimizer optimiser"),
    ("weight_decay", "wd"),
    ("max_grad_norm", "grad_clip clip_grad_norm gradient_clipping"),
    ("per_device_train_batch_size", "batch_size micro_batch_size train_batch_size per_device_batch_size bs"),
    ("per_device_eval_batch_size", "eval_batch_size val_batch_size"),
    ("batch_size", "per_device_eval_batch_size per_device_train_batch_size eval_batch_size micro_batch_size bs"),
    ("gradient_accumulation_steps", "grad_accum grad_accum_steps gradient_accumulation accumulation_steps"),
    ("precision", "bf16 fp16 dtype torch_dtype mixed_precision"),
    ("activation_checkpointing", "gradient_checkpointing use_gradient_checkpointing grad_checkpointing"),
    ("lora_r", "lora lora_rank rank use_lora use_peft peft adapter finetuning_type"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("load_in_4bit", "load_in_8bit qlora quantization quantization_bit quantize use_4bit bits"),
    ("attn_implementation", "attn attention flash_attn flash_attention use_flash_attention use_flash_attention_2"),
    ("use_cpu", "device no_cuda cpu"),
    ("devices", "num_gpus gpus n_gpus num_devices"),
    ("eval_steps", "eval eval_every eval_interval val_interval"),
    ("eval_strategy", "evaluation_strategy"),
    ("save_steps", "save_every save_interval"),
    ("logging_steps", "log_every log_interval log_steps"),
    ("report_to", "wandb use_wandb logger"),
    ("run_name", "wandb_run_name experiment_name"),
    ("resume", "continue resume_training"),
    ("objective", "loss loss_type method"),
    ("max_new_tokens", "max_tokens max_gen_len"),
    ("temperature", "temp"),
    ("split_seed", "seed random_seed"),
    ("seed", "random_seed"),
)
"""(an option of one of these commands, or a TrainingArguments field; its names in other programs)"""

NOTES = {
    "data": "a file, or a directory with train.jsonl, validation.jsonl and test.jsonl",
    "warmup_steps": "below 1 it is a share of all steps",
    "precision": "auto, fp32 or bf16",
    "lora_r": "the rank of LoRA, which is on by default; 0 trains all weights",
    "load_in_4bit": "a base is quantised to 4 bits, to no other width",
    "use_cpu": "true or false; a GPU is used if there is one",
}
"""What to say about some of them besides the name."""

ADVICE = {"device": "A GPU is used if there is one; CUDA_VISIBLE_DEVICES= hides it."}
"""What to say about a name that is no option of a command, though it may be one of another command."""


def known_as(name: str) -> list[str]:
    """The options, of all commands together, that the name may stand for."""
    return [right for right, names in NAMES if name in names.split()]
