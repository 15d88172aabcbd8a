"""Arguments of a Megatron-LM job that trains a small Llama."""

ARGS = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
    "rotary_base": 5000,
    "norm_epsilon": 1e-3,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 128,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "use_rotary_position_embeddings": True,
}
