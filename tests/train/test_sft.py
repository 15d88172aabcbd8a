"""Instruction tuning: the loss is the mean over the answers of a batch, in every layout."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.config.validation import problems
from megagrow.data.batches import Batch, sequences_of
from megagrow.data.sft import read_examples, tokenize
from megagrow.data.stage_streams import StreamPlace
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from megagrow.train.data_setup import open_inputs
from megagrow.train.init_from import fill_beginning, open_beginning
from megagrow.train.stage import build_stage
from megagrow.train.step import mean_loss, train_step
from tests.helpers.alpaca import VOCAB, prepare, tokenizer
from tests.helpers.checkpoint.written import differences, shards, write_checkpoint
from tests.helpers.hugging_face import hugging_face, state_of
from tests.helpers.jobs import records, train, write_run
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import MODEL, full_tensors, make_run, parallel_of
from tests.helpers.spawn import run_ranks
from tests.helpers.train.file_growths import grow, model_file

LENGTH, BATCH = 160, 4
SFT_MODEL = MODEL | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5}
ADAM_BETA, Z_LOSS = 0.9, 1e-2
LAYOUTS = ((1, 0, 1, 4), (1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 2, 1), (4, 3, 2, 1), (4, 1, 1, 1))
"""Ranks, ZeRO stage, TP, micro batch."""


def sft_run(folder: Path, steps: int = 1, **changes: Any) -> RunConfig:
    """A run over folder/corpus; `changes` are of its only stage or of the run."""
    corpus = folder / "corpus"
    stage = {
        "model": changes.pop("model", SFT_MODEL),
        "tokens": steps * BATCH * LENGTH,
        "batch": {"global_batch_size": BATCH, "micro_batch_size": changes.pop("micro", 1)},
        "parallel": changes.pop("parallel", parallel_of(1, 1)),
        "optimizer": {
            "lr": 3e-3,
            "gradient_clipping": 0,
            "betas": [ADAM_BETA, 0.95],
            "z_loss_multiplier": changes.pop("z_loss", 0),
        },
    }
    data = {
        "train": [{"path": corpus / "train"}],
        "sequence_length": LENGTH,
        "reset_position_ids": True,
        "reset_attention_mask": True,
    }
    run = make_run(folder, [stage], **{"objective": "sft", "data": data, **changes})
    assert problems(run) == []
    return run


def one_step(run: RunConfig, blank: bool = False) -> dict[str, Any]:
    """The first step of a run: its loss, the loss measured before it, the gradient's norm and the
    whole gradients. Without any label if `blank`."""
    stage = build_stage(run, 0, torch.device("cpu"))
    source = open_beginning(run)
    topology, storage = stage.topology, stage.engine.storage()
    stage.engine.ready(fill_beginning(source, stage.layout, topology.rank, storage, run.seed))
    reader = open_inputs(run).train.readers[0]
    micro = run.stages[0].batch.micro_batch_size
    mine = sequences_of(BATCH, micro, topology.dp_rank, topology.dp)
    batches: list[Batch] = [reader.read(0, indices) for indices in mine]
    for batch in batches:
        batch.labels.masked_fill_(torch.tensor(blank), -100)
    measured = mean_loss(stage, reader, BATCH, None)
    loss, norm, z_loss, _ = train_step(stage, batches, 0.0, None).tolist()
    # After a first step Adam's first moment is (1 - beta) times the gradient.
    moments = full_tensors(stage.layout, storage)
    gradients = {name: held["exp_avg"] / (1 - ADAM_BETA) for name, held in moments.items()}
    step = stage.engine.adam_step
    stage.release()
    return {
        "loss": loss, "measured": measured, "norm": norm, "z_loss": z_loss,
        "gradients": gradients, "adam": step
    }  # fmt: skip


def by_hand(folder: Path, run: RunConfig) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, z-loss and the gradients of their sum by transformers' model on one example at a time,
    none of them packed."""
    model, loaded = hugging_face(run.stages[0].model), load_tokenizer(tokenizer(folder))
    rows = open_inputs(run).train.read(StreamPlace(0), range(BATCH)).input_ids.tolist()
    found = [tokenize(loaded, example) for example in read_examples(folder / "alpaca.json")]
    held = [example for example in found if any(inside(example.ids, row) for row in rows)]
    assert len(held) > BATCH
    count = sum(len(example.ids) - example.prompt for example in held)
    total, z_total = 0.0, 0.0
    for example in held:
        ids = torch.tensor(example.ids)[None]
        labels = ids.clone()
        labels[:, : example.prompt] = -100
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / count
        squares = logits[0, :-1].logsumexp(-1).square()
        z_loss = Z_LOSS * squares[labels[0, 1:] != -100].sum() / count
        (loss + z_loss).backward()
        total, z_total = total + loss.item(), z_total + z_loss.item()
    return total, z_total, {name: p.grad for name, p in model.named_parameters()}


