"""Every backend computes what the references define, forward and backward, alone and in a model."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.model.attention_ops import sdpa
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.decoder import CausalLM
from megagrow.model.machine import Machine
from megagrow.model.masks import Masks
from megagrow.model.ops import PLAIN, Ops, make_ops
from megagrow_kernels import reference
from megagrow_kernels.reference import attention_mask
from tests.helpers.hugging_face import tiny, tokens
from tests.helpers.model.ops import (
    CPU,
    DOCUMENTS,
    TRITON,
    assert_same,
    draw,
    ops_by,
    outcome,
)


@pytest.mark.parametrize("queries", [12, 5])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "reference", "triton"])
def test_attention(backend: str, packed: bool, queries: int) -> None:
    ops, documents = ops_by(attention=backend), DOCUMENTS if packed else None
    inputs = draw(2, queries, 4, 16), draw(2, 12, 2, 16, seed=1), draw(2, 12, 2, 16, seed=2)
    attention_mask = ops.attention_mask(
        ops.pack(documents, queries).to("cpu") if packed else None, DOCUMENTS, None, queries
    )
    found = outcome(lambda q, k, v: ops.attention(q, k, v, attention_mask), *inputs)
    assert_same(found, outcome(lambda q, k, v: reference.attention(q, k, v, documents), *inputs))


def test_mamba_ssm_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(InputError, match="mamba-ssm is installed but cannot be imported"):
        ops_by(scan="mamba_ssm")


def test_scan_of_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins compute by the references, after the signatures of the packages."""

    def scan(x, dt, A, B, C, D, z=None, delta_bias=None, delta_softplus=False):
        assert z is None and delta_softplus and {A.dtype, D.dtype} == {torch.float32}
        x, dt, B, C = (each.transpose(1, 2) for each in (x, dt, B, C))
        return reference.selective_scan(x, dt, A, B, C, D, delta_bias).transpose(1, 2)

    def convolve(x, weight, bias, seq_idx=None, activation=None):
        assert seq_idx is None and activation == "silu"
        return reference.causal_conv(x.transpose(1, 2), weight, bias).transpose(1, 2)

    interface = "mamba_ssm.ops.selective_scan_interface"
    monkeypatch.setitem(sys.modules, interface, SimpleNamespace(selective_scan_fn=scan))
    causal = SimpleNamespace(causal_conv1d_fn=convolve)
    monkeypatch.setitem(sys.modules, "causal_conv1d", causal)
    ops = ops_by(scan="mamba_ssm")
    x, dt, B, C = (draw(2, 12, size, seed=size) for size in (6, 6, 3, 3))
    weights = -draw(6, 3).exp(), B, C, draw(6, seed=1), draw(6, seed=2)
    inputs = x, dt, *weights
    taps = x, draw(6, 4), draw(6)
    for name, each in (("selective_scan", inputs), ("causal_conv", taps)):
        found = outcome(getattr(ops, name), *each)
        assert_same(found, outcome(getattr(reference, name), *each))
    with pytest.raises(ValueError, match="document boundaries"):
        ops.selective_scan(*inputs, torch.zeros(2, 12, dtype=torch.bool))


def test_the_order_of_torchs_own_attentions_changes_nothing_else() -> None:
    ops = ops_by(machine=Machine("cuda", 90))
    assert ops.attention is not PLAIN.attention
    q, k, v = draw(2, 12, 4, 16), draw(2, 12, 2, 16, seed=1), draw(2, 12, 2, 16, seed=2)
    for mask in (None, attention_mask(DOCUMENTS)):
        assert torch.equal(ops.attention(q, k, v, mask), PLAIN.attention(q, k, v, mask))


def test_cudnn_is_not_used_where_results_must_be_deterministic() -> None:
    hopper = Machine("cuda", 90)
    work = KernelWorkload(torch.bfloat16, 16, False)
    fast, exact = (ops_by(w, hopper) for w in (work, replace(work, deterministic=True)))
    assert fast.attention is not sdpa and exact.attention is sdpa


