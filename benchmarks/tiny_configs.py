"""A tiny configuration of any causal language model of transformers, from the sizes' names alone.

Every kind of layer that the default configuration has is kept once, windows are shorter than the branches that
`architectures` compares, and dropout is off.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

VOCABULARY = 96
WINDOW = 5

_HIDDEN, _HEADS, _HEAD = 32, 4, 8
#: The tiny value of a number by its name.
_SIZES: dict[str, int] = {
    "hidden_size": _HIDDEN, "d_model": _HIDDEN, "n_embd": _HIDDEN, "emb_dim": _HIDDEN, "embedding_size": _HIDDEN,
    "embedding_dim": _HIDDEN, "word_embed_proj_dim": _HIDDEN, "input_embedding_size": _HIDDEN,
    "output_embedding_size": _HIDDEN, "attention_hidden_size": _HIDDEN, "hidden_size_global": 2 * _HIDDEN,
    "lru_width": _HIDDEN, "backbone_hidden_size": _HIDDEN, "embed_dim": _HIDDEN,
    "num_attention_heads": _HEADS, "n_head": _HEADS, "n_heads": _HEADS, "num_heads": _HEADS, "attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS, "encoder_attention_heads": _HEADS, "num_decoder_attention_heads": _HEADS,
    "num_encoder_attention_heads": _HEADS, "swa_num_attention_heads": _HEADS,
    "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2, "swa_num_key_value_heads": 2, "num_query_groups": 2,
    "head_dim": _HEAD, "dim_head": _HEAD, "d_head": _HEAD, "attention_head_dim": _HEAD, "swa_head_dim": _HEAD,
    "attention_head_size": _HEAD, "kv_channels": _HEAD, "d_kv": _HEAD, "rotary_dim": 4, "index_head_dim": _HEAD,
    "index_n_heads": 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "qk_head_dim": 12, "v_head_dim": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "adapter_rank": 4, "gated_norm_rank": 4,
    "global_head_dim": _HEAD,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "intermediate_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "ffn_dim": 48,
    "shared_intermediate_size": 24, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48, "dim_ff": 48,
    "dff": 48, "d_inner": 48, "n_inner": 48, "expert_ffn_hidden_size": 24, "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48, "shared_experts_intermediate_size": 24, "feed_forward_size": 48, "mlp_dim": 48,
    "moe_shared_expert_intermediate_size": 24, "laurel_rank": 4, "hidden_size_per_layer_input": 8,
    "router_hidden_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 1,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
    "vocab_size": VOCABULARY, "n_words": VOCABULARY, "decoder_vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "audio_vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64, "context_length": 64,
    "max_target_positions": 64, "max_source_positions": 64, "original_max_position_embeddings": 64,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "sliding_window_size": WINDOW, "window_size": WINDOW,
    "local_attention": WINDOW, "attention_chunk_size": WINDOW,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 8, "mamba_num_heads": 8,
    "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_d_ssm": 64,
    "mamba_headdim": 8, "n_mamba_heads": 1, "mamba_ngroups": 1, "mamba_n_groups": 1, "n_groups": 1,
    "index_topk": 64, "index_block_size": 4, "index_topk_blocks": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
#: Numbers that some configurations leave open.
_UNSET = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
           "num_decoder_layers", "num_encoder_layers", "num_blocks", "depth")  # fmt: skip
#: Standard deviations of the random weights: large enough that a random model's probabilities differ.
_SPREADS = ("initializer_range", "init_std", "embed_init_std", "initializer_factor")


def tiny_config(kind: str, **options: Any) -> Any:
    """The tiny configuration of a `model_type`; `options` override what its names decide."""
    chosen = _shrunk(AutoConfig.for_model(kind).to_dict())
    for name, value in {**_SPECIAL.get(kind, {}), **options}.items():
        chosen[name] = {**chosen[name], **value} if name.endswith("_config") else value
    return AutoConfig.for_model(kind, **chosen)


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration that a tiny one has otherwise."""
    count = next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), 0)
    by_layer = [value for value in config.values() if isinstance(value, (list, tuple)) and len(value) == count]
    kept = _kept_layers(by_layer, count)
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name == "per_layer_config":  # follows from the other values
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = {**value, **_shrunk(value)}
            found[name].pop("per_layer_config", None)
        elif value is None and name in _UNSET:
            found[name] = _SIZES[name]
        elif isinstance(value, (list, tuple)) and count and len(value) == count:
            found[name] = [value[layer] for layer in kept]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        elif name in _LAYERS:
            found[name] = len(kept)
        elif name in _SPREADS:
            found[name] = 0.3
        elif "drop" in name or "jitter" in name:
            found[name] = type(value)(0)
        elif name in _SIZES and value:
            found[name] = _SIZES[name]
    if "is_decoder" in config:
        found["is_decoder"] = True
    if "qk_rope_head_dim" in config:  # latent attention: all heads have keys, and rotary embeddings read head_dim
        found |= {"head_dim": _SIZES["qk_rope_head_dim"], "num_key_value_heads": _HEADS}
    return found


def _kept_layers(by_layer: list[Any], count: int) -> list[int]:
    """Two layers, or as many as show every combination of what differs between layers."""
    rows = list(zip(*(map(str, values) for values in by_layer), strict=True)) or [()] * count
    first = sorted({row: layer for layer, row in reversed(list(enumerate(rows)))}.values())
    others = [layer for layer in range(count) if layer not in first]
    return sorted([*first, *others[: max(0, 2 - len(first))]])


#: What names do not decide.
_LFM = {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1], "num_hidden_layers": 2}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 1,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    # The default has no attention, unlike every model that was published.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "blt": {
        "global_config": {"hidden_size": 2 * _HIDDEN, "head_dim": 2 * _HEAD},
        "encoder_hash_byte_group_vocab": VOCABULARY,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "lfm2": _LFM,
    "lfm2_moe": _LFM,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "zamba": {"attention_head_dim": 16, "attention_hidden_size": 2 * _HIDDEN, **_ZAMBA},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 2 * _HIDDEN, "mamba_headdim": 64, **_ZAMBA},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
