"""Which backend computes what: a pure function of config, machine and work, row by row."""

from dataclasses import replace

import pytest
import torch

from megagrow.config.stage import KernelsConfig
from megagrow.errors import InputError
from megagrow.model.backends import (
    OPERATIONS,
    Backends,
    KernelWorkload,
    automatic,
    choose,
    obstacle,
)
from megagrow.model.machine import Machine

PASSED = dict.fromkeys(OPERATIONS)
"""The self-check of all kernels."""
CPU = Machine("cpu", triton=True)
INTERPRETER = Machine("cpu", triton=True, interpreter=True)
MAC = Machine("cpu")
VOLTA = Machine("cuda", 70, triton=True, flash_attn=True)
AMPERE = Machine("cuda", 80, triton=True, checks=PASSED)
HOPPER = Machine("cuda", 90, triton=True, checks=PASSED)
UNCHECKED = Machine("cuda", 90, triton=True)
WITH_FLASH = Machine("cuda", 90, triton=True, checks=PASSED, flash_attn=True)
NO_TRITON = Machine("cuda", 90)
WITH_MAMBA = Machine("cuda", 90, mamba_ssm=True)

FP32 = KernelWorkload(torch.float32, 128, packed=False)
FP32_PACKED = KernelWorkload(torch.float32, 128, packed=True)
BF16 = KernelWorkload(torch.bfloat16, 128, packed=False)
PACKED = KernelWorkload(torch.bfloat16, 128, packed=True)
WINDOWED = replace(BF16, windowed=True)
MAMBA = replace(BF16, conv_taps=4)
ODD = KernelWorkload(torch.bfloat16, 66, packed=True)
"""A head_dim that is no multiple of 8."""

TORCH = Backends("sdpa", "torch", "torch", "torch", "torch")


def rows(attention: str) -> Backends:
    """Triton's kernels for all but attention."""
    return Backends(attention, "triton", "triton", "triton", "triton")


@pytest.mark.parametrize(
    ("machine", "work", "expected"),
    [
        (CPU, FP32, TORCH),
        (CPU, FP32_PACKED, TORCH),
        (CPU, PACKED, TORCH),
        (INTERPRETER, FP32_PACKED, TORCH),
        (MAC, FP32, TORCH),
        (VOLTA, PACKED, TORCH),
        (NO_TRITON, PACKED, TORCH),
        (AMPERE, FP32_PACKED, TORCH),
        (AMPERE, BF16, rows("sdpa")),
        (AMPERE, PACKED, rows("triton")),
        (AMPERE, WINDOWED, rows("triton")),
        (UNCHECKED, WINDOWED, TORCH),
        (CPU, replace(FP32, windowed=True), TORCH),
        (HOPPER, BF16, rows("sdpa")),
        (HOPPER, PACKED, rows("triton")),
        (HOPPER, ODD, rows("sdpa")),
        (UNCHECKED, PACKED, TORCH),
        (UNCHECKED, BF16, TORCH),
        (replace(UNCHECKED, flash_attn=True), PACKED, Backends("flash_attn", *["torch"] * 4)),
        (WITH_FLASH, BF16, rows("sdpa")),
        (WITH_FLASH, PACKED, rows("triton")),
        (WITH_FLASH, ODD, rows("sdpa")),
        (Machine("cuda", 90, flash_attn=True), PACKED, Backends("flash_attn", *["torch"] * 4)),
        (Machine("cuda", 90, flash_attn=True), BF16, TORCH),
        (WITH_MAMBA, MAMBA, replace(TORCH, scan="mamba_ssm")),
        (WITH_MAMBA, replace(MAMBA, packed=True), TORCH),
        (WITH_MAMBA, replace(MAMBA, deterministic=True), TORCH),
        (WITH_MAMBA, replace(MAMBA, dtype=torch.float32), TORCH),
        (WITH_MAMBA, BF16, TORCH),
        (replace(HOPPER, mamba_ssm=True), MAMBA, rows("sdpa")),
    ],
)
def test_what_auto_takes(machine: Machine, work: KernelWorkload, expected: Backends) -> None:
    assert choose(KernelsConfig(), machine, work) == expected


@pytest.mark.parametrize("machine", [INTERPRETER, AMPERE, HOPPER, UNCHECKED])
def test_what_is_named_is_taken(machine: Machine) -> None:
    config = KernelsConfig(**dict.fromkeys(OPERATIONS, "triton"))
    assert choose(config, machine, FP32) == rows("triton")
    config = KernelsConfig(**dict.fromkeys(OPERATIONS, "torch") | {"attention": "reference"})
    assert choose(config, machine, FP32) == Backends("reference", *["torch"] * 4)
    assert choose(KernelsConfig(norm="triton"), INTERPRETER, FP32).loss == "torch"