def test_norms_by_triton() -> None:
    ops = ops_by(norm="triton")
    x, more, weight = draw(3, 5, 24), draw(3, 5, 24, seed=1), draw(24, seed=2)
    found = outcome(lambda x, w: ops.rms_norm(x, w, 1e-2), x, weight)
    assert_same(found, outcome(lambda x, w: reference.rms_norm(x, w, 1e-2), x, weight))
    found = outcome(lambda x, y, w: ops.add_rms_norm(x, y, w, 1e-2), x, more, weight)

    def plainly(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rms_norm(x + more, weight, 1e-2), x + more

    assert_same(found, outcome(plainly, x, more, weight))


def test_rope_and_swiglu_by_triton() -> None:
    ops = ops_by(pointwise="triton")
    q, k = draw(2, 12, 4, 16), draw(2, 12, 2, 16, seed=1)
    tables = reference.rope_tables(DOCUMENTS * 5, 100.0 ** -(torch.arange(8.0) / 8))
    found = outcome(lambda q, k: ops.rope(q, k, *tables), q, k)
    assert_same(found, outcome(lambda q, k: PLAIN.rope(q, k, *tables), q, k))
    gate, up = draw(3, 5, 40), draw(3, 5, 40, seed=1)
    assert_same(outcome(ops.swiglu, gate, up), outcome(reference.swiglu, gate, up))


CONFIG = tiny(num_attention_heads=2, num_key_value_heads=1)
MASKS = {
    "none": None,
    "layers": Masks((1.0, 0.25)),
    "all": Masks(
        (1.0, 0.5),
        torch.linspace(0.25, 1, CONFIG.hidden_size),
        torch.tensor([0.5]),
        torch.linspace(0, 1, CONFIG.intermediate_size),
    ),
}


def in_a_model(
    config: ModelConfig, ops: Ops, recompute: str, masks: Masks | None, documents: Tensor | None
) -> list[Tensor]:
    """Logits, and the gradients of a loss."""
    torch.manual_seed(0)
    model = CausalLM(config, recompute, ops)
    ids, labels = tokens(config, 2, 12 if documents is None else documents.shape[1])
    packed = None if documents is None else ops.pack(documents)
    logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids), packed, masks)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(("masks", "packed"), [("none", True), ("layers", False), ("all", True)])
def test_a_model_by_triton_is_the_plain_model(masks: str, packed: bool) -> None:
    documents = DOCUMENTS if packed else None
    made = make_ops(Backends(**TRITON), CPU, KernelWorkload(torch.float32, CONFIG.head_dim, packed))
    expected = in_a_model(CONFIG, PLAIN, "none", MASKS[masks], documents)
    found = in_a_model(CONFIG, made, "none", MASKS[masks], documents)
    assert_same(found, expected)
    assert not torch.equal(found[0], expected[0]), "the same bits: was anything else computed?"


def test_recomputation_by_triton_changes_no_bit() -> None:
    ops = make_ops(Backends(**TRITON), CPU, KernelWorkload(torch.float32, CONFIG.head_dim, True))
    plain, *others = (
        in_a_model(CONFIG, ops, how, MASKS["layers"], DOCUMENTS[:, :6])
        for how in ("none", "selective", "full")
    )
    for again in others:
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_norms_add_the_outputs_of_all_blocks(recompute: str) -> None:
    """Two layers of two blocks; a recomputed layer keeps its input, which is added before."""
    calls = []

    def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        calls.append(total := x + delta)
        return PLAIN.rms_norm(total, weight, eps), total

    ops = replace(PLAIN, add_rms_norm=add_rms_norm)
    expected = in_a_model(CONFIG, PLAIN, recompute, MASKS["layers"], None)
    found = in_a_model(CONFIG, ops, recompute, MASKS["layers"], None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Forward, and what the backward pass repeats.
    assert len(calls) == {"none": 4, "selective": 4, "full": 3 + 2}[recompute]


def test_fused_addition_is_the_plain_one_where_the_residual_is_masked() -> None:
    def never(*_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("the norm of a masked residual is no plain norm")

    ops = replace(PLAIN, add_rms_norm=never)
    expected = in_a_model(CONFIG, PLAIN, "none", MASKS["all"], None)
    found = in_a_model(CONFIG, ops, "none", MASKS["all"], None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megagrow.config.stage import KernelsConfig
from megagrow.config.schema import ModelConfig
from megagrow.model.attention_ops import sdpa
from megagrow.model.backends import KernelWorkload, choose
from megagrow.model.decoder import CausalLM
from megagrow.model.machine import machine_of
from megagrow.model.ops import make_ops
machine, work = machine_of(torch.device("cpu")), KernelWorkload(torch.float32, 4, True)
assert not machine.triton
ops = make_ops(choose(KernelsConfig(), machine, work), machine, work)
sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=4)
model = CausalLM(ModelConfig(**sizes, vocab_size=5), ops=ops)
ids = torch.arange(4)[None]
print(tuple(model(ids, ids, ops.pack(ids // 2)).shape))
"""


def test_a_machine_without_triton_needs_none() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "(1, 4, 5)\n", done.stderr
