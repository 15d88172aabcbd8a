"""Typical mistakes and their messages: one line that a user can act on without the source code."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from megagrow.cli.app import main
from megagrow.data.prepare import prepare
from tests.helpers.source_tree import ROOT

DRY = "train RUN.yaml --dry-run --set"
HYBRID = "train HYBRID.yaml --dry-run --set"
NO_START = "the run would not start: "

MISTAKES = {
    # The command line.
    "tran RUN.yaml": "No such command 'tran'. Did you mean 'train'?; see megagrow --help",
    "config sho": "No such command 'sho'. Did you mean 'show'?; see megagrow config --help",
    "train": "Missing argument 'run_file'; see megagrow train --help",
    "train RUN.yaml --dryrun": (
        "No such option: --dryrun (Possible options: --dry-run); see megagrow train --help"
    ),
    "train RUN.yaml --world 2": (
        "--world and --rank need --dry-run; the launcher sets them in a real run"
    ),
    "train RUN.yaml --log-level loud": (
        "Invalid value for '--log-level': 'loud' is not one of 'debug', 'info', 'warning', "
        "'error'; see megagrow train --help"
    ),
    "train RUN.yaml --allow-change sed": "--allow-change sed: no such key; did you mean 'seed'?",
    "doctor --set seed=1": "--set changes a key of a run file: give one with --run",
    # The run file.
    "train run.yaml": "run.yaml: no such file; did you mean 'RUN.yaml'?",
    "train none.yaml": "none.yaml: no such file; see megagrow config ls",
    "train text": "text: is a directory; give a run file",
    "train gstack-1b": (
        "run file = 'gstack-1b': gstack-1b.yaml not found; did you mean 'gstack-1.1b'?"
    ),
    "train tab.yaml": "tab.yaml, line 2: contains a tab; indent with spaces",
    "train empty.yaml": "empty.yaml: must contain a mapping of keys to values",
    "train part.yaml": (
        "part.yaml: 'model' is missing; 'data' is missing; 'tokens' is missing; 'batch' is "
        "missing; 'optimizer' is missing"
    ),
    "train stage.yaml": "stage.yaml: 'stages.2' does not exist; the base has 0, 1",
    # Overrides.
    f"{DRY} seed": "--set seed: not an override; use path.to.key=value",
    f"{DRY} optimizer.lr=1e-3": (
        "--set optimizer.lr=1e-3: has no effect, all stages set their own; set "
        "stages.0.optimizer.lr or stages.1.optimizer.lr"
    ),
    f"{DRY} learning_rate=1e-3": (
        "--set learning_rate=1e-3: unknown key 'learning_rate'; did you mean 'optimizer.lr'?"
    ),
    f"{DRY} stages.2.tokens=1M": (
        "--set stages.2.tokens=1M: 'stages' has no index '2'; it has 2 entries, counted from 0"
    ),
    f"{DRY} stages.0.optimizer.lr=fast": (
        "RUN.yaml: 'stages.0.optimizer.lr' = 'fast': should be a valid number"
    ),
    f"{DRY} stages.0.tokens=lots": (
        "RUN.yaml: 'stages.0.tokens' = 'lots': should be a whole number of 0 or more, such as "
        "2048, 2M or 1.5B"
    ),
    f"{DRY} checkpoint.interval=5m": (
        "RUN.yaml: 'checkpoint.interval' = '5m': is ambiguous; write 5min for minutes or 5M for "
        "millions"
    ),
    f"{DRY} logging.profile=[10,12]": (
        "RUN.yaml: 'logging.profile' = [10, 12]: should be a mapping of keys to values"
    ),
    f"{DRY} schedule.type=cosin": (
        "RUN.yaml: 'schedule.type' = 'cosin': should be 'cosine', 'linear', 'wsd' or 'constant'"
    ),
    f"{DRY} hardware=8xh100": (
        "--set hardware=8xh100: 'hardware' = '8xh100': hardware/8xh100.yaml not found; did you "
        "mean '8xh100-7b'?"
    ),
    f"{DRY} batch.global_batch_size=7 --set stages.1.batch.global_batch_size=8": (
        "RUN.yaml: stages.0.batch.global_batch_size = 7 is not divisible by micro_batch_size = 2; "
        "use a divisor of 7"
    ),
    # Growth.
    f"{DRY} stages.1.growth=null": (
        "RUN.yaml: stages.1.model changes num_hidden_layers from 2 to 8; add stages.1.growth, or "
        "set stages.1.model.num_hidden_layers to the value of stages.0"
    ),
    f"{DRY} stages.1.growth.operator=gstak": (
        "RUN.yaml: 'stages.1.growth.operator.0' = 'gstak': not known; did you mean 'gstack'?"
    ),
    f"{DRY} stages.1.growth.operator=lemon": (
        f"{NO_START}stages.1.model changes num_hidden_layers from 2 to 8, which lemon cannot "
        "grow; set stages.1.growth.operator to direct_depth"
    ),
    f"{DRY} stages.1.model.intermediate_size=704": (
        f"{NO_START}stages.1.model changes intermediate_size from 352 to 704, which direct_depth "
        "cannot grow; set stages.1.growth.operator to [direct_depth, direct_width]"
    ),
    f"{DRY} stages.1.model=demo-9l": (
        "--set stages.1.model=demo-9l: 'stages.1.model' = 'demo-9l': model/demo-9l.yaml not "
        "found; did you mean 'demo-8l'?"
    ),
    f"{DRY} stages.1.model.num_hidden_layers=7": (
        f"{NO_START}stages.1.model.num_hidden_layers = 7 is not divisible by "
        "stages.0.model.num_hidden_layers = 2; use a multiple or set stages.1.growth.layer_map"
    ),
    f"{DRY} stages.0.model=demo-8l --set stages.1.model=demo-2l": (
        f"{NO_START}stages.1.model reduces num_hidden_layers from 8 to 2; growth cannot shrink a "
        "model, so use at least the sizes of stages.0.model"
    ),
    # Layer types.
    f"{HYBRID} stages.0.model.model_type=sambo": (
        "HYBRID.yaml: 'stages.0.model.model_type' = 'sambo': should be 'llama', 'mistral', "
        "'qwen2', 'qwen3', 'olmo2' or 'samba'"
    ),
    f"{HYBRID} stages.1.model.mamba_d_state=0": (
        "HYBRID.yaml: 'stages.1.model.mamba_d_state' = 0: should be greater than 0"
    ),
    f"{HYBRID} stages.0.model.sliding_window=4096": (
        "HYBRID.yaml: stages.0.model.sliding_window = 4096 exceeds max_position_embeddings = "
        "2048; use at most the context length"
    ),
    f"{HYBRID} stages.1.model.layer_types=[mamba]": (
        "HYBRID.yaml: stages.1.model.sliding_window = 128, but layer_types has no "
        "sliding_attention; remove it or add layers of this type"
    ),
    f"{HYBRID} stages.1.model.layer_types=[mamba,mamba,sliding_attention,mamba,mamba]": (
        "HYBRID.yaml: 'stages.1.model.layer_types' = ['mamba', 'mamba', 'sliding_attention', "
        "'mamba', 'mamba']: has 5 entries, which do not divide num_hidden_layers = 12; list one "
        "type per layer or a period that fits"
    ),
    f"{HYBRID} stages.1.model.sliding_window=null": (
        f"{NO_START}stages.1.model has layers of full_attention and mamba, stages.0.model of mamba "
        "and sliding_attention; growth keeps the type of every layer"
    ),
    f"{HYBRID} stages.1.model.layer_types=[sliding_attention,mamba]": (
        f"{NO_START}stages.1: direct_depth would copy layer 0 of stages.0.model (mamba) to layer 0 "
        "(sliding_attention); choose layers or stages.1.model.layer_types that keep the type of "
        "every layer"
    ),
    f"{HYBRID} stages.1.model.mamba_d_state=32": (
        f"{NO_START}stages.1.model changes mamba_d_state from 16 to 32, which direct_depth cannot "
        "grow; set stages.1.model.mamba_d_state to 16"
    ),
    f"{DRY} stages.1.model.mamba_d_conv=4": (
        "RUN.yaml: stages.1.model.mamba_d_conv = 4, but layer_types has no mamba; remove it"
    ),
    # Files of a run.
    f"{DRY} data.train=data/none": (
        f"{NO_START}data/none.idx: No such file or directory; a corpus is PREFIX.bin and PREFIX.idx"
    ),
    f"{DRY} data.tokenizer=none.model": f"{NO_START}none.model: no such tokenizer file",
    f"{DRY} init_from=runs/none": f"{NO_START}runs/none: no such directory",
    "prepare none.txt --output data/x --tokenizer train": (
        "none.txt: no such file or folder; write hf:NAME for a dataset on the Hub"
    ),
    "prepare text --output data/x --tokenizer none.model": "none.model: no such tokenizer file",
    "prepare text --output data/x --tokenizer train": (
        "vocab_size 32000 does not fit the corpus: use at most 322, or more text"
    ),
    "prepare text --output data/stdlib --tokenizer train --vocab-size 310": (
        "data/stdlib: already exists, prepared from other sources, options or another tokenizer; "
        "remove it, choose another path, or pass --overwrite to replace it"
    ),
    "init data/none --size 3M": "data/none: no such directory",
    "init data/stdlib --size 3M --output RUN.yaml": (
        "RUN.yaml exists; remove it or give another file with --output"
    ),
    # Planning.
    "plan RUN.yaml --cluster h100": (
        "--cluster h100: use GPU:GPUS_PER_NODExNODES, such as h100:8x64, or a YAML file"
    ),
    "plan RUN.yaml --mfu 0.4": (
        "--mfu is a fraction of a GPU's peak FLOP/s: name the GPU with --gpu, such as h100"
    ),
    "plan RUN.yaml --gpu h100 --mfu 40": (
        "--mfu 40.0: should be more than 0 and at most 1, such as 0.4"
    ),
    "plan RUN.yaml --measured runs/empty": (
        "runs/empty/metrics.jsonl: no such file; give the directory of a run that was started"
    ),
    # Results of a run.
    "generate runs/empty": "give either prompts (--prompt TEXT, --prompts FILE) or --interactive",
    "eval runs/empty": (
        "runs/empty: neither a checkpoint nor a run directory nor a Hugging Face folder"
    ),
    "generate runs/empty --prompt a": (
        "runs/empty: neither a checkpoint nor a run directory nor a Hugging Face folder"
    ),
    "report runs/none --output out": "runs/none: no such file or directory",
    "fit timing runs/empty --output out": (
        "--budgets is missing: the FLOPs at which to compare the runs, such as 1e17,2e17"
    ),
    "checkpoint prune runs/empty": (
        "Missing option '--keep-last'; see megagrow checkpoint prune --help"
    ),
    "checkpoint show runs/empty": (
        "runs/empty: neither a run directory with checkpoints nor a folder of them"
    ),
    "grow runs/empty out": "Missing option '--to'; see megagrow grow --help",
    "convert reshard runs/empty out --zero-stage 5": (
        "Invalid value for '--zero-stage': should be less than or equal to 3; see megagrow "
        "convert reshard --help"
    ),
}
"""Command and message."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run file of README.md, its corpus in small, and defective run files."""
    folder = tmp_path_factory.mktemp("mistakes")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (run_file,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    texts = {
        "RUN.yaml": run_file,
        "HYBRID.yaml": (ROOT / "configs/demo/samba.yaml").read_text(encoding="utf-8"),
        "tab.yaml": "name: x\n\tseed: 1\n",
        "empty.yaml": "",
        "part.yaml": "name: x\noutput_dir: y\n",
        "stage.yaml": "base: RUN\nstages: {2: {tokens: 2M}}\n",
        **{f"text/{i}.txt": f"Document {i} of the corpus.\n" * 40 for i in range(40)},
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "runs/empty").mkdir(parents=True)
    out = folder / "data/stdlib"
    prepare([str(folder / "text")], out, "train", 300, validation_fraction=0.2, workers=1)
    return folder


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["megagrow", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main()
    assert capsys.readouterr().err == f"error: {MISTAKES[command]}\n"
    assert end.value.code == 2
    assert not (folder / "out").exists()
