"""The model of a step by hand: clusters, collectives, products, and what a layout changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.model.layers.flops import (
    flops_per_token,
    matmul_flops,
    norm_parameters,
    parameters,
)
from megagrow.model.layers.table import MIXERS
from megagrow.parallel.pipeline.schedule import timeline
from megagrow.parallel.pipeline.split import PipelineSplit
from megagrow.planning.cluster import Cluster, find_cluster
from megagrow.planning.step.communication import pipeline_bubble
from megagrow.planning.step.groups import CommGroup, strided_group, tensor_group
from megagrow.planning.step.rates import (
    ADAM_BYTES,
    BUSY_SHARE,
    COLLECTIVE_SECONDS,
    DIAGONAL,
    HBM_SHARE,
    MATMUL_SHARE,
    NIC_SHARE,
    NVLINK_SHARE,
    TILE_START,
)
from megagrow.planning.step.timing import StepTime, matmul_seconds, step_time
from megagrow.planning.step.workload import StepWorkload, block_products, shape_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEVEN_MODEL = ModelConfig(
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
)
SEVEN = shape_of(SEVEN_MODEL, 2048)
WORK = StepWorkload(SEVEN, dp=64, tp=1, zero_stage=3, micro_batch=4, accumulation=2)


def cluster(text: str = "h100:8x8") -> Cluster:
    return find_cluster(text)


def seconds(work: StepWorkload, text: str = "h100:8x8") -> StepTime:
    return step_time(work, cluster(text))


def test_a_cluster_by_its_name() -> None:
    found = cluster("h100:8x64")
    assert (found.gpus, found.gpus_per_node, found.nodes) == (512, 8, 64)
    assert (found.card.nvlink, found.card.nic, found.card.hbm) == (450e9, 50e9, 3.35e12)
    assert found.gpu.peak_flops == 989e12


def test_a_cluster_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "gpu: H200\ngpus_per_node: 4\nnodes: 3\nnetwork_gb_per_second: 25\nwatts: 175\n"
        "nvswitch: false\nlatency_us: 9\n",
        encoding="utf-8",
    )
    found = find_cluster(str(path))
    assert (found.gpus, found.card.nic, found.card.nvlink) == (12, 25e9, 450e9)
    assert found.power_share == pytest.approx(0.5)  # a quarter of the watts
    assert (found.latency, found.card.nvswitch) == (9e-6, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h100", "GPU:GPUS_PER_NODExNODES"),
        ("h100:8", "GPU:GPUS_PER_NODExNODES"),
        ("h100:0x4", "at least one node"),
        ("h100:8x513", "4,104 GPUs"),
        ("z9000:8x8", "--cluster z9000: not known"),
        ("l4:8x8", "no bandwidth figures for l4"),
        ("nowhere.yaml", "No such file"),
    ],
)
def test_what_is_no_cluster_is_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        find_cluster(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_file_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("gpu: h100\nnodse: 3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.yaml: nodse: "):
        find_cluster(str(path))


def test_a_gather_within_a_node_and_between_nodes() -> None:
    one = CommGroup(cluster("h100:8x1"), 8, 8).one_way(8e9)
    assert one == pytest.approx(COLLECTIVE_SECONDS + 7e9 / (450e9 * NVLINK_SHARE))
    # Eight cards of a node fetch together what lies on the other fifteen nodes.
    two = CommGroup(cluster("h100:8x16"), 128, 8).one_way(64e9)
    outer = 64e9 * 15 / 16 / (8 * 50e9 * NIC_SHARE)
    inner = 64e9 * 127 / 128 / (450e9 * NVLINK_SHARE)
    assert inner < outer
    assert two == pytest.approx(COLLECTIVE_SECONDS + 15 * 5e-6 + outer)
    # With TP 8 a group has one card in each node.
    alone = strided_group(cluster(), 8, 8)
    assert (alone.size, alone.local) == (8, 1)
    expected = COLLECTIVE_SECONDS + 7 * 5e-6 + 7e9 / (50e9 * NIC_SHARE)
    assert alone.one_way(8e9) == pytest.approx(expected)
    assert alone.all_reduce(8e9) == 2 * alone.one_way(8e9)
    assert CommGroup(cluster(), 1, 1).one_way(1e9) == 0.0
    assert (tensor_group(cluster(), 4).local, tensor_group(cluster(), 16).local) == (4, 8)


def test_without_a_switch_a_pair_has_its_own_links_only() -> None:
    whole = cluster("h200:4x1")
    pairs = replace(whole, card=replace(whole.card, nvswitch=False))
    fast, slow = CommGroup(whole, 2, 2).one_way(30e9), CommGroup(pairs, 2, 2).one_way(30e9)
    assert slow - COLLECTIVE_SECONDS == pytest.approx(3 * (fast - COLLECTIVE_SECONDS))
    assert CommGroup(whole, 4, 4).one_way(30e9) == CommGroup(pairs, 4, 4).one_way(30e9)


def test_a_product_by_hand() -> None:
    """132 multiprocessors; 8192 x 8192 are 64 x 32 = 2048 tiles, in 16 waves."""
    found = matmul_seconds(cluster(), "eager", 8192, 8192, 8192)
    rate = 989e12 * MATMUL_SHARE["hopper"] * BUSY_SHARE["hopper", "eager"]
    assert found == pytest.approx(16 * 132 * 2 * 128 * 256 * (8192 + TILE_START) / rate)
    least = 2 * 8192**3 / rate
    assert least < found < 1.1 * least
    # One tile more than a wave costs a whole wave.
    assert matmul_seconds(cluster(), "eager", 128 * 133, 256, 64) == pytest.approx(
        2 * matmul_seconds(cluster(), "eager", 128 * 132, 256, 64)
    )


def test_sizes_are_those_of_the_run() -> None:
    """FLOPs by `model.layers.flops`; the matrices, and the embedding, which is no product."""
    for name in ("gstack-1.1b", "gstack-410m"):
        model = load_run(CONFIGS / f"{name}.yaml").stages[-1].model
        shape = shape_of(model, 2048)
        assert shape.flops_per_token == flops_per_token(model, 2048)
        table = model.vocab_size * model.hidden_size
        assert shape.parameters == matmul_flops(model) // 6 + table


def test_sizes_of_hybrids_are_those_of_the_run() -> None:
    (stage,) = load_run(CONFIGS / "scratch-samba-421m.yaml").stages
    shape = shape_of(stage.model, 4096)
    assert shape.flops_per_token == flops_per_token(stage.model, 4096)
    norms = norm_parameters(stage.model)
    assert shape.parameters == parameters(stage.model) - norms


MAMBA = {"layer_types": ["mamba"], "mamba_d_inner": 8192}


def test_products_of_a_mamba_layer_on_a_rank() -> None:
    """Two inputs, x_proj to dt of rank 256 and 2 x 16 states, dt_proj, and the output."""
    model = ModelConfig(**SEVEN_MODEL.model_dump(exclude_unset=True) | MAMBA)
    assert list(block_products(MIXERS["mamba"], model, 4)) == [
        *[(2048, 4096)] * 2,
        (256 + 32, 2048),
        (2048, 256),
        (4096, 2048),
    ]


def test_time_of_layer_types() -> None:
    """A window shortens attention alone. A scan is bound by memory, and its x_proj is summed over
    tensor-parallel ranks."""
    types = [
        {"layer_types": ["sliding_attention"], "sliding_window": 256},
        MAMBA,
        {"qk_norm": "full_width"},
    ]
    work = replace(WORK, dp=16, tp=4)
    models = [ModelConfig(**SEVEN_MODEL.model_dump(exclude_unset=True) | each) for each in types]
    found = [seconds(replace(work, shape=shape_of(model, 2048))) for model in models]
    plain, (windowed, mamba, normed) = seconds(work), found
    visible = 256 * (2 * 2048 - 255) / (2 * 2048) + 2 * DIAGONAL
    ratio = visible / (2049 / 2 + DIAGONAL)
    assert windowed.attention / plain.attention == pytest.approx(ratio, rel=1e-4)
    assert windowed.memory_bound == plain.memory_bound
    assert mamba.attention == 0
    channels, moved = 8192 / 4, (10 + 6 / 2 + 15 + 7 / 2) - 4 * 2 * 4096 / 8192
    bandwidth = 3.35e12 * HBM_SHARE
    scanned = 2 * 32 * 4 * 2048 * 2 * moved * channels / bandwidth
    assert mamba.memory_bound - plain.memory_bound == pytest.approx(scanned)
    group = tensor_group(cluster(), 4)
    for time, size in ((mamba, 2 * (256 + 32)), (normed, 8)):
        sums = 2 * 2 * 32 * group.all_reduce(size * 4 * 2048)
        assert time.tensor_parallel - plain.tensor_parallel == pytest.approx(sums)


def test_the_parts_are_the_step() -> None:
    found = seconds(WORK)
    parts = (found.matmul + found.attention + found.memory_bound + found.tensor_parallel) + (
        found.zero_exposed + found.hidden_cost + found.optimizer
    )
    assert found.seconds == pytest.approx(parts)
    assert found.tokens_per_gpu == pytest.approx(2 * 4 * 2048 / found.seconds)
    assert found.mfu == pytest.approx(found.tokens_per_gpu * SEVEN.flops_per_token / 989e12)
    assert found.tensor_parallel == 0.0
    held = SEVEN.parameters / 64
    assert found.optimizer == pytest.approx(held * ADAM_BYTES["fused"] / (3.35e12 * HBM_SHARE))


def test_checkpointing_computes_a_forward_pass_more() -> None:
    plain, full = seconds(WORK), seconds(replace(WORK, recomputed=1.0))
    assert full.attention == pytest.approx(plain.attention * 4.5 / 3.5)
    assert 1.25 < full.matmul / plain.matmul < 4 / 3  # but not the head
    assert full.optimizer == plain.optimizer


def test_what_zero_costs() -> None:
    """All exposed where nothing overlaps; ZeRO 1 reduces once a step, ZeRO 2 in each micro batch,
    ZeRO 0 sums (twice the bytes), and holds all of Adam's state."""
    exposed = replace(WORK, overlap_grad_reduce=False, overlap_param_gather=False, accumulation=4)
    times = {zero: seconds(replace(exposed, zero_stage=zero)) for zero in (0, 1, 2)}
    group = strided_group(cluster(), 64, 1)
    once = group.one_way(2 * SEVEN.parameters)
    assert times[0].zero_exposed == pytest.approx(2 * once)
    assert times[1].zero_exposed == pytest.approx(2 * once)
    assert times[2].zero_exposed == pytest.approx(5 * once)
    assert times[0].optimizer == pytest.approx(64 * times[1].optimizer)
    hidden = seconds(replace(WORK, zero_stage=1))
    assert hidden.zero_exposed == pytest.approx(0.0)
    assert hidden.zero_hidden == pytest.approx(2 * once)


