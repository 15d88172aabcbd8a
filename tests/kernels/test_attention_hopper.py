"""Tests of the warp-specialized attention for sm_90, in a CPU model of Gluon and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagrow_kernels import attention_forward, attention_hopper, attention_hopper_warps, tiles
from tests.helpers.kernels import attention_generations as generations
from tests.helpers.kernels.accuracy import draw
from tests.helpers.kernels.gluon_machine import Deadlock
from tests.helpers.kernels.gluon_model import Model, functions, launcher

ROOT = Path(__file__).resolve().parents[2]
HALF, BRAIN = torch.float16, torch.bfloat16
MODULES = (attention_hopper_warps, attention_hopper)
SHARED_LIMIT = 232448
"""Shared memory limit of one block on sm_90, in bytes."""


def modeled_forward(
    patch: pytest.MonkeyPatch, *, seed: int = 0, programs: int = 3, stages: int = 2
) -> generations.Forward:
    """Return the forward pass as executed by the model of a GPU with `programs` multiprocessors."""

    def forward(*arguments) -> tuple[Tensor, Tensor]:
        patch.setattr(attention_hopper, "launch", launcher(MODULES, seed, programs))
        return attention_hopper.attention_hopper_forward(*arguments, stages)

    return forward


@pytest.mark.parametrize("case", generations.CASES)
def test_accuracy(monkeypatch, case):
    generations.accurate(modeled_forward(monkeypatch), generations.CASES[case], HALF)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_what_holds_to_the_bit(monkeypatch, dtype):
    generations.isolated(modeled_forward(monkeypatch), dtype)
    generations.causal(modeled_forward(monkeypatch), dtype)


def test_the_first_generation_is_held_to_the_same():
    generations.accurate(attention_forward.attention_forward, generations.CASES["documents"], HALF)


def test_order_of_events_and_programs_change_no_bit(monkeypatch):
    rows = ((290, 10), (300,))
    inputs = generations.inputs_of(rows, 3, 1, 64, BRAIN)
    expected = generations.compute(modeled_forward(monkeypatch, programs=1), inputs, rows)
    for seed, programs, stages in ((1, 1, 1), (2, 2, 2), (3, 5, 3), (4, 64, 2)):
        forward = modeled_forward(monkeypatch, seed=seed, programs=programs, stages=stages)
        actual = generations.compute(forward, inputs, rows)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_views_of_one_projection(monkeypatch):
    rows = ((160, 11),)
    views = list(draw(1, 171, 4, 64, dtype=HALF).split((2, 1, 1), dim=2))
    actual, expected = (
        generations.compute(modeled_forward(monkeypatch), inputs, rows)
        for inputs in (views, [x.contiguous() for x in views])
    )
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("left_out", ["wait", "arrive", "warpgroup_mma_wait"])
def test_the_model_notices_what_is_left_out(monkeypatch, left_out):
    """Without one kind of synchronization the kernel fails, so the tests above can fail."""
    original = Model.warpgroup_mma_wait
    replaced, error = {
        "wait": (lambda *_: None, AssertionError),
        "arrive": (lambda *_: None, Deadlock),
        "warpgroup_mma_wait": (lambda self, n, deps: original(self, n + 1, deps), AssertionError),
    }[left_out]
    monkeypatch.setattr(Model, left_out, replaced)
    with pytest.raises(error):
        generations.accurate(modeled_forward(monkeypatch), generations.CASES["many tiles"], HALF)


@pytest.mark.parametrize("programs", [1, 3, 7, 132])
@pytest.mark.parametrize("items", [0, 1, 6, 7, 131, 132, 133, 1000])
def test_every_item_has_one_program(items, programs):
    selected = []
    for program in range(programs):
        names = functions(MODULES, Model(program, programs, 0).namespace())
        for number in range(names["items_of_program"](torch.tensor(items))):
            selected.append(number * programs + int(names["place_in_round"](number)))
    assert sorted(selected) == list(range(items))


@pytest.mark.parametrize(
    ("architecture", "width", "dtype", "expected"),
    [
        (90, 128, BRAIN, 2),
        (90, 64, HALF, 2),
        (90, 96, BRAIN, 1),
        (90, 128, torch.float32, 1),
        (80, 128, BRAIN, 1),
        (100, 128, BRAIN, 1),
    ],
)
def test_it_is_taken_where_it_fits_and_a_row_asks_for_it(
    monkeypatch, architecture, width, dtype, expected
):
    table = tiles.rows("attention_forward")
    assert all("GENERATION" not in row["use"] for rows in table.values() for row in rows)
    use = {"GENERATION": 2, "STAGES": 3}
    row = {"when": {"hopper": True}, "up_to": {}, "use": use, "measured": None}
    monkeypatch.setattr(attention_forward, "architecture", lambda device: architecture)
    selected = []
    monkeypatch.setattr(attention_forward, "launch", lambda *_, **__: selected.append(1))
    monkeypatch.setattr(
        attention_forward, "attention_hopper_forward", lambda *args: selected.append(args[-1] - 1)
    )
    q = torch.empty(1, 4, 1, width, dtype=dtype)
    arguments = (q, q, q, torch.zeros(2, 3, dtype=torch.int32), 0.1, None)
    with tiles.override(90, {"attention_forward": [row, *table[90]]}):
        attention_forward.attention_forward(*arguments)
        attention_forward.attention_forward(q[:, 1:], *arguments[1:])
    assert selected == [expected, 1], "with fewer queries than keys, the first generation"


@pytest.fixture(scope="module")
def codes() -> list[dict]:
    """Return the code for sm_90: head dimension 128; 64 with a window and four stages."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cases = [[128, "bfloat16", None, 2], [64, "float16", 1000, 4]]
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kernels.attention_hopper_code", json.dumps(cases)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_code_for_sm_90(codes):
    for code, head_dim, loops in zip(codes, (128, 64), (1, 2), strict=True):
        assert code["stack"] == 0 and not {"LDL", "STL"} & code["instructions"].keys()
        assert code["shared"] <= SHARED_LIMIT
        assert code["registers"] * 3 * 128 <= 2**16
        assert {("dec", "24"), ("dec", "240"), ("inc", "240")} <= set(
            map(tuple, code["setmaxnreg"])
        )
        # Two consumers: the first scores, then scores and product per loop, then the last product.
        scores, product = head_dim // 16, 128 // 16
        assert code["instructions"]["HGMMA"] == 2 * (1 + loops) * (scores + product)
        # A load covers rows of up to 128 bytes: two parts of q, k and v.
        assert code["instructions"]["UTMALDG"] == 4 * head_dim * 2 // 128


def test_softmax_runs_while_a_matmul_does(codes):
    """In each loop, the exponentials of a tile come before the wait for the running matmul.

    There are 64 per thread and 2 for the shrink factors.
    """
    for code, loops in zip(codes, (1, 2), strict=True):
        assert code["overlapped_exponentials"] == [64 + 2] * 2 * loops


@pytest.mark.gpu
@pytest.mark.parametrize("generation", generations.FORWARDS)
def test_generations_on_a_gpu(generation, gpu_environment):
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kernels.attention_generations", str(generation)],
        cwd=ROOT,
        env=gpu_environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if run.returncode == generations.NOT_HERE:
        pytest.skip("made for sm_90")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
