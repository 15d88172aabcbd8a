"""Loading a single model, by path or by name."""

from pathlib import Path

import pytest

from megagrow.config.model_file import is_run_file, load_model
from megagrow.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_model_is_found_by_its_name_and_by_its_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    by_name = load_model("llama-7b-8l")
    assert by_name == load_model(str(CONFIGS / "model" / "llama-7b-8l.yaml"))
    assert by_name.num_hidden_layers == 8
    assert by_name.hidden_size == load_model("llama-7b").hidden_size == 4096
    (tmp_path / "mine.yaml").write_text("base: llama-7b\nnum_hidden_layers: 3\n")
    assert load_model("mine.yaml").num_hidden_layers == 3
    # Models in the current directory's model/ are found, as for run files.
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.yaml").rename(tmp_path / "model" / "mine.yaml")
    assert load_model("mine").num_hidden_layers == 3


def test_run_files_are_told_from_models():
    assert is_run_file(str(CONFIGS / "demo" / "gstack.yaml"))
    assert not is_run_file(str(CONFIGS / "model" / "llama-7b.yaml"))
    assert not is_run_file("llama-7b")


def test_a_model_that_can_not_be_is_refused(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("base: llama-7b\nnum_attention_heads: 31\nnum_key_value_heads: 31\n")
    with pytest.raises(InputError, match=r"model\.yaml: model.hidden_size = 4096 is not divisible"):
        load_model(str(path))


@pytest.mark.parametrize("layer_types", ["", "layer_types: [mamba, sliding_attention]\n"])
def test_layer_types_divide_the_layers_given_or_by_default(tmp_path, layer_types):
    # A checkpoint stores the list, so a default that is refused there must be refused here.
    path = tmp_path / "model.yaml"
    path.write_text(f"base: samba-demo-12l\nnum_hidden_layers: 3\n{layer_types}")
    message = r"'layer_types': .*has 2 entries, which do not divide num_hidden_layers = 3"
    with pytest.raises(InputError, match=message):
        load_model(str(path))