def test_zero_3_hides_what_the_network_can_carry() -> None:
    """A tenth of the network's speed: the gathers outlast the products."""
    fast = seconds(WORK)
    whole = cluster()
    slow = step_time(WORK, replace(whole, card=replace(whole.card, nic=5e9)))
    assert fast.zero_exposed < 0.05 * fast.seconds < slow.zero_exposed
    assert slow.seconds > 1.5 * fast.seconds
    alone = step_time(replace(WORK, dp=1), cluster("h100:1x1"))
    assert (alone.zero_exposed, alone.zero_hidden) == (0.0, 0.0)


def test_hybrid_sharding_gathers_from_other_hosts_once_per_step() -> None:
    slow = cluster()
    slow = replace(slow, card=replace(slow.card, nic=5e9))
    work = replace(WORK, accumulation=8)
    plain, hybrid = (step_time(replace(work, hpz=size), slow) for size in (1, 8))
    gathers = [strided_group(slow, size, 1).one_way(2 * SEVEN.parameters) for size in (64, 8)]
    total = [time.zero_exposed + time.zero_hidden for time in (plain, hybrid)]
    assert total[0] - total[1] == pytest.approx(15 * (gathers[0] - gathers[1]), rel=0.02)
    assert hybrid.seconds < plain.seconds


