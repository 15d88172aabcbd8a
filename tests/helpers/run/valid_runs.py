"""Small valid runs, changed section by section."""

from megagrow.config.schema import RunConfig

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def run(*changes: dict, data: dict | None = None) -> RunConfig:
    """A run with one stage per change, which is merged section by section into a valid stage."""
    stages = []
    for index, change in enumerate(changes):
        stage = {
            "model": {**MODEL, "num_hidden_layers": 2 * 4**index},
            "tokens": "1K",
            "batch": {"global_batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"lr": 1e-3},
            "growth": {} if index else None,
        }
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(stage.get(key), dict)
            stage[key] = {**stage[key], **value} if both else value
        stages.append(stage)
    corpus = {"train": [{"path": "x"}], "sequence_length": 64, **(data or {})}
    return RunConfig.model_validate(
        {"name": "t", "output_dir": "o", "data": corpus, "stages": stages}
    )
