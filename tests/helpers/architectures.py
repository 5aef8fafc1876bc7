"""A tiny random model of every causal language model that the installed transformers knows."""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

VOCAB = 400
LAYERS = 2
WINDOW = 16
CONFIGS = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
NAMES = sorted(CONFIGS)


def _each(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


SIZES = (
    _each(VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size")
    | _each(
        32, "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size embedding_dim hidden_size_global lru_width"
    )
    | _each(
        32,
        "projection_dim input_embedding_size output_embedding_size word_embed_proj_dim image_size attention_hidden_size",
    )
    | _each(
        48, "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size dff dim_ff feed_forward_size intermediate_size_mlp"
    )
    | _each(48, "decoder_ffn_dim encoder_ffn_dim d_inner dense_intermediate_size shared_intermediate_size")
    | _each(
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size",
    )
    | _each(24, "moe_shared_expert_intermediate_size")
    | _each(
        LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers"
    )
    | _each(LAYERS, "num_encoder_layers num_layers_per_stack")
    | _each(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads")
    | _each(
        4,
        "swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads index_n_heads linear_num_heads",
    )
    | _each(2, "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads kv_n_heads num_kv_heads")
    | _each(2, "linear_num_key_heads")
    | _each(4, "linear_num_value_heads")
    | _each(
        8, "head_dim swa_head_dim global_head_dim d_kv d_head dim_head kv_channels attention_head_size qk_rope_head_dim"
    )
    | _each(
        8,
        "qk_nope_head_dim v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim rotary_dim",
    )
    | _each(16, "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank patch_size hc_lowrank adapter_rank laurel_rank")
    | _each(4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num")
    | _each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts")
    | _each(1, "n_group topk_group num_expert_group num_shared_experts n_shared_experts moe_num_shared_experts")
    | _each(1, "first_k_dense_replace num_dense_layers")
    | _each(512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length rel_extent")
    | _each(
        WINDOW, "sliding_window sliding_window_size attention_chunk_size local_attention local_attention_window_len"
    )
    | _each(WINDOW, "attention_window_size keep_window_size index_topk block_size")
    | _each(True, "use_sliding_window is_decoder")
    | _each(0.2, "initializer_range init_std embed_init_std embedding_initializer_range")
    | _each(3.0, "logits_scaling lm_head_multiplier logits_mup_width_multiplier")
    | _each(5.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap")
    | {"logit_scale": 0.25, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
)

OVERRIDES: dict[str, dict[str, object]] = {}
CANNOT_BUILD: dict[str, str] = {}


def _small(config_class: type[PreTrainedConfig], **overrides: object) -> PreTrainedConfig:
    """The config, and those inside it, with small sizes and a layer of each kind."""
    default = vars(config_class())
    given = {field: size for field, size in SIZES.items() if field in default}
    given |= {field: 0.0 for field in default if "dropout" in field or "pdrop" in field}
    given |= {field: _small(type(sub)).to_dict() for field, sub in default.items() if isinstance(sub, PreTrainedConfig)}
    given |= _layer_lists(default)
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return config_class(**given | overrides)


def _layer_lists(default: dict[str, object]) -> dict[str, object]:
    """The fields with an entry per layer, cut to as many layers as the kinds of layers need."""
    count = next((default[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in default), None)
    lists = {k: list(dict.fromkeys(v)) for k, v in default.items() if isinstance(v, list | tuple) and len(v) == count}
    if lists.get("layer_types") == ["full_attention"] and "sliding_window" in default:
        lists["layer_types"] = ["sliding_attention", "full_attention"]
    layers = max([LAYERS, *(len(v) for v in lists.values() if isinstance(v[0], str))])
    cut = {field: (kinds * layers)[:layers] for field, kinds in lists.items()}
    return cut | ({"num_hidden_layers": layers} if lists and "num_hidden_layers" in default else {})


def tiny_config(name: str) -> PreTrainedConfig:
    config_class = CONFIGS[name]
    return _small(config_class, **OVERRIDES.get(name, {}))


def tiny(name: str) -> torch.nn.Module:
    config = tiny_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mistake would not show
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model.eval()
