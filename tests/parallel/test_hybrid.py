"""A Samba hybrid under any TP, sequence parallelism, ZeRO stage and activation checkpointing.

Gradients are read from Adam's exp_avg after the first step, which every ZeRO stage keeps, reduced
over all ranks.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.config.schema import OptimizerConfig
from megagrow.model.decoder import CausalLM
from megagrow.model.decoding import DecodingCache
from megagrow.model.masks import Masks
from megagrow.parallel import collectives
from megagrow.parallel.loss import cross_entropy
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.tensor_parallel import rank_masks
from tests.helpers.hugging_face import tokens
from tests.helpers.model.samba_reference import SambaReference, drawn, samba
from tests.helpers.parallel.engines import BATCH, Built, Case, build
from tests.helpers.spawn import run_ranks

WORLD, LENGTH, LIMIT = 4, 16, 1e-5
CONFIG = samba()
OPTIMIZER = OptimizerConfig(lr=1e-3, gradient_clipping=0)
MASKS = Masks(
    layers=(1.0, 1.0, 0.5, 0.5),
    residual=torch.linspace(1, 0.2, CONFIG.hidden_size),
    groups=torch.linspace(1, 0.2, CONFIG.num_key_value_heads),
    ffn=torch.linspace(1, 0.2, CONFIG.intermediate_size),
    inner=torch.linspace(1, 0.2, CONFIG.mamba_d_inner or 0),
)
DOCUMENTS = torch.repeat_interleave(torch.tensor([5, 1, 10]))
CASES = (
    Case(0, tp=1),
    Case(1, tp=2, sequence_parallel=True),
    Case(3, tp=1, recompute="selective"),
    Case(3, tp=4, sequence_parallel=True),
    Case(0, tp=2, sequence_parallel=True, recompute="selective"),
    Case(2, tp=2, recompute="full"),
    Case(1, tp=4, sequence_parallel=True, recompute="full"),
    Case(3, tp=2, sequence_parallel=True, recompute="selective"),
    Case(3, tp=2, recompute="full"),
)


@dataclass(frozen=True)
class Measure:
    """Logits (B, S, V) and gradients of one process."""

    logits: Tensor
    gradients: dict[str, Tensor]


def measure_of(special: bool) -> Measure:
    """Return the outcome of transformers' parts; of packed documents and growth masks that of one
    device."""
    ids, labels = tokens(CONFIG, BATCH, LENGTH)
    if special:
        model = CausalLM(CONFIG)
        model.load_state_dict(drawn(CONFIG), strict=False)
        positions, documents = (x.expand_as(ids) for x in (torch.arange(LENGTH), DOCUMENTS))
        logits = model(ids, positions, documents, MASKS)
    else:
        model = SambaReference(CONFIG, drawn(CONFIG))
        logits = model(ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Measure(logits.detach(), named if special else model.gradients())


def gathered(logits: Tensor, topology: Topology) -> Tensor:
    """Return the logits of the complete vocabulary, in fp32."""
    parts = [torch.empty_like(logits) for _ in range(topology.tp)]
    dist.all_gather(parts, logits.detach(), group=topology.tp_group)
    return torch.cat(parts, dim=-1)[..., : CONFIG.vocab_size].float()


def new_engine(case: Case) -> Built:
    built = build(case, optimizer=OPTIMIZER, config=CONFIG)
    built.write({name: weight.view(len(weight), -1) for name, weight in drawn(CONFIG).items()})
    return built


def compare(case: Case, measure: Measure, special: bool) -> dict[str, Any]:
    """Return the largest differences of logits and of each gradient, and the gradient norm."""
    built = new_engine(case)
    topology, worst = built.topology, 0.0
    ids, labels = tokens(CONFIG, BATCH, LENGTH)
    mine = range(topology.dp_rank, BATCH, topology.dp)
    for index in mine:
        row = slice(index, index + 1)
        inputs = (DOCUMENTS[None], rank_masks(MASKS, topology)) if special else (None,)
        logits = built.engine.forward(ids[row], torch.arange(LENGTH)[None], *inputs)
        difference = gathered(logits, topology) - measure.logits[row]
        worst = max(worst, difference.abs().max().item())
        loss = cross_entropy(logits, labels[row], CONFIG.vocab_size, topology)[0] / LENGTH
        built.engine.backward(loss, last=index == mine[-1])
    norm = built.engine.step(OPTIMIZER.lr)
    gradients = {name: kinds["exp_avg"] / 0.1 for name, kinds in built.full().items()}
    built.release()
    assert gradients.keys() == measure.gradients.keys()
    difference = {
        name: (gradients[name] - expected.view_as(gradients[name])).abs().max().item()
        for name, expected in measure.gradients.items()
    }
    return {"logits": worst, "gradients": difference, "norm": norm.item()}


def compare_all(cases: tuple[Case, ...], measure: Measure, special: bool = False) -> list:
    return [compare(case, measure, special) for case in cases]


def without_all_reduce(case: Case, measure: Measure) -> dict[str, Any]:
    """Compare an engine whose ranks do not sum the outputs of x_proj."""

    def identity(x: Tensor, group: Any) -> Tensor:
        return x

    collectives.sum_of_partial = identity
    return compare(case, measure, special=False)


def norm_of(measure: Measure) -> float:
    flat = [gradient.flatten() for gradient in measure.gradients.values()]
    return torch.cat(flat).norm().item()


@pytest.fixture(scope="module")
def measure() -> Measure:
    return measure_of(special=False)


@pytest.mark.dist
@pytest.mark.parametrize("special", [False, True], ids=["plain", "packed and masked"])
def test_every_layout_is_a_single_device(special: bool) -> None:
    expected = measure_of(special)
    cases = (CASES[1], CASES[-2]) if special else CASES
    for found in run_ranks(WORLD, compare_all, cases, expected, special):
        for case, result in zip(cases, found, strict=True):
            assert result["logits"] < 2 * LIMIT, case
            assert result["norm"] == pytest.approx(norm_of(expected), rel=1e-5), case
            for name, difference in result["gradients"].items():
                assert difference < LIMIT, (case, name)


@pytest.mark.dist
def test_it_fails_without_the_all_reduce_of_x_proj(measure: Measure) -> None:
    for result in run_ranks(2, without_all_reduce, Case(0, tp=2), measure):
        assert result["logits"] > 1e3 * LIMIT
        assert result["gradients"]["model.layers.0.mamba.x_proj.weight"] > 1e3 * LIMIT


@pytest.mark.dist
def test_bf16_is_close(measure: Measure) -> None:
    case = Case(3, tp=2, sequence_parallel=True, bf16=True, recompute="selective")
    for (result,) in run_ranks(WORLD, compare_all, (case,), measure):
        assert LIMIT < result["logits"] < 0.1 * measure.logits.abs().max()
        assert result["norm"] == pytest.approx(norm_of(measure), rel=0.1)


@torch.no_grad()
def decode(case: Case) -> Tensor:
    """Return the logits of passes over 7, 1, 6 and 2 tokens, of all sequences on each rank."""
    built, out = new_engine(case), []
    cache = DecodingCache(CONFIG, built.topology.device)
    for part in tokens(CONFIG, BATCH, LENGTH)[0].split((7, 1, 6, 2), dim=1):
        ids = cache.begin(part.tolist())
        positions = cache.sequences.positions(ids.shape[1])
        logits = built.engine.forward(ids, positions, None, None, None, cache)
        cache.end()
        out.append(gathered(logits, built.topology))
    built.release()
    return torch.cat(out, dim=1)


@pytest.mark.dist
@pytest.mark.parametrize("case", [Case(0, tp=2), Case(3, tp=1)], ids=str)
def test_decoding_gives_the_logits_of_a_single_device(case: Case, measure: Measure) -> None:
    """Each rank stores the states of its own channels and heads."""
    for logits in run_ranks(2, decode, case):
        assert (logits - measure.logits).abs().max() < LIMIT