def inside(ids: list[int], row: list[int]) -> bool:
    return f" {' '.join(map(str, ids))} " in f" {' '.join(map(str, row))} "


@pytest.fixture
def folder(tmp_path) -> Path:
    """Instructions, and the weights of a model to tune, with moments."""
    prepare(tmp_path, 24, LENGTH, validation_fraction=0)
    model = sft_run(tmp_path).stages[0].model
    layout = layout_of(model, 1, 2, 1)
    state = state_of(hugging_face(model), layout.plan)
    write_checkpoint(tmp_path / "tuned", model, layout, state)
    return tmp_path


@pytest.mark.dist
def test_loss_and_gradients_are_those_of_single_examples_in_every_layout(folder):
    loss, z_loss, gradients = by_hand(folder, sft_run(folder))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    for world, zero, tp, micro in LAYOUTS:
        run = sft_run(
            folder,
            init_from=folder / "tuned",
            micro=micro,
            parallel=parallel_of(zero, tp),
            z_loss=Z_LOSS,
        )
        for found in run_ranks(world, one_step, run):
            case = f"{world} ranks, ZeRO {zero}, TP {tp}, micro batch {micro}"
            assert found["loss"] == pytest.approx(loss, rel=1e-5), case
            assert found["z_loss"] == pytest.approx(z_loss, rel=1e-5), case
            assert found["measured"] == pytest.approx(loss, rel=1e-5), case
            assert found["norm"] == pytest.approx(norm, rel=1e-5), case
            assert found["adam"] == 1, "the moments of the checkpoint are not gone on with"
            for name, gradient in gradients.items():
                error = found["gradients"][name].view_as(gradient) - gradient
                assert error.norm() < 1e-5 * gradient.norm(), f"{case}: {name}"


@pytest.mark.dist
def test_a_batch_without_answers_is_a_step_of_zero(folder):
    for found in run_ranks(2, one_step, sft_run(folder, init_from=folder / "tuned"), True):
        assert found["loss"] == 0 and found["norm"] == 0
        assert all(not gradient.any() for gradient in found["gradients"].values())


@pytest.mark.dist
def test_a_grown_model_learns_to_answer_and_resumes_to_the_same_bits(folder):
    deeper = SFT_MODEL | {"num_hidden_layers": 4}
    grow(
        source=folder / "tuned",
        out=folder / "grown",
        to=model_file(folder / "deeper.yaml", deeper),
        operators=("direct_depth",),
    )
    run = sft_run(
        folder,
        12,
        model=deeper,
        init_from=folder / "grown",
        checkpoint={"interval": 6, "keep_last": 3},
    )
    path = write_run(folder / "sft.yaml", run)
    ended = train(path, 2).finish()
    assert ended.codes == [0, 0], ended.err
    losses = records(run, "train", ("step", "loss"))
    assert losses[-1][1] < 0.5 * losses[0][1]
    last = run.output_dir / "checkpoints" / checkpoint_name(12)
    assert read_manifest(last).adam_step == 12
    undisturbed = shards(last)
    shutil.rmtree(last)
    ended = train(path, 2).finish()
    assert ended.codes == [0, 0], ended.err
    assert records(run, "train", ("step", "loss")) == losses
    assert differences(undisturbed, shards(last)) == []


def test_what_can_not_be_tuned_is_refused_in_one_line(tmp_path):
    text = {
        "name": "t",
        "output_dir": "o",
        "objective": "sft",
        "data": {"train": [{"path": "x"}], "sequence_length": 8},
        "model": MODEL,
        "optimizer": {"lr": 1},
        "batch": {"global_batch_size": 1, "micro_batch_size": 1},
        "stages": [{"tokens": 8}, {"tokens": 8, "growth": {"operator": "direct_depth"}}],
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(text))
    with pytest.raises(InputError) as error:
        load_run(path)
    said = str(error.value)
    assert "set data.reset_position_ids: true" in said and "\n" not in said
    assert "set data.reset_attention_mask: true" in said
    assert "objective: sft needs exactly one stage, but stages has 2" in said
    path.write_text(json.dumps(text | {"objective": "dpo"}))
    with pytest.raises(InputError, match="'objective' = 'dpo'"):
        load_run(path)


def test_a_corpus_without_a_mask_is_refused(tmp_path):
    run = make_run(tmp_path, [{"tokens": 64}], objective="sft")
    with pytest.raises(InputError, match=r"train\.mask\.bin: no such file; objective: sft"):
        open_inputs(run)