def test_what_tensor_parallelism_costs() -> None:
    """Two all-reduces of a layer each way, and one at either end; none is hidden."""
    work = replace(WORK, dp=16, tp=4)
    found = seconds(work)
    one = tensor_group(cluster(), 4).all_reduce(2 * 4 * 2048 * 4096)
    assert found.tensor_parallel == pytest.approx(2 * (32 * 4 + 2) * one)
    split = seconds(replace(work, sequence_parallel=True))
    assert split.tensor_parallel > found.tensor_parallel
    assert split.memory_bound < found.memory_bound
    assert found.matmul == pytest.approx(seconds(WORK).matmul / 4, rel=0.1)
    across = seconds(replace(WORK, dp=16, tp=4), "h100:2x32")
    assert across.tensor_parallel > 2.5 * found.tensor_parallel


@pytest.mark.parametrize(
    ("ranks", "chunks", "number"), [(4, 1, 8), (4, 2, 8), (4, 4, 1), (8, 4, 4)]
)
def test_the_bubble_is_the_idle_time_of_the_schedule(ranks: int, chunks: int, number: int) -> None:
    split = PipelineSplit(ranks, (1,) * (ranks * chunks))
    work = replace(WORK, zero_stage=1, accumulation=number, split=split)
    line = timeline(ranks, chunks, number)
    # A backward pass takes as long as a forward pass in the slots of a timeline.
    idle = len(line[0]) - 2 * chunks * number
    assert pipeline_bubble(work, [2.0 * chunks] * ranks) == pytest.approx(idle)
