"""Models and run files in configs/, compared with published values."""

from pathlib import Path

import pytest
import torch

from megagrow.config.load import load_run, to_yaml
from megagrow.config.model_file import load_model
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import OPERATORS, is_masked
from megagrow.model.decoder import CausalLM
from megagrow.model.layers import flops as parameters
from megagrow.planning.planner import plan_run
from megagrow.train.schedule import rate_at

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARTS = ("model", "data", "hardware")
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in PARTS)
WORLDS = {"demo": 2, "gstack-70b": 512, "context-8b": 64}
"""Ranks by run file or folder; 8 for others."""
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
BILLION = 10**9
STEP = 2_097_152
"""Tokens: 1024 sequences of 2048 (Du et al. 2024, appendix B.3; the batch of their code)."""

# Layers, hidden size, heads, kv heads, FFN; millions of parameters in total and without embedding
# and head. Du et al. 2024 has no such table: shapes are from their code (lit_gpt/config.py,
# base_model.sh, g_stack.sh; layers of the bases: appendix G.1).
PAPER = {
    "llama-410m": (24, 1024, 16, 16, 2816, 373.9, 308.3),
    "llama-410m-6l": (6, 1024, 16, 16, 2816, 142.6, 77.1),
    "llama-1.1b": (24, 2048, 32, 32, 5632, 1364.3, 1233.2),
    "llama-1.1b-6l": (6, 2048, 32, 32, 5632, 439.4, 308.3),
    "llama-3b": (32, 2560, 20, 4, 7040, 2397.5, 2233.6),
    "llama-3b-8l": (8, 2560, 20, 4, 7040, 722.3, 558.4),
    "llama-7b": (32, 4096, 32, 8, 11008, 5933.1, 5671.0),
    "llama-7b-8l": (8, 4096, 32, 8, 11008, 1679.9, 1417.7),
}
# Layers, hidden size, heads, kv heads, FFN, head width, vocabulary, positions, rope_theta, eps, and
# the number of parameters: config.json and safetensors of the repositories named in the files.
PUBLISHED = {
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632, 64, 32000, 2048, 1e4, 1e-5, 1_100_048_384),
    "llama-2-7b": (32, 4096, 32, 32, 11008, 128, 32000, 4096, 1e4, 1e-5, 6_738_415_616),
    "llama-2-13b": (40, 5120, 40, 40, 13824, 128, 32000, 4096, 1e4, 1e-5, 13_015_864_320),
    "llama-2-70b": (80, 8192, 64, 8, 28672, 128, 32000, 4096, 1e4, 1e-5, 68_976_648_192),
    "llama-3-8b": (32, 4096, 32, 8, 14336, 128, 128256, 8192, 5e5, 1e-5, 8_030_261_248),
    "llama-3-70b": (80, 8192, 64, 8, 28672, 128, 128256, 8192, 5e5, 1e-5, 70_553_706_496),
    "mistral-7b": (32, 4096, 32, 8, 14336, 128, 32000, 32768, 1e4, 1e-5, 7_241_732_096),
    "qwen3-0.6b": (28, 1024, 16, 8, 3072, 128, 151936, 40960, 1e6, 1e-6, 596_049_920),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144, 128, 151936, 40960, 1e6, 1e-6, 1_720_574_976),
    "qwen3-8b": (36, 4096, 32, 8, 12288, 128, 151936, 40960, 1e6, 1e-6, 8_190_735_360),
    "olmo2-1b": (16, 2048, 16, 16, 8192, 128, 100352, 4096, 5e5, 1e-6, 1_484_916_736),
    "olmo2-7b": (32, 4096, 32, 32, 11008, 128, 100352, 4096, 5e5, 1e-6, 7_298_617_344),
}
TIED = ("qwen3-0.6b", "qwen3-1.7b")
WINDOWS = {"mistral-7b": 4096}
# Layers, hidden size, heads, kv heads, FFN; millions of parameters: microsoft/Samba, config.py.
SAMBA = {
    "samba-421m": (12, 1536, 12, 12, 4096, 421.8),
    "samba-421m-4l": (4, 1536, 12, 12, 4096, 173.4),
    "samba-1.3b": (18, 2304, 18, 18, 6144, 1330.2),
}
# lr and min_lr of Du et al. 2024, Table 1 (appendix B.3).
TABLE_1 = {"410m": (6e-4, 6e-5), "1.1b": (3e-4, 3e-5), "3b": (1.6e-4, 1.6e-5), "7b": (1e-4, 1e-5)}
# Sizes of the late growths of Bu et al. 2025 (arXiv 2511.04981); the sizes are ours.
LATE = ("410m", "1.1b")
# Billions of tokens of section 4.1: the base's d, the target's, and those of scratch. At 1.1B the
# base counts as the 2.5B target tokens of equal cost (footnote 4); for 410M, 3B and 7B the number
# is that of the entire run.
TOKENS = {
    "410m": (10, 740, 750),
    "1.1b": (10, 97.5, 100),
    "3b": (10, 290, 300),
    "7b": (10, 290, 300),
}


