"""Megatron-LM's layout, against a permutation written here from its definition, and back."""

import argparse
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.formats.megatron import open_megatron
from megagrow.offline.convert import export_megatron, import_megatron
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Block
from tests.helpers.checkpoint.written import RUN, write_checkpoint
from tests.helpers.formats.megatron_args import ARGS
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import State, random_state
from tests.helpers.reshard.models import layout_of

MODELS = {  # vocabulary 101
    "mha": tiny(),
    "gqa": tiny(num_key_value_heads=2),
    "tied": tiny(num_key_value_heads=2, tie_word_embeddings=True),
    "head_dim": tiny(head_dim=12, num_key_value_heads=2),
}


def expected(model: ModelConfig, state: State, tp: int, rank: int, multiple: int) -> dict:
    """A rank's tensors, head by head and row by row."""
    heads, groups, width = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    found: dict[str, Tensor] = {}

    def weight(name: str) -> Tensor:
        return state[f"{name}.weight"]["fp32"]

    def padded(table: Tensor) -> Tensor:
        rows = list(table)
        while len(rows) % (multiple * tp):
            rows.append(torch.zeros(model.hidden_size))
        return torch.stack(rows).chunk(tp)[rank]

    found["embedding.word_embeddings.weight"] = padded(weight("model.embed_tokens"))
    for layer in range(model.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"decoder.layers.{layer}"
        q, k, v = (weight(f"{ours}.self_attn.{x}_proj") for x in "qkv")
        rows = []
        for group in range(groups):
            if group // (groups // tp) != rank:
                continue
            for head in range(heads):
                if head // (heads // groups) == group:
                    rows += [q[head * width + i] for i in range(width)]
            rows += [k[group * width + i] for i in range(width)]
            rows += [v[group * width + i] for i in range(width)]
        found[f"{theirs}.self_attention.linear_qkv.weight"] = torch.stack(rows)
        norm = weight(f"{ours}.input_layernorm").flatten()
        found[f"{theirs}.self_attention.linear_qkv.layer_norm_weight"] = norm
        o = weight(f"{ours}.self_attn.o_proj").chunk(tp, dim=1)[rank]
        found[f"{theirs}.self_attention.linear_proj.weight"] = o
        norm = weight(f"{ours}.post_attention_layernorm").flatten()
        found[f"{theirs}.mlp.linear_fc1.layer_norm_weight"] = norm
        gate, up = (weight(f"{ours}.mlp.{x}_proj").chunk(tp)[rank] for x in ("gate", "up"))
        found[f"{theirs}.mlp.linear_fc1.weight"] = torch.cat([gate, up])
        down = weight(f"{ours}.mlp.down_proj").chunk(tp, dim=1)[rank]
        found[f"{theirs}.mlp.linear_fc2.weight"] = down
    found["decoder.final_layernorm.weight"] = weight("model.norm").flatten()
    if not model.tie_word_embeddings:
        found["output_layer.weight"] = padded(weight("lm_head"))
    return found


def give_out(source: Path, out: Path, **options: Any) -> None:
    console = Console(file=io.StringIO())
    export_megatron(source, out, **{"divisible_by": 8, "dtype": "float32"} | options,
                    console=console)  # fmt: skip


def take_in(source: Path, out: Path, model: str | None = None) -> Source:
    options = {"zero_stage": 2, "dp": 3, "tp": 1, "weight_decay_on": "all", "memory": "64MiB"}
    import_megatron(
        Request(form="checkpoint", source=source, out=out, to=model, **options), Console(quiet=True)
    )
    return open_checkpoint(out)


def assert_weights(source: Source, state: State, dtype: torch.dtype = torch.float32) -> None:
    for name, spec in source.layout.plan.items():
        block = Block(range(spec.rows), range(spec.cols))
        wanted = state[name]["fp32"].to(dtype).float()
        assert torch.equal(source.read(name, "fp32", block), wanted), name
        if "exp_avg" in source.kinds:
            assert not source.read(name, "exp_avg", block).any()


def write(path: Path, name: str, zero: int = 3) -> State:
    model = MODELS[name]
    state = random_state(parameter_plan(model, 1))
    write_checkpoint(path, model, layout_of(model, zero, 3, 1), state)
    return state


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_files_hold_what_the_definition_says_and_come_back(tmp_path, name, tp):
    model, state = MODELS[name], write(tmp_path / "in", name)
    give_out(tmp_path / "in", tmp_path / "out", tp=tp)
    step = RUN["counters"]["step"]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == str(step)
    for rank in range(tp):
        path = tmp_path / "out" / f"iter_{step:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, weights_only=True)
        wanted = expected(model, state, tp, rank, 8)
        assert found["model"].keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(found["model"][key], tensor), key
        args = found["args"]
        assert args.padded_vocab_size == {1: 104, 2: 112}[tp] and args.vocab_size == 101
        assert args.tensor_model_parallel_size == tp and found["iteration"] == step
        assert args.group_query_attention == (name != "mha")
    source = open_megatron(tmp_path / "out", None)
    assert source.model == model
    assert_weights(source, state)
    back = take_in(tmp_path / "out", tmp_path / "back")
    assert_weights(back, state)
    assert back.model == model and back.adam_step == 0 and back.layout.zero_stage == 2


def test_parts_of_tensors_are_read(tmp_path):
    state = write(tmp_path / "in", "gqa")
    give_out(tmp_path / "in", tmp_path / "out", tp=2)
    source = open_megatron(tmp_path / "out", None)
    for name, spec in source.layout.plan.items():
        rows = range(spec.rows // 3, spec.rows - 1)
        cols = range(spec.cols) if spec.is_vector else range(spec.cols // 4, spec.cols - 3)
        whole = state[name]["fp32"]
        wanted = whole[rows.start : rows.stop, cols.start : cols.stop]
        assert torch.equal(source.read(name, "fp32", Block(rows, cols)), wanted), name


def test_weights_are_rounded_to_the_type_that_is_asked_for(tmp_path):
    state = write(tmp_path / "in", "gqa")
    give_out(tmp_path / "in", tmp_path / "out", tp=2, dtype="bfloat16")
    assert_weights(open_megatron(tmp_path / "out", None), state, torch.bfloat16)


OLD = {
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "output_layer.weight": "output_layer.weight",
    "decoder.final_layernorm.weight": "encoder.final_norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_norm.weight",
    "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
    "self_attention.linear_proj.weight": "self_attention.dense.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_norm.weight",
    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
}


def write_old(folder: Path, state: State, **changes: Any) -> Path:
    """A release as Megatron-LM wrote it before its core, with a dict for each part of the model."""
    for rank in range(2):
        tree: dict[str, Any] = {"embedding": {}, "encoder": {}, "output_layer": {}}
        for key, tensor in expected(MODELS["gqa"], state, 2, rank, 64).items():
            layer, found = "", key
            if ".layers." in key:
                _, _, number, found = key.split(".", 3)
                layer = f"encoder.layers.{number}."
            part, _, rest = f"{layer}{OLD[found]}".partition(".")
            tree[part][rest] = tensor.clone()
        tree["embedding"] = {"word_embeddings": {"weight": tree["embedding"].popitem()[1]}}
        tree["encoder"]["layers.0.self_attention.core_attention._extra_state"] = None
        value = {
            "args": argparse.Namespace(**ARGS),
            "checkpoint_version": 3.0,
            "iteration": "release",
            "model": {"language_model": tree},
            "optimizer": {"state": [torch.ones(3)]},
        }
        path = folder / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value | changes, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    return folder


def test_names_of_the_older_generation_are_read(tmp_path):
    state = random_state(parameter_plan(MODELS["gqa"], 1))
    write_old(tmp_path / "in", state)
    with pytest.raises(InputError, match=r"arguments lack vocab_size.*--model"):
        open_megatron(tmp_path / "in", None)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MODELS["gqa"].model_dump()))
    assert_weights(take_in(tmp_path / "in", tmp_path / "out", str(tmp_path / "m.yaml")), state)
    write_old(tmp_path / "known", state, args=argparse.Namespace(**ARGS, vocab_size=101))
    source = open_megatron(tmp_path / "known", None)
    assert source.model == MODELS["gqa"] and len(source.warnings) == 1
    assert source.warnings[0].endswith("its optimizer state is not read; the moments are zero")


def test_files_that_do_not_hold_the_model_are_named(tmp_path):
    model = MODELS["gqa"]
    state = random_state(parameter_plan(model, 1))
    folder = write_old(tmp_path / "a", state, checkpoint_version=1.0)
    with pytest.raises(InputError, match=r"mp_rank_00.*checkpoint_version 1.0 is not supported"):
        open_megatron(folder, model)
    folder = write_old(tmp_path / "b", state)
    with pytest.raises(InputError, match=r"arguments have intermediate_size = 48, .* has 40"):
        open_megatron(folder, model.model_copy(update={"intermediate_size": 40}))
    folder = write_old(tmp_path / "b", state, args=None)
    with pytest.raises(
        InputError, match=r"fc1.weight has shape \[48, 32\], .* requires \[40, 32\]"
    ):
        open_megatron(folder, model.model_copy(update={"intermediate_size": 40}))
    with pytest.raises(InputError, match=r"contains decoder.layers.1.* does not have"):
        open_megatron(folder, model.model_copy(update={"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"does not contain decoder.layers.2"):
        open_megatron(folder, model.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"num_key_value_heads = 1 is not divisible"):
        open_megatron(folder, model.model_copy(update={"num_key_value_heads": 1}))
    with pytest.raises(InputError, match=r"has 128 rows, fewer than the 129 tokens"):
        open_megatron(folder, model.model_copy(update={"vocab_size": 129}))
    (folder / "release" / "mp_rank_01").rename(folder / "release" / "mp_rank_00_001")
    with pytest.raises(InputError, match=r"mp_rank_00_001: .*pipeline-parallel"):
        open_megatron(folder, model)
    (folder / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(InputError, match=r"is not the name of a folder next to it"):
        open_megatron(folder, model)
    with pytest.raises(InputError, match=r"has no mp_rank_00/model_optim_rng.pt"):
        open_megatron(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model1": {"x": torch.ones(2)}}, "'model1' contains tensors that are not read"),
        ({"ema": [{"x": torch.ones(2)}]}, "'ema' contains tensors that are not read"),
        ({"model": {"x": [torch.ones(2)]}}, "x is of <class 'list'>, not a tensor"),
        ({"model": {"a.input_norm.weight": torch.ones(2), "a.input_layernorm.weight":
          torch.ones(2)}}, "twice, under two names"),
        ({"args": argparse.Namespace(**ARGS | {"norm_epsilon": 1e-6})}, "rms_norm_eps = 1e-06"),
    ],
)  # fmt: skip
def test_what_would_not_be_read_is_refused(tmp_path, changes, said):
    state = random_state(parameter_plan(MODELS["gqa"], 1))
    folder = write_old(tmp_path, state, **changes)
    with pytest.raises(InputError, match=r"mp_rank_00.model_optim_rng.pt: ") as error:
        open_megatron(folder, MODELS["gqa"])
    assert said in str(error.value)


def test_what_can_not_be_written_is_said_before_anything_is(tmp_path):
    write(tmp_path / "in", "gqa")
    with pytest.raises(InputError, match=r"--tp 4: num_key_value_heads = 2 is not divisible"):
        give_out(tmp_path / "in", tmp_path / "out", tp=4)
    with pytest.raises(InputError, match=r"--dtype int8"):
        give_out(tmp_path / "in", tmp_path / "out", tp=1, dtype="int8")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out: already exists"):
        give_out(tmp_path / "in", tmp_path / "out", tp=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
