"""Nothing that a growth adds stays dead, and its first updates are of the size of all others."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.config.schema import OptimizerConfig
from tests.helpers.growth.cases import Case, case, cases
from tests.helpers.growth.computing import every_id
from tests.helpers.hugging_face import tiny
from tools.docs.operators.reference_training import (
    Adam,
    Tensors,
    fresh_state,
    gradients,
    grown_weights,
    random_weights,
    trained,
    weights_of,
)

SOURCE = tiny(hidden_size=8, head_dim=4, num_key_value_heads=2, intermediate_size=6, vocab_size=11)


def lively(found: Case, steps: int) -> list[Tensors]:
    """After each of so many steps which entries have had a gradient by then, all tokens seen."""
    weights = grown_weights(found, random_weights(found.source))
    state, out = fresh_state(weights), []
    seen = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
    for step in range(steps):
        ids = every_id(found.source, seed=step)
        now = gradients(found.target, weights_of(state), ids)
        seen = {name: seen[name] | (gradient != 0) for name, gradient in now.items()}
        out.append(seen)
        state = trained(found.target, state, [ids], step)
    return out


@pytest.mark.parametrize(
    "name", ["zero_width", "zero_depth", "llama_pro", "lemon", "isometric", "head_dim"]
)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_every_new_number_is_trained(name: OperatorName, data: st.DataObject) -> None:
    """Each tensor has gradients at once, but those of a block that is silent for one step; after
    three steps so has had every single number."""
    found = data.draw(cases(name))
    first, *_, last = lively(found, steps=3)
    for parameter, live in first.items():
        silent = "zero_depth" in name or name == "llama_pro"
        gate = "o_proj" in parameter or "down_proj" in parameter
        if gate or not (silent and found.growth.fresh[parameter].whole):
            assert live.any(), parameter
    for parameter, live in last.items():
        assert live.all(), parameter


@pytest.mark.parametrize("literal", [False, True])
def test_the_papers_own_zero_width_leaves_new_neurons_dead(literal: bool) -> None:
    """With gate, up and down of a neuron all zero there is no gradient, ever (a saddle)."""
    found = case(SOURCE, {"intermediate_size": 9}, operator="zero_width", paper_exact=literal)
    *_, seen = lively(found, steps=3)
    for layer in range(SOURCE.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        new = [seen[f"{mlp}.{part}_proj.weight"][6:] for part in ("gate", "up")]
        new.append(seen[f"{mlp}.down_proj.weight"][:, 6:])
        for live in new:
            assert live.all() if not literal else not live.any()


def updates(beta2: float, v: float = 0.0, step: int = 10**6, steps: int = 50) -> list[float]:
    """Updates over lr, by torch's Adam, of an entry whose gradient is always 1, that begins with
    m = 0 and the given v, while the step that it shares with old entries goes on."""
    entry = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([entry], lr=1.0, betas=(0.9, beta2))
    zero = torch.zeros(1, dtype=torch.float64)
    adam.state[entry] = {
        "step": torch.tensor(float(step)),
        "exp_avg": zero.clone(),
        "exp_avg_sq": zero + v,
    }
    found = []
    for _ in range(steps):
        before = entry.item()
        entry.grad = torch.ones(1, dtype=torch.float64)
        adam.step()
        found.append(before - entry.item())
    return found


def test_new_entries_do_not_overshoot_by_the_default_betas() -> None:
    assert OptimizerConfig(lr=1.0).betas == Adam().betas == (0.9, 0.95)
    found = updates(beta2=0.95)
    assert found[0] == pytest.approx(0.45, abs=0.01)
    assert max(found) == pytest.approx(1.10, abs=0.01) and max(found) <= 1.5


def test_with_a_longer_memory_they_do_unless_v_is_measured() -> None:
    """A shared Adam step gives 3.16 and up to 6.57 times lr; `estimate_second_moment` does not."""
    found = updates(beta2=0.999)
    assert found[0] == pytest.approx(3.16, abs=0.01)
    assert max(found) == pytest.approx(6.57, abs=0.1) and found.index(max(found)) == 11
    assert max(updates(beta2=0.999, v=1.0)) <= 1.0


@pytest.mark.parametrize(
    "options", [{"operator": "zero_width"}, {"operator": "direct_width"}, {"operator": "lemon"}]
)
def test_what_estimate_second_moment_measures_is_exactly_what_is_new(
    options: dict[str, Any],
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 9}
    found = case(SOURCE, sizes, **options, optimizer_state="estimate_second_moment")
    for name, terms in found.growth.moments.items():
        new = found.growth.fresh[name]
        for term in terms:
            for axis, mask in ((term.rows, new.rows), (term.cols, new.cols)):
                if mask is None:
                    assert axis.index is None or (axis.index >= 0).all()
                else:
                    assert ((axis.index < 0) == mask).all(), name