def counted(model: ModelConfig) -> tuple[int, int]:
    """Return the parameters in total, and without the embedding and an untied head."""
    hidden, kv_width = model.hidden_size, model.num_key_value_heads * model.head_dim
    width = model.num_attention_heads * model.head_dim
    norms = {None: 0, "per_head": 2 * model.head_dim, "full_width": width + kv_width}
    attention = 2 * hidden * width + 2 * hidden * kv_width + norms[model.qk_norm]
    mixers = {"mamba": mamba(model), "full_attention": attention, "sliding_attention": attention}
    other = 3 * hidden * model.intermediate_size + 2 * hidden
    layers = range(model.num_hidden_layers)
    inner = sum(mixers[model.layer_type(layer)] + other for layer in layers) + hidden
    tables = 1 if model.tie_word_embeddings else 2
    return inner + tables * model.vocab_size * hidden, inner


def mamba(model: ModelConfig) -> int:
    """Return the parameters of a Mamba mixer; 0 if the model has none."""
    inner, state, rank = model.mamba_d_inner, model.mamba_d_state, model.mamba_dt_rank
    if not (inner and state and rank and model.mamba_d_conv):
        return 0
    channel = model.mamba_d_conv + 1 + (rank + 2 * state) + (rank + 1) + state + 1
    return inner * (3 * model.hidden_size + channel)


