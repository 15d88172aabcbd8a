"""`megagrow convert` for checkpoints of other programs."""

import pytest
import yaml
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import differences, expected_shards, shards, write_checkpoint
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

MODEL = tiny(num_key_value_heads=2)
LAYOUT = layout_of(MODEL, 3, 2, 2)


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("program", ["universal", "megatron"])
def test_export_and_import(tmp_path, program):
    state = random_state(parameter_plan(MODEL, 1))
    write_checkpoint(tmp_path / "in", MODEL, LAYOUT, state)
    options = ("--tp", 2, "--make-vocab-size-divisible-by", 8) if program == "megatron" else ()
    output = convert(f"{program}-export", tmp_path / "in", tmp_path / "out", *options)
    assert "written and checked" in " ".join(output.split())
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MODEL.model_dump()))
    back = tmp_path / "back"
    layout = ("--zero-stage", 3, "--dp", 2, "--tp", 2, "--model", tmp_path / "m.yaml")
    convert(f"{program}-import", tmp_path / "out", back, *layout)
    if program == "megatron":
        for kinds in state.values():
            for kind in ("exp_avg", "exp_avg_sq"):
                kinds[kind].zero_()
    assert not differences(shards(back), expected_shards(LAYOUT, state))


def test_missing_sources_are_reported(tmp_path):
    for command in ("universal-import", "megatron-import"):
        with pytest.raises(InputError, match=r"nothing: has n"):
            convert(command, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(InputError, match=r"nothing: no such directory"):
        convert("universal-export", tmp_path / "nothing", tmp_path / "out")
