"""Accounts of FLOPs, metrics, scores and spikes of a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.analysis.curves import Growth, RunCurves, Series, load_curves
from megagrow.analysis.flop_accounting import cumulative_flops, make_setting
from megagrow.analysis.growth_transient import spikes
from megagrow.analysis.report.plots import plot_scores
from megagrow.analysis.run_metrics import read_scores
from megagrow.config.load import load_run as load_config
from megagrow.config.load import to_yaml
from megagrow.errors import InputError
from tests.helpers.analysis.records import append

ROOT = Path(__file__).resolve().parents[2]


def test_stages_are_charged_by_their_own_price() -> None:
    starts, charges = (0, 100, 150), (2.0, 3.0, 10.0)
    assert cumulative_flops(40, starts, charges) == 80.0
    assert cumulative_flops(100, starts, charges) == 200.0
    assert cumulative_flops(120, starts, charges) == 260.0
    assert cumulative_flops(160, starts, charges) == 200.0 + 150.0 + 100.0


def test_paper_charges_the_base_by_its_share_without_embeddings() -> None:
    """2 -> 8 layers: d tokens cost as much as d / 4 of the target, except for the last norm."""
    run = load_config(ROOT / "configs/demo/gstack.yaml")
    base, target = make_setting(run).charges
    assert target / base == pytest.approx(4, rel=2e-3)


def test_setting_differs_by_all_but_seed_and_name(tmp_path: Path) -> None:
    path = ROOT / "configs/demo/gstack.yaml"
    one = make_setting(load_config(path))
    again = make_setting(load_config(path, ["seed=9", "name=other", "output_dir=x"]))
    other = make_setting(load_config(path, ["optimizer.lr=1e-3"]))
    begun = make_setting(load_config(path, ["init_from=x"]))
    assert one.has_full_cost and not begun.has_full_cost
    assert one == again != other


def test_run_with_its_config_has_all_accounts(make_run: Callable[..., Path]) -> None:
    folder = make_run("grown", [(20, 1000), (30, 4000, 1e8)])
    assert load_curves(folder).charged_flops((10,)) is None
    config = load_config(ROOT / "configs/demo/gstack.yaml")
    (folder / "config.yaml").write_text(to_yaml(config))
    run = load_curves(folder)
    base, target = make_setting(config).charges
    assert run.charged_flops((20_000, 50_000)) == pytest.approx(
        (20e3 * base, 20e3 * base + 30e3 * target)
    )
    curve = run.curve(run.validation, "flops_charged")
    assert curve is not None and curve.flops[1] == pytest.approx(20e3 * base)


def test_metrics_and_scores_are_read(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [(20, 1000)])
    found = {"sciq": {"acc": 0.75, "acc_stderr": None}, "wikitext": {"word_perplexity": 20.5}}
    append(folder, kind="evaluation", results=found, average=0.75)
    run = load_curves(folder)
    assert run.metrics.grad_norm.values == (1.0,) * 20
    assert set(run.metrics.tokens_per_second.values) == {2000.0}
    assert run.metrics.memory_bytes.tokens[-1] == 20_000
    assert run.metrics.mfu.values == ()
    (score,) = run.scores
    assert (score.tokens, score.seconds, score.average) == (20_000, 10.0, 0.75)
    assert score.results == {"sciq": {"acc": 0.75}, "wikitext": {"word_perplexity": 20.5}}


def test_accuracies_are_drawn_against_all_costs(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [(20, 1000)])
    append(folder, kind="evaluation", results={}, average=0.75)
    panels = plot_scores([load_curves(folder)])
    lines = [figure.axes[0].lines[0] for figure in panels.values()]
    assert [list(line.get_xdata()) for line in lines] == [[20 * 6e6], [20_000], [10.0]]
    assert {tuple(line.get_ydata()) for line in lines} == {(0.75,)}


def test_stored_results_replace_the_record_of_their_step() -> None:
    counters = {"tokens": 1, "flops": 2, "elapsed_seconds": 3}
    records = [{"step": at, "results": {}, "average": at / 10, **counters} for at in (1, 2)]
    stored = [{"step": at, "results": {}, "average": at / 5, **counters} for at in (3, 2)]
    found = read_scores(records, stored)
    assert [(score.step, score.average) for score in found] == [(1, 0.1), (2, 0.4), (3, 0.6)]


def test_the_last_samples_are_read(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [(20, 1000)])
    assert load_curves(folder).samples is None
    for text in ("early", "late"):
        append(folder, kind="samples", samples=[{"prompt": "a", "text": text}])
    samples = load_curves(folder).samples
    assert samples is not None
    assert (samples.step, samples.texts) == (20, (("a", "late"),))


def test_malformed_scores_raise(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [(20, 1000)])
    append(folder, kind="evaluation", results=[0.5])
    with pytest.raises(InputError, match="a record is malformed"):
        load_curves(folder)


def grown_with(loss: tuple[float, ...], run: RunCurves) -> RunCurves:
    """Return the run with these training losses every 10 tokens, grown after 20."""
    tokens = tuple(10 * (at + 1) for at in range(len(loss)))
    zeros = (0.0,) * len(loss)
    growth = Growth(1, 20, 0.0, 0.0, 0.0, None)
    return replace(
        run, train=Series(tokens, zeros, zeros, zeros, loss), growths=(growth,), tokens=tokens[-1]
    )


def test_spike_is_measured_until_recovery(make_run: Callable[..., Path]) -> None:
    run = load_curves(make_run("run", [(20, 1000)]))
    (spike,) = spikes(grown_with((4.0, 3.0, 5.0, 4.5, 3.5, 2.9, 6.0), run))
    assert (spike.before, spike.peak, spike.recovery_tokens) == (3.0, 5.0, 40)
    (never,) = spikes(grown_with((4.0, 3.0, 5.0, 3.1), run))
    assert (never.peak, never.recovery_tokens) == (5.0, None)
    (none,) = spikes(grown_with((4.0, 3.0, 2.5), run))
    assert (none.peak, none.recovery_tokens) == (2.5, 10)
    assert spikes(grown_with((4.0, 3.0), run)) == spikes(run) == []
