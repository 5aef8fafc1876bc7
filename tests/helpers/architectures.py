"""A tiny random model of every causal language model that the installed transformers knows."""

import copy

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

VOCAB = 400
CONFIGS = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
NAMES = sorted(CONFIGS)
CANNOT_BUILD = {
    "gemma3n": "its image encoder needs the package timm; gemma3n_text is the same language model",
    "gemma4_assistant": "a drafter: reads hidden states and keys of another model, no tokens",
    "gemma4_unified_assistant": "a drafter: reads hidden states and keys of another model, no tokens",
    "musicgen": "writes audio codes; the class cannot be built from the config it is registered for",
    "musicgen_melody": "writes audio codes; the class cannot be built from the config it is registered for",
}

SIZE_NAMES = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size "
    "pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    1024: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length rel_extent",
    64: "mamba_d_ssm",
    48: "intermediate_size ffn_dim n_inner ffn_hidden_size dff dim_ff feed_forward_size "
    "intermediate_size_mlp d_inner decoder_ffn_dim encoder_ffn_dim dense_intermediate_size "
    "shared_intermediate_size mlp_dim",
    # With few heads, an indexer's scores tie at 0, and the padding decides which of the tied ones are in the top k.
    32: "index_n_heads hidden_size d_model n_embd embed_dim emb_dim embedding_size embedding_dim hidden_size_global "
    "lru_width "
    "input_embedding_size output_embedding_size word_embed_proj_dim image_size ple_embed_dim "
    "output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels prompt_mid_dim "
    "adapter_in_dim adapter_out_dim adapter_input_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    16: "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank patch_size hc_lowrank adapter_rank laurel_rank "
    "router_hidden_size mamba_d_state state_size ssm_state_size hidden_size_per_layer_input shape_embed_dim "
    "pronunciation_embed_dim dim_model_base",
    8: "head_dim swa_head_dim d_head dim_head kv_channels attention_head_size qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim "
    "indexer_head_dim rotary_dim mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads "
    "index_block_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_heads "
    "linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num "
    "n_mamba_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_layers_per_stack num_blocks depth num_key_value_heads swa_num_key_value_heads "
    "kv_n_heads num_kv_heads linear_num_key_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k moe_k index_topk_blocks top_k_experts heads_per_ngram attn_layer_period expert_layer_period",
    1: "n_group topk_group num_expert_group num_shared_experts n_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers attn_layer_offset expert_layer_offset bos_token_id",
    0: "eos_token_id pad_token_id",
}  # fmt: skip
WINDOW_NAMES = (
    "sliding_window sliding_window_size attention_chunk_size local_attention local_attention_window_len block_size "
    "attention_window_size keep_window_size index_topk mamba_chunk_size"
)
SIZES = (
    {name: size for size, names in SIZE_NAMES.items() for name in names.split()}
    | dict.fromkeys(WINDOW_NAMES.split(), 16)
    | dict.fromkeys("initializer_range init_std embed_init_std embedding_initializer_range".split(), 0.2)
    # With neutral values, a test would not notice that a model's option is ignored.
    | {"logits_scaling": 0.5, "logit_scale": 2.0, "lm_head_multiplier": 3.0, "logits_mup_width_multiplier": 0.5}
    | dict.fromkeys("final_logit_softcapping logits_soft_cap output_logit_soft_cap".split(), 5.0)
    | {"use_sliding_window": True, "is_decoder": True}
)

CONV = {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}
SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
DOTS = {"head_dim": 16} | {
    f"swa_{name}": size
    for name, size in {
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    }.items()
}  # fmt: skip
QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16} | {
    "indexer_compress_ratio": 4, "ple_layer_ids": [1], "split_ngram_parts": 1,
}  # fmt: skip
COMPRESS = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
LOOP = {"num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid"]} | {
    "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict] = {
    # Not causal by default.
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    # Layers of both kinds, if the defaults have one kind only or another field for it.
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 1.0},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "initializer_range": 0.5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "hrm_text": {"num_layers_per_stack": None},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": 16, "num_experts_per_tok": 1},
    "gemma3n_text": SHARED_KV | {"intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4": {"text_config": SHARED_KV | {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16, "num_global_key_value_heads": 1}
    | dict.fromkeys(("enable_moe_block", "attention_k_eq_v"), True),
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 4},
    "flint": {"mlp_only_layers": [0]},
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "inkling2_loop_text": LOOP,
    # Windows that the published models do not use.
    "minimax": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "nemotron_h": {"sliding_window": None},
    "qwen3_moe": {"use_sliding_window": False},
    # Sizes that depend on each other.
    "mamba2": {"num_heads": 8},
    "deepseek_v4": {"index_topk": 4, "compress_rates": COMPRESS},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "dots3_note": {"text_config": DOTS},
    "dots3_note_text": DOTS,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    # Required, though without a default.
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "blt": {"num_hidden_layers": 8},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(name: str) -> PreTrainedConfig:
    overrides = copy.deepcopy(OVERRIDES.get(name, {}))  # configs may modify their arguments
    return _small(CONFIGS[name], overrides)


def tiny(name: str) -> torch.nn.Module:
    config = tiny_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # (nearly) constant initial values would hide mistakes
        if parameter.dim() == 1 or parameter.std(correction=0) < 0.03:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model.eval()


def _small(config_class: type[PreTrainedConfig], overrides: dict) -> PreTrainedConfig:
    """The config, and the configs inside it, with small sizes, no dropout and a layer of each kind."""
    default = vars(config_class())
    given = {field: size for field, size in SIZES.items() if field in default}
    random = [field for field in default if any(word in field for word in ("dropout", "pdrop", "jitter"))]
    given |= {field: type(default[field])() for field in random}  # 0 or 0.0: the classes check the type
    given |= _layer_lists(default)
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= overrides
    for field, value in default.items():
        if isinstance(value, PreTrainedConfig):
            given[field] = _small(type(value), overrides.get(field, {}))
    return config_class(**given)


def _layer_lists(default: dict) -> dict:
    """The fields with an entry per layer, cut to as many layers as the kinds of layers need."""
    count = next((default[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in default), None)
    kinds = {k: list(dict.fromkeys(v)) for k, v in default.items() if isinstance(v, list | tuple) and len(v) == count}
    if kinds.get("layer_types") in (["full_attention"], ["sliding_attention"]) and "sliding_window" in default:
        kinds["layer_types"] = ["sliding_attention", "full_attention"]
    layers = max([2, *(len(values) for values in kinds.values() if isinstance(values[0], str))])
    if "sliding_window" in default and "layer_types" not in kinds:
        layers = 4  # with windows of 16 only, four layers reach back over 60 tokens
    cut = {field: (values * layers)[:layers] for field, values in kinds.items()}
    return cut | ({"num_hidden_layers": layers} if "num_hidden_layers" in default else {})
