"""Universal Checkpoints as files: what is written is read again, and what is wrong is named."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
from rich.console import Console

from megagrow.checkpoint.source import open_checkpoint
from megagrow.errors import InputError
from megagrow.formats.deepspeed_universal import open_universal
from megagrow.offline.convert import export_universal, import_universal
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import (
    RUN,
    differences,
    expected_shards,
    read_manifest,
    shards,
    write_checkpoint,
)
from tests.helpers.formats.malicious import Malicious
from tests.helpers.hugging_face import hugging_face, tiny
from tests.helpers.reshard.definition import State, random_state, storage_of
from tests.helpers.reshard.models import layout_of

MODEL = tiny(num_key_value_heads=2)
STEP = f"global_step{RUN['counters']['step']}_universal"
NORM = "model.norm.weight"


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def state() -> State:
    return random_state(parameter_plan(MODEL, 1))


@pytest.fixture
def folder(tmp_path, state) -> Path:
    """The folder of one step, of ours."""
    write_checkpoint(tmp_path / "in", MODEL, layout_of(MODEL, 2, 3, 2), state)
    export_universal(tmp_path / "in", tmp_path / "out", quiet())
    return tmp_path / "out" / STEP


def take_in(path: Path, out: Path, **changes: Any) -> None:
    options: dict[str, Any] = {"to": None, "zero_stage": 3, "dp": 4, "tp": 1}
    options |= {"weight_decay_on": "all", "memory": "64MiB"} | changes
    import_universal(Request(form="checkpoint", source=path, out=out, **options), quiet())


def test_what_is_written_comes_back_with_its_run(folder, state, tmp_path):
    assert (folder.parent / "latest_universal").read_text() == STEP
    take_in(folder.parent, tmp_path / "back")
    assert not differences(
        shards(tmp_path / "back"), expected_shards(layout_of(MODEL, 3, 4, 1), state)
    )
    manifest = read_manifest(tmp_path / "back")
    assert manifest.adam_step == 11 and manifest.environment["git_commit"] == "abc"
    assert manifest.run["counters"]["tokens"] == RUN["counters"]["tokens"]


def test_files_are_those_of_the_definition(folder, state):
    zero = folder / "zero"
    assert {path.name for path in zero.iterdir()} == {*state, "optimizer_state.pt"}
    for name, kinds in state.items():
        found = {path.stem: torch.load(path, weights_only=True) for path in (zero / name).iterdir()}
        assert found.keys() == {*kinds, "step"} and found["step"] == 11
        for kind, values in kinds.items():
            param = found[kind]["param"]
            assert torch.equal(param, values.flatten() if name.endswith("norm.weight") else values)
            row_parallel = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert found[kind]["cat_dim"] == int(row_parallel)
            vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            assert found[kind].get("vocab_tensor", False) == vocabulary


class Fragment:
    """Attributes that DeepSpeed sets on a parameter of a single data-parallel rank."""

    def __init__(self, numel: int) -> None:
        self.lp_fragment_address = SimpleNamespace(start=0, numel=numel)
        self.values = torch.full((numel,), torch.nan)

    def get_hp_fragment(self) -> torch.Tensor:
        return self.values


@pytest.mark.parametrize("rank", [0, 1])
def test_deepspeed_cuts_them_for_tensor_parallelism_as_we_do(folder, state, rank):
    layout = layout_of(MODEL, 0, 1, 2)
    for name, kinds in storage_of(layout, state, rank).items():
        spec = layout.plan[name]
        shape = spec.slice_shape(2)[:1] if spec.is_vector else spec.slice_shape(2)
        parameter = torch.nn.Parameter(torch.empty(shape))
        parameter._hp_mapping = fragment = Fragment(parameter.numel())
        step = load_hp_checkpoint_state(parameter, str(folder / "zero" / name), rank, 2)
        assert step == 11 and torch.equal(fragment.values, kinds["fp32"]), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fragment.optim_fragment[kind], kinds[kind]), (name, kind)


def test_a_hugging_face_model_gets_moments_of_zero(tmp_path):
    hugging_face(MODEL).save_pretrained(tmp_path / "in")
    export_universal(tmp_path / "in", tmp_path / "out", quiet())
    take_in(tmp_path / "out", tmp_path / "back")
    source = open_checkpoint(tmp_path / "back")
    assert source.adam_step == 0
    for name, tensors in shards(tmp_path / "back").items():
        for key, values in tensors.items():
            assert bool(values.any()) == key.endswith(".fp32"), (name, key)


def save(path: Path, value: Any) -> None:
    torch.save(value, path)


def test_without_its_model_one_has_to_be_named(folder, tmp_path, state):
    (folder / "megagrow.json").unlink()
    with pytest.raises(InputError, match=r"does not record its model; pass it with --model"):
        take_in(folder, tmp_path / "back")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MODEL.model_dump()))
    take_in(folder, tmp_path / "back", to=str(tmp_path / "m.yaml"))
    assert not differences(
        shards(tmp_path / "back"), expected_shards(layout_of(MODEL, 3, 4, 1), state)
    )


def test_files_that_do_not_hold_the_model_are_named(folder):
    other = MODEL.model_copy(update={"num_hidden_layers": 1})
    with pytest.raises(InputError, match=r"megagrow.json: records a model other than"):
        open_universal(folder, other)
    path = folder / "zero" / NORM / "fp32.pt"
    for value, said in (
        (
            {"param": torch.ones(31)},
            r"fp32.pt: model.norm.weight has shape \[31\], .* requires \[32\]",
        ),
        (
            {"param": torch.ones(32, dtype=torch.int32)},
            r"fp32.pt: has dtype torch.int32,",
        ),
        ({"other": torch.ones(32)}, r"fp32.pt: has no tensor 'param'"),
    ):
        save(path, value)
        with pytest.raises(InputError, match=said):
            open_universal(folder, None)


def test_a_parameter_or_state_that_would_not_be_read_is_refused(folder):
    save(folder / "zero" / NORM / "max_exp_avg_sq.pt", {"param": torch.ones(32)})
    with pytest.raises(InputError, match=r"norm.weight: contains max_exp_avg_sq.pt, a state that"):
        open_universal(folder, None)
    (folder / "zero" / NORM / "max_exp_avg_sq.pt").unlink()
    (folder / "zero" / "model.layers.0.self_attn.q_proj.bias").mkdir()
    with pytest.raises(InputError, match=r"q_proj.bias: a parameter that this model does not have"):
        open_universal(folder, None)


@pytest.mark.parametrize("name", ["fp32", "bf16", "other"])
def test_the_head_that_deepspeed_adds_to_a_tied_model_has_to_be_its_embedding(tmp_path, name):
    model = MODEL.model_copy(update={"tie_word_embeddings": True})
    state = random_state(parameter_plan(model, 1))
    write_checkpoint(tmp_path / "in", model, layout_of(model, 1, 1, 1), state)
    export_universal(tmp_path / "in", tmp_path / "out", quiet())
    embedding = state["model.embed_tokens.weight"]["fp32"]
    heads = {"fp32": embedding, "bf16": embedding.bfloat16().float(), "other": embedding.flip(0)}
    head = tmp_path / "out" / STEP / "zero" / "lm_head.weight"
    head.mkdir()
    save(head / "fp32.pt", {"param": heads[name]})
    if name == "other":
        with pytest.raises(InputError, match=r"lm_head.weight: a parameter that this model does"):
            open_universal(tmp_path / "out", None)
    else:
        assert open_universal(tmp_path / "out", None).model == model


def test_moments_and_steps_belong_together(folder):
    path = folder / "zero" / NORM
    save(path / "step.pt", torch.tensor(12.0))
    with pytest.raises(InputError, match=r"Adam's steps differ: 11 in .*, 12 in .*norm"):
        open_universal(folder, None)
    save(path / "step.pt", "twelve")
    with pytest.raises(InputError, match=r"step.pt: not a step count"):
        open_universal(folder, None)
    (path / "exp_avg.pt").unlink()
    with pytest.raises(InputError, match=r"norm.weight/exp_avg.pt: missing, although other"):
        open_universal(folder, None)
    for moment in (folder / "zero").glob("*/exp_avg*.pt"):
        moment.unlink()
    source = open_universal(folder, None)
    assert source.kinds == ("fp32",) and source.adam_step == 0


def test_code_in_a_file_is_refused_and_not_run(folder, tmp_path):
    save(folder / "zero" / NORM / "exp_avg.pt", {"param": Malicious(tmp_path / "ran")})
    with pytest.raises(InputError, match=r"exp_avg.pt: refused, it refers to posix.mkdir"):
        take_in(folder, tmp_path / "back")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "back").exists()


def test_names_can_not_lead_out_of_the_folder(folder, tmp_path):
    (folder.parent / "latest_universal").write_text(f"../{folder.parent.name}/{STEP}")
    with pytest.raises(InputError, match=r"'../out/.*' is not the name of a folder next to it"):
        open_universal(folder.parent, None)
    with pytest.raises(InputError, match=r"has neither zero/ nor latest_universal"):
        open_universal(tmp_path, None)


def test_what_stands_beside_is_checked(folder):
    whole = json.loads((folder / "megagrow.json").read_text())
    for about, said in (
        ({"model": 3}, "damaged"),
        (whole | {"run": [1]}, "damaged"),
        (whole | {"environment": None}, "damaged"),
        (whole | {"model": whole["model"] | {"hidden_size": 0}}, "hidden_size"),
    ):
        (folder / "megagrow.json").write_text(json.dumps(about))
        with pytest.raises(InputError, match=rf"megagrow.json: .*{said}"):
            open_universal(folder, None)
