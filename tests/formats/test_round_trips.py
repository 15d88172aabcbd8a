"""Random models go through every format and come back: equal logits, configs and files."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megagrow.checkpoint.source import open_checkpoint
from megagrow.errors import InputError
from megagrow.formats.hugging_face_config import model_of
from megagrow.formats.hugging_face_families import FAMILIES
from megagrow.model.decoder import CausalLM
from megagrow.offline.convert import (
    export_hugging_face,
    export_megatron,
    export_universal,
    import_hugging_face,
    import_megatron,
    import_universal,
)
from megagrow.offline.request import Request
from megagrow.reshard.layout import Block
from tests.helpers.hugging_face import OLD

LENGTH = 40
QUIET = Console(quiet=True)
MEGATRON = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MEGATRON |= {"original_max_position_embeddings": 8192}
"""The only llama3 scaling that Megatron-LM has, besides its factor."""


def rope(rng: random.Random) -> dict[str, Any]:
    """RoPE keys of one type, in one of transformers' spellings."""
    theta, factor = rng.choice([100.0, 10_000.0, 5e5]), rng.choice([1.0, 2.0, 4.5])
    original = {"original_max_position_embeddings": rng.choice([8, 16])}
    kind, keys = rng.choice([
        ("default", {}),
        ("linear", {}),
        ("dynamic", rng.choice([{}, original])),
        ("llama3", MEGATRON),
        ("llama3", {"low_freq_factor": 1, "high_freq_factor": 3.5} | original),
        ("yarn", original | rng.choice([{}, {"attention_factor": 1.3, "beta_fast": 16}])),
        ("yarn", original | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}),
        ("yarn", {"finetuned": True}),
    ])  # fmt: skip
    keys = keys | {"factor": factor} if kind != "default" else {}
    match rng.choice(["old", "older", "new"]):
        case "new":
            return {"rope_parameters": keys | {"rope_type": kind, "rope_theta": theta}}
        case "old":
            scaling = keys | {"rope_type": kind}
        case _:
            scaling = keys | {"type": kind}
    return {"rope_theta": theta, "rope_scaling": scaling if keys else None}


def config(rng: random.Random) -> dict[str, Any]:
    """A random config.json of a small Llama."""
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([1, 2, 4])
    width = 2 * rng.randint(2, 6)
    sizes = {"head_dim": rng.choice([width, width + 4])}
    if rng.random() < 0.3 and groups == heads:
        groups = None
    return {
        **sizes,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * width,
        "intermediate_size": rng.randint(5, 60),
        "vocab_size": rng.choice([40, 101, 128, 257]),
        "max_position_embeddings": rng.choice([32, 64]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "initializer_range": rng.choice([0.02, 0.006]),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": rng.choice([None, 1]),
        "eos_token_id": rng.choice([2, [2, 3]]),
        "pad_token_id": rng.choice([None, 0]),
        "pretraining_tp": 1,
        "note": rng.choice([None, "kept", {"a": [1]}]),
        "torch_dtype": rng.choice(["float32", "bfloat16", "float16"]),
        **rope(rng),
    }


@cache
def tokenizer() -> str:
    words = {word: number for number, word in enumerate(("a", "<s>", "</s>", "b"))}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.add_special_tokens(["<s>", "</s>"])
    return made.to_str()


def write(folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """A random model with its files; returns its config.json."""
    rng = random.Random(seed)
    made = config(rng) | changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(made))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.3)
    model.to(getattr(torch, made["torch_dtype"]))
    model.save_pretrained(folder, max_shard_size=rng.choice(["5GB", "10KB"]))
    documents = {
        "config.json": made,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "chat_template": "{{ messages }}",
        },
        "generation_config.json": {"eos_token_id": made["eos_token_id"], "top_k": 7},
    }
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer.json").write_text(tokenizer())
    (folder / "README.md").write_text(f"# Model {seed}")
    return made


def logits(folder: Path) -> tuple[Any, torch.Tensor]:
    """transformers' model of a folder, in fp32, and its logits of random tokens."""
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(problems.values()), problems
    ids = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, model.eval()(ids, use_cache=False).logits


def request(source: Path, out: Path, form: str = "checkpoint", **options: Any) -> Request:
    return Request(source=source, out=out, form=form, memory="20MiB", **options)


def own_logits(checkpoint: Path) -> torch.Tensor:
    """megagrow's logits of the same tokens."""
    source = open_checkpoint(checkpoint)
    model = CausalLM(source.model)
    values = {
        name: source.read(name, "fp32", Block(range(spec.rows), range(spec.cols)))
        for name, spec in source.layout.plan.items()
    }
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    values = {name: t.view(shapes[name]) for name, t in values.items()}
    values.setdefault("lm_head.weight", values["model.embed_tokens.weight"])
    model.load_state_dict(values)
    ids = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, torch.arange(LENGTH).expand(2, -1))


