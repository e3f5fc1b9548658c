"""What published config.json files have beyond transformers' own keys, and older names of these, by architecture."""

from __future__ import annotations

from typing import Any, Final

_DEEPSEEK: Final = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "aux_loss_alpha": 0.001,
                    "seq_aux": True}  # fmt: skip
_HUNYUAN: Final = {
    "use_qk_norm": True, "use_rotary_pos_emb": True, "use_cla": False, "cla_share_factor": 2, "norm_type": "rms", "class_num": 0,
    "dense_list": [64, 0], "pool_type": "last", "org_vocab_size": 131, "pad_id": 2, "eod_token_id": 3, "im_start_id": 4,
    "mask_init_id": 12,
}  # fmt: skip
EXTRAS: Final[dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {
        "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "_name_or_path": "x", "internal_version": "7b", "max_sequence_length": 2048,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Cohere2ForCausalLM": {
        "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0, "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": True, "cache_implementation": "hybrid", "rope_scaling": None,
    },
    "CohereForCausalLM": {"model_max_length": 131072},
    "DeepseekV2ForCausalLM": {
        **_DEEPSEEK, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "pretraining_tp": 1, "norm_topk_prob": False,
    },
    "DeepseekV3ForCausalLM": {**_DEEPSEEK, "qk_head_dim": 12, "head_dim": 4},
    "Dots1ForCausalLM": {"scoring_func": "noaux_tc", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "Ernie4_5ForCausalLM": {"compression_ratio": 1.0},
    "Ernie4_5_MoeForCausalLM": {
        "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "moe_dropout_prob": 0.0,
    },
    "Exaone4ForCausalLM": {"sliding_window_pattern": "LLLG"},
    "ExaoneMoeForCausalLM": {
        "is_moe_layer": [False, True, True, True], "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1,
        "sliding_window_pattern": "LLLG",
    },
    "GPT2LMHeadModel": {
        "n_ctx": 64, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "reorder_and_upcast_attn": False, "output_past": True, "predict_special_tokens": True, "_num_labels": 1,
    },
    "GPTNeoXForCausalLM": {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 20000},
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 12, "cache_implementation": "hybrid"},
    "Gemma3ForCausalLM": {"cache_implementation": "hybrid", "sliding_window_pattern": 6},
    "Glm4MoeLiteForCausalLM": {"topk_method": "noaux_tc", "first_k_dense_replace": 1, "head_dim": 4},
    "GptOssForCausalLM": {"experts_per_token": 2, "initial_context_length": 16},
    "HunYuanDenseV1ForCausalLM": {**_HUNYUAN, "attention_head_dim": 16, "enable_lm_head_fp32": True},
    "HunYuanMoEV1ForCausalLM": {
        **_HUNYUAN, "attention_head_dim": 16, "use_mixed_mlp_moe": True, "norm_topk_prob": True, "moe_drop_tokens": False,
        "moe_random_routing_dropped_token": False, "moe_layer_num_skipped": 0, "moe_intermediate_size": [48] * 4,
    },
    "Llama4ForCausalLM": {"attn_temperature_tuning": 4, "for_llm_compressor": True, "nope_layer_interval": 4, "router_jitter_noise": 0.0},
    "MiniMaxM2ForCausalLM": {
        "attn_type_list": [1, 1, 1, 1], "qk_norm_type": "per_layer", "use_mtp": True, "mtp_transformer_layers": 1,
        "layernorm_full_attention_beta": 1.0, "mlp_intermediate_size": 8192, "shared_moe_mode": "sigmoid", "rotary_dim": 8,
        "shared_intermediate_size": 0, "use_routing_bias": True, "scoring_func": "sigmoid",
    },
    "Phi3ForCausalLM": {
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "attention_bias": False,
        "embd_pdrop": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
    "PhimoeForCausalLM": {"input_jitter_noise": 0.01},
    "Qwen2ForCausalLM": {"use_mrope": False, "max_window_layers": 28},
    "Qwen3MoeForCausalLM": {
        "max_window_layers": 48, "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "rope_scaling": None,
    },
    "SmolLM3ForCausalLM": {"max_window_layers": 28},
    "Starcoder2ForCausalLM": {
        "mlp_type": "default", "norm_type": "layer_norm", "activation_function": "gelu", "embedding_dropout": 0.1, "rms_norm_eps": 1e-05,
    },
}  # fmt: skip