def shape(model: ModelConfig) -> tuple[int, ...]:
    """Return the first five columns of the tables above."""
    heads = (model.num_attention_heads, model.num_key_value_heads)
    return (model.num_hidden_layers, model.hidden_size, *heads, model.intermediate_size)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_file_loads_round_trips_and_fits(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(shown) == run
    world = WORLDS.get(path.stem, WORLDS.get(path.parent.name, 8))
    plan = plan_run(run, world, 80 * BILLION)
    assert [warning for warning in plan.warnings if "does not fit" in warning] == []
    for stage, planned in zip(run.stages, plan.stages, strict=True):
        assert stage.tokens <= planned.tokens < stage.tokens + planned.step_tokens
        assert (planned.parameters, planned.non_embedding) == counted(stage.model)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_its_size_first_and_has_it_when_built(name: str) -> None:
    model = load_model(name)
    with torch.device("meta"):
        built = CausalLM(model)
    total, inner = counted(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == total
    assert parameters.parameters(model) == total
    assert parameters.non_embedding_parameters(model) == inner
    text = (CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# {total / 1e6:.1f}M parameters; ")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_are_the_papers(name: str) -> None:
    model = load_model(name)
    *dimensions, total, inner = PAPER[name]
    assert shape(model) == tuple(dimensions)
    assert tuple(round(count / 1e6, 1) for count in counted(model)) == (total, inner)
    assert (model.vocab_size, model.max_position_embeddings) == (32000, 2048)
    assert (model.rms_norm_eps, model.rope_theta, model.tie_word_embeddings) == (1e-5, 1e4, False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_are_as_published(name: str) -> None:
    model = load_model(name)
    *dimensions, head, vocabulary, positions, theta, eps, total = PUBLISHED[name]
    assert shape(model) == tuple(dimensions)
    assert (model.head_dim, model.vocab_size) == (head, vocabulary)
    assert (model.max_position_embeddings, model.rope_theta) == (positions, theta)
    assert (model.rope_scaling, model.rms_norm_eps) == (None, eps)
    assert model.tie_word_embeddings == (name in TIED)
    assert model.sliding_window == WINDOWS.get(name)
    assert counted(model)[0] == total


def test_no_model_is_left_unchecked() -> None:
    demo = {"demo-1l", "demo-2l", "demo-8l", "samba-demo-4l", "samba-demo-12l"}
    late = {f"llama-{size}-1l" for size in LATE}
    assert set(MODELS) == {*PAPER, *PUBLISHED, *SAMBA, *demo, *late}


@pytest.mark.parametrize("name", SAMBA)
def test_samba_is_as_published(name: str) -> None:
    model = load_model(name)
    *dimensions, total = SAMBA[name]
    assert shape(model) == tuple(dimensions)
    assert round(counted(model)[0] / 1e6, 1) == total
    assert model.layer_types == ["mamba", "sliding_attention"] and model.tie_word_embeddings
    assert (model.sliding_window, model.max_position_embeddings) == (2048, 4096)
    sizes = (model.mamba_d_inner, model.mamba_d_state, model.mamba_d_conv, model.mamba_dt_rank)
    assert sizes == (2 * model.hidden_size, 16, 4, model.hidden_size // 16)


def test_the_papers_hybrid_run() -> None:
    """Du et al. 2024, Table 7 and appendix C: 8B tokens, g = 3."""
    grown = load_run(CONFIGS / "gstack-samba-421m.yaml")
    (scratch,) = load_run(CONFIGS / "scratch-samba-421m.yaml").stages
    base, target = grown.stages
    assert [stage.tokens / BILLION for stage in (base, target, scratch)] == [8, 92, 100]
    assert base.model == load_model("samba-421m-4l")
    assert target.model == scratch.model == load_model("samba-421m")
    for stage in (base, target, scratch):
        assert stage.data.sequence_length * stage.batch.global_batch_size == STEP
        assert (stage.optimizer.lr, stage.optimizer.min_lr) == (4e-4, 4e-5)
        assert (stage.schedule.warmup_tokens, stage.optimizer.weight_decay_on) == (BILLION, "all")


@pytest.mark.parametrize("size", TABLE_1)
def test_the_papers_runs(size: str) -> None:
    grown = load_run(CONFIGS / f"gstack-{size}.yaml")
    (scratch,) = load_run(CONFIGS / f"scratch-{size}.yaml").stages
    base, target = grown.stages
    tokens = tuple(stage.tokens / BILLION for stage in (base, target, scratch))
    assert tokens == TOKENS[size]
    for stage in (target, scratch):
        assert stage.model == load_model(f"llama-{size}")
        assert (stage.optimizer.lr, stage.optimizer.min_lr) == TABLE_1[size]
    assert target.model.num_hidden_layers == 4 * base.model.num_hidden_layers
    assert base.model == load_model(f"llama-{size}-{base.model.num_hidden_layers}l")
    assert target.growth is not None
    assert target.growth.operator == ["direct_depth"]
    assert (target.growth.optimizer_state, target.growth.lr_schedule) == ("reset", "rewarm")
    for stage in (base, target, scratch):
        assert stage.data.sequence_length * stage.batch.global_batch_size == STEP
        assert (stage.schedule.type, stage.schedule.warmup_steps) == ("cosine", 3000)
        assert (stage.optimizer.betas, stage.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
        assert stage.optimizer.gradient_clipping == 1.0


@pytest.mark.parametrize("size", LATE)
def test_late_growths_follow_the_paper_on_zero_and_one_layers(size: str) -> None:
    """arXiv 2511.04981: one layer, random new layers at 80%, 2% warm-up, 10% decay, same rate."""
    run = load_run(CONFIGS / f"late-{size}.yaml")
    (scratch,) = load_run(CONFIGS / f"scratch-{size}.yaml").stages
    base, target = run.stages
    assert base.model == load_model(f"llama-{size}-1l") and base.model.num_hidden_layers == 1
    assert target.model == scratch.model
    assert target.growth is not None and target.growth.operator == ["random_depth"]
    assert not is_masked(target.growth) and target.growth.optimizer_state is None
    total = base.tokens + target.tokens
    assert total == pytest.approx(scratch.tokens, rel=1e-5)
    assert base.tokens == pytest.approx(0.8 * total, rel=1e-4)
    peak, low = scratch.optimizer.lr, scratch.optimizer.min_lr
    assert rate_at(run, 0, round(0.01 * total)) == pytest.approx(peak / 2, rel=0.01)
    assert rate_at(run, 0, round(0.021 * total)) == rate_at(run, 1, 0) == peak
    assert rate_at(run, 1, round(0.09 * total)) == peak
    middle = rate_at(run, 1, round(0.15 * total))
    assert middle == pytest.approx((peak + low) / 2, rel=0.01)


def test_what_is_known_of_the_1_1b_run_alone() -> None:
    base, target = load_run(CONFIGS / "gstack-1.1b.yaml").stages
    assert (base.optimizer.lr, base.optimizer.min_lr) == (1e-3, 1e-4)
    assert base.schedule.horizon_tokens == target.schedule.horizon_tokens == 300_000 * STEP


@pytest.mark.parametrize("axis", ["depth", "width"])
@pytest.mark.parametrize("name", ["direct", "learn", "zero", "random"])
def test_the_eight_operators_differ_in_nothing_else(name: str, axis: str) -> None:
    run = load_run(CONFIGS / "operators" / f"{name}-{axis}.yaml")
    gstack = load_run(CONFIGS / "gstack-1.1b.yaml")
    plan = plan_run(run, 8)
    base, target = run.stages
    growth = target.growth
    assert growth is not None and growth.operator == [f"{name}_{axis}"]
    assert base.model == load_model("llama-1.1b-6l" if axis == "depth" else "llama-410m")
    assert plan.stages[1].growth is not None
    assert plan.stages[1].growth.factor == pytest.approx(4, rel=1e-3)
    assert plan.stages[1].growth.state == "reset"
    assert base.tokens == gstack.stages[0].tokens
    own = {"name": gstack.name, "output_dir": gstack.output_dir, "stages": gstack.stages}
    assert run.model_copy(update=own) == gstack
    assert target.model_copy(update={"growth": gstack.stages[1].growth}) == gstack.stages[1]
    learn = growth.learn
    assert (learn.steps, learn.lr, learn.min_lr, learn.warmup_steps) == (100, 7e-5, 7e-6, 50)


def test_there_is_no_operator_of_the_paper_without_a_recipe() -> None:
    there = {path.stem.replace("-", "_") for path in (CONFIGS / "operators").glob("*.yaml")}
    assert there == set(list(OPERATORS)[:8])