def effective(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys of a config that transformers has read; RoPE keys without effect are left out."""
    values = config.to_dict()
    known = {"finetuned", "type"}
    if config.rope_parameters["rope_type"] == "dynamic":
        known.add("original_max_position_embeddings")
    rope = {key: value for key, value in config.rope_parameters.items() if key not in known}
    unequal = ("transformers_version", "_name_or_path")
    return values | {"rope_parameters": rope} | dict.fromkeys(unequal)


def assert_equal(out: Path, source: Path) -> None:
    """transformers computes the same from both folders, bit for bit, and finds the same files."""
    (ours, found), (theirs, wanted) = logits(out), logits(source)
    assert torch.equal(found, wanted)
    assert effective(ours.config) == effective(theirs.config)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert json.loads((out / "config.json").read_text())["note"] == theirs.config.note
    assert (out / "README.md").read_text() == (source / "README.md").read_text()
    mine, other = (AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert mine("a</s>b").input_ids == other("a</s>b").input_ids == [0, 2, 3]
    assert mine.chat_template == other.chat_template == "{{ messages }}"


FAMILIES_OF = {
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"use_sliding_window": False, "max_window_layers": 28},
    "olmo2": {},
}
"""Keys of config.json by `model_type`."""

NO_LAYERS = {"num_hidden_layers": 0}


@pytest.mark.parametrize("name", ["llama", *FAMILIES_OF])
def test_a_model_without_layers_comes_back_equal(tmp_path, name):
    keys = {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    keys |= FAMILIES_OF.get(name, {}) | NO_LAYERS
    assert_comes_back_equal(tmp_path, 24, write(tmp_path / "in", 24, **keys))


@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_comes_back_equal(tmp_path, seed):
    assert_comes_back_equal(tmp_path, seed, write(tmp_path / "in", seed))


@pytest.mark.parametrize("seed", [20, 21])
@pytest.mark.parametrize("name", FAMILIES_OF)
def test_a_random_model_of_each_family_comes_back_equal(tmp_path, name, seed):
    keys = {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    made = write(tmp_path / "in", seed, **keys, **FAMILIES_OF[name])
    assert_comes_back_equal(tmp_path, seed, made)


def assert_comes_back_equal(tmp_path: Path, seed: int, made: dict[str, Any]) -> None:
    """Import the folder `in`, compare logits, and export it again."""
    layout = {"zero_stage": seed % 4, "dp": 1 + seed % 3}
    import_hugging_face(request(tmp_path / "in", tmp_path / "ours", **layout), QUIET)
    _, wanted = logits(tmp_path / "in")
    assert (own_logits(tmp_path / "ours") - wanted).abs().max() < 1e-4
    last = tmp_path / "ours"
    if seed % 4 == 0:
        export_universal(last, tmp_path / "universal", QUIET)
        last = tmp_path / "from-universal"
        import_universal(request(tmp_path / "universal", last, zero_stage=1, dp=1, tp=1), QUIET)
    form = {"dtype": made["torch_dtype"], "shard_size": "10KB" if seed % 2 else "5GB"}
    export_hugging_face(request(last, tmp_path / "out", "huggingface", **form), QUIET)
    assert_equal(tmp_path / "out", tmp_path / "in")


@pytest.mark.parametrize(("seed", "keys"), [*((n, {}) for n in range(12, 17)), (16, NO_LAYERS)])
def test_a_random_model_goes_through_megatron(tmp_path, seed, keys):
    llama3 = MEGATRON | {"rope_type": "llama3", "factor": 2.0 + seed % 3, "rope_theta": 50.0}
    spelling = {"rope_scaling": None, "rope_parameters": llama3 if seed % 2 else None}
    made = write(tmp_path / "in", seed, **spelling, **keys)
    model = model_of(made, "x")
    tp = 2 if model.num_key_value_heads % 2 == model.intermediate_size % 2 == 0 else 1
    options: dict[str, Any] = {"tp": tp, "divisible_by": 8, "dtype": made["torch_dtype"]}
    export_megatron(tmp_path / "in", tmp_path / "megatron", **options, console=QUIET)
    import_megatron(
        request(tmp_path / "megatron", tmp_path / "ours", zero_stage=3, dp=2, tp=1), QUIET
    )
    export_hugging_face(request(tmp_path / "ours", tmp_path / "out", "huggingface"), QUIET)
    assert torch.equal(logits(tmp_path / "out")[1], logits(tmp_path / "in")[1])


def test_other_model_types_are_refused_by_name():
    for name in CONFIG_MAPPING_NAMES:
        if name not in FAMILIES:
            with pytest.raises(InputError, match=rf"x: model_type = '{name}', supported are llama"):
                model_of(OLD | {"model_type": name}, "x")
