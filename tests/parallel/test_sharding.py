"""The one table of parameters against Hugging Face's shapes, and its slices against the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagrow.model.decoder import CausalLM
from megagrow.model.layers.base import VOCAB
from megagrow.parallel.sharding import pad, parameter_plan
from tests.helpers.hugging_face import hugging_face, tiny
from tests.helpers.reshard.models import models


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_shapes_are_hugging_faces(kv_heads, tied):
    config = tiny(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    expected = {name: tuple(p.shape) for name, p in hugging_face(config).named_parameters()}
    plan = parameter_plan(config, tp=1)
    shapes = {
        name: (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)
        for name, spec in plan.items()
    }
    assert shapes == expected
    assert all(spec.name == name for name, spec in plan.items())


def test_order_is_that_of_the_module_tree():
    config = tiny(num_key_value_heads=2)
    with torch.device("meta"):
        model = CausalLM(config)
    assert list(parameter_plan(config, tp=1)) == [name for name, _ in model.named_parameters()]


def test_layers_and_initial_deviations():
    plan = parameter_plan(tiny(initializer_range=0.5, num_hidden_layers=8), tp=1)
    for name, spec in plan.items():
        assert spec.layer == (int(name.split(".")[2]) if ".layers." in name else None)
        output = "o_proj" in name or "down_proj" in name
        distribution = "constant" if "norm" in name else "normal"
        expected = 1 if "norm" in name else 0.5 / math.sqrt(16) if output else 0.5
        assert spec.initial.distribution == distribution, name
        assert spec.initial.scale == pytest.approx(expected), name


@given(models(), st.sampled_from([1, 2, 4]))
def test_slices_tile_the_padded_tensor(config, tp):
    for spec in parameter_plan(config, tp).values():
        cover = torch.zeros(spec.padded_rows, spec.cols, dtype=torch.int)
        for tp_rank in range(tp):
            row, col = spec.slice_origin(tp, tp_rank)
            rows, cols = spec.slice_shape(tp)
            assert rows * cols == spec.slice_numel(tp)
            assert row + rows <= spec.padded_rows and col + cols <= spec.cols
            cover[row : row + rows, col : col + cols] += 1
        assert (cover == (tp if spec.tp_dim is None else 1)).all(), spec


@given(models(), st.sampled_from([1, 2, 4]))
def test_only_the_vocabulary_is_padded_and_as_little_as_possible(config, tp):
    for spec in parameter_plan(config, tp).values():
        if spec.row_role.axis == VOCAB:
            assert spec.padded_rows % tp == 0
            assert 0 <= spec.padded_rows - spec.rows < tp
        else:
            assert spec.padded_rows == spec.rows


def test_what_is_sliced_how():
    # Megatron-LM: column-parallel weights (out, in) are cut by rows, row-parallel ones by columns.
    sliced = {
        name.split(".")[-2]: spec.tp_dim for name, spec in parameter_plan(tiny(), tp=2).items()
    }
    by_rows = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    norms = ("norm", "input_layernorm", "post_attention_layernorm")
    expected = dict.fromkeys(by_rows, 0) | dict.fromkeys(("o_proj", "down_proj"), 1)
    assert sliced == expected | dict.fromkeys(norms)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_pad(size, multiple):
    assert pad(size, multiple) % multiple == 0
    assert size <= pad(size, multiple) < size + multiple