OLDEST_FLASH = Machine("cuda", 90, flash_attn=True, flash_attn_version=(2, 2, 9))
OLD_FLASH = replace(OLDEST_FLASH, flash_attn_version=(2, 4))
NEW_FLASH = replace(OLD_FLASH, flash_attn_version=(2, 4, 1))


def test_auto_avoids_an_old_flash_attn_only_where_results_must_be_deterministic() -> None:
    exact = replace(PACKED, deterministic=True)
    assert automatic("attention", OLD_FLASH, PACKED) == "flash_attn"
    assert automatic("attention", OLD_FLASH, exact) == "sdpa"
    assert automatic("attention", NEW_FLASH, exact) == "flash_attn"


def test_auto_avoids_a_flash_attn_without_windows() -> None:
    assert automatic("attention", OLDEST_FLASH, PACKED) == "flash_attn"
    assert automatic("attention", OLDEST_FLASH, WINDOWED) == "sdpa"
    assert automatic("attention", OLD_FLASH, WINDOWED) == "flash_attn"


REFUSED = [
    ("triton", CPU, FP32, "TRITON_INTERPRET=1"),
    ("triton", MAC, FP32, "Triton is not installed"),
    ("triton", INTERPRETER, PACKED, "interpreter computes bf16 wrongly; set precision to fp32"),
    ("triton", VOLTA, PACKED, "needs a GPU of sm_80 or newer; this one is sm_70"),
    ("triton", HOPPER, ODD, "a head_dim that is a multiple of 8 up to 256, not 66"),
    ("flash_attn", HOPPER, PACKED, "flash-attn is not installed"),
    ("flash_attn", Machine("cpu", flash_attn=True), PACKED, "flash-attn needs a GPU"),
    ("flash_attn", VOLTA, PACKED, "needs a GPU of sm_80 or newer"),
    ("flash_attn", WITH_FLASH, FP32, "only bf16 and fp16, but the stage computes in fp32"),
    ("flash_attn", WITH_FLASH, ODD, "multiple of 8 up to 256, not 66"),
    ("flash_attn", WITH_FLASH, KernelWorkload(torch.bfloat16, 264, False), "up to 256, not 264"),
    ("flash_attn", OLD_FLASH, replace(BF16, deterministic=True), "needs flash-attn 2.4.1"),
    ("flash_attn", OLDEST_FLASH, WINDOWED, "sliding windows need flash-attn 2.3"),
]


@pytest.mark.parametrize(("backend", "machine", "work", "why"), REFUSED)
def test_what_cannot_run_is_refused_by_its_key(backend, machine, work, why) -> None:
    with pytest.raises(InputError) as caught:
        choose(KernelsConfig(attention=backend), machine, work, "stages.1.kernels")
    said = str(caught.value)
    assert said.startswith(f"stages.1.kernels.attention = {backend}: ") and why in said
    assert said.endswith("; auto selects sdpa") or work.packed


@pytest.mark.parametrize(
    ("machine", "work", "why"),
    [
        (HOPPER, MAMBA, "not both installed"),
        (Machine("cpu", mamba_ssm=True), MAMBA, "needs a GPU"),
        (WITH_MAMBA, replace(MAMBA, packed=True), "data.reset_attention_mask"),
        (WITH_MAMBA, replace(MAMBA, deterministic=True), "deterministic_mode"),
        (WITH_MAMBA, replace(MAMBA, conv_taps=5), "2 to 4 taps, but model.mamba_d_conv = 5"),
        (replace(WITH_MAMBA, capability=70), MAMBA, "this one is sm_70"),
    ],
)
def test_mamba_ssm_is_refused(machine: Machine, work: KernelWorkload, why: str) -> None:
    with pytest.raises(InputError, match=r"^kernels\.scan = mamba_ssm: ") as caught:
        choose(KernelsConfig(scan="mamba_ssm"), machine, work)
    assert why in str(caught.value)


@pytest.mark.parametrize("operation", ["norm", "pointwise", "loss"])
def test_other_operations_are_refused_by_their_keys(operation: str) -> None:
    with pytest.raises(InputError, match=rf"^kernels\.{operation} = triton: .* selects torch$"):
        choose(KernelsConfig(**{operation: "triton"}), CPU, FP32)
    assert obstacle(operation, "triton", HOPPER, ODD) is None, "only attention looks at head_dim"


def test_all_that_is_wrong_is_told_at_once() -> None:
    config = KernelsConfig(attention="flash_attn", norm="triton", loss="triton")
    with pytest.raises(InputError) as caught:
        choose(config, MAC, FP32)
    told = str(caught.value)
    assert [f"kernels.{key} = " in told for key in OPERATIONS] == [
        *(True, True, False, True, False)
    ]
