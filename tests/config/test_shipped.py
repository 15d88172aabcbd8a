"""The run files and model sizes that come with megagrow."""

from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.config.schema import ModelConfig
from megagrow.config.show import to_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent == CONFIGS or path.parent.name == "demo"
)
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))

# Millions of parameters, in all and outside the embedding and the head: Du et al. 2024.
PAPER = {
    "llama-410m": (373.9, 308.3),
    "llama-410m-6l": (142.6, 77.1),
    "llama-1.1b": (1364.3, 1233.2),
    "llama-1.1b-6l": (439.4, 308.3),
    "llama-3b": (2397.5, 2233.6),
    "llama-3b-8l": (722.3, 558.4),
    "llama-7b": (5933.1, 5671.0),
    "llama-7b-8l": (1679.9, 1417.7),
}


def model_named(name: str, tmp_path: Path) -> ModelConfig:
    """The model of a shipped part, by way of a run file that names it."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: t\noutput_dir: o\nmodel: {name}\ntokens: 1K\noptimizer: {{lr: 1}}\n"
        "data: {train: [{path: x}], sequence_length: 8}\n"
        "batch: {global_batch_size: 1, micro_batch_size: 1}\n",
        encoding="utf-8",
    )
    return load_run(path).stages[0].model


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and without the embedding and an untied head."""
    hidden, kv_width = model.hidden_size, model.num_key_value_heads * model.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv_width
    layer = attention + 3 * hidden * model.intermediate_size + 2 * hidden
    inner = model.num_hidden_layers * layer + hidden
    tables = 1 if model.tie_word_embeddings else 2
    return inner + tables * model.vocab_size * hidden, inner


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(shown) == run


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_says_its_size_in_its_first_line(path: Path, tmp_path: Path) -> None:
    total, _ = parameters(model_named(path.stem, tmp_path))
    assert path.read_text(encoding="utf-8").startswith(f"# {total / 1e6:.1f}M parameters; ")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_sizes(name: str, tmp_path: Path) -> None:
    model = model_named(name, tmp_path)
    in_millions = tuple(round(count / 1e6, 1) for count in parameters(model))
    assert in_millions == PAPER[name]
    assert (model.rms_norm_eps, model.rope_theta, model.tie_word_embeddings) == (1e-5, 1e4, False)


@pytest.mark.parametrize("size", ["410m", "1.1b", "3b", "7b"])
def test_a_base_is_a_quarter_of_its_target(size: str, tmp_path: Path) -> None:
    target = model_named(f"llama-{size}", tmp_path)
    layers = target.num_hidden_layers // 4
    base = model_named(f"llama-{size}-{layers}l", tmp_path)
    assert base == target.model_copy(update={"num_hidden_layers": layers})


def test_the_papers_run() -> None:
    run = load_run(CONFIGS / "gstack-1.1b.yaml")
    base, target = run.stages
    assert run.data.sequence_length * base.batch.global_batch_size == 2_097_152
    assert (base.tokens, target.tokens) == (10 * 10**9, 97_500_000_000)
    assert (base.optimizer.lr, base.optimizer.min_lr) == (1e-3, 1e-4)
    assert (target.optimizer.lr, target.optimizer.min_lr) == (3e-4, 3e-5)
    assert target.optimizer.betas == (0.9, 0.95)
    assert target.schedule.warmup_steps == 3000
    assert target.schedule.horizon_tokens == 300_000 * 2_097_152
    assert target.model.num_hidden_layers == 4 * base.model.num_hidden_layers == 24
    scratch = load_run(CONFIGS / "scratch-1.1b.yaml").stages[0]
    assert scratch.model == target.model
    assert scratch.optimizer == target.optimizer
