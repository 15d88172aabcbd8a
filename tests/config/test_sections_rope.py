"""rope_scaling has exactly the keys of its type, and no growth changes it."""

import pytest

from megagrow.config.growth import GrowthConfig
from megagrow.config.model_file import checked_model
from megagrow.errors import InputError
from megagrow.growth.constraints import Event
from megagrow.growth.validation import event_problems
from tests.helpers.hugging_face import LLAMA3, TINY, YARN


def model(scaling, **changes):
    return checked_model(TINY | {"rope_scaling": scaling} | changes, "m.yaml")


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'rope_scaling.rope_type'"),
        ({"rope_type": "linear", "factor": 0.5}, "'rope_scaling.factor'"),
        ({"rope_type": "linear"}, "'rope_scaling.factor'"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0},
            "rope_type linear has no beta_fast",
        ),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn requires original_max_position_embeddings"),
        (
            {"rope_type": "llama3", "factor": 2.0},
            "llama3 requires low_freq_factor, high_freq_factor",
        ),
        (
            LLAMA3 | {"high_freq_factor": 1.0},
            "high_freq_factor = 1.0 is not above low_freq_factor = 1.0",
        ),
        (YARN | {"factors": 3}, "'rope_scaling.factors'"),
        ("yarn", "'rope_scaling'"),
    ],
)
def test_what_does_not_fit_is_named(scaling, message):
    with pytest.raises(InputError, match=r"^m.yaml: ") as error:
        model(scaling)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_can_not_be_computed_is_named():
    with pytest.raises(InputError, match="head_dim = 2 is too small for rope_scaling dynamic"):
        model({"rope_type": "dynamic", "factor": 2.0}, head_dim=2)
    with pytest.raises(InputError, match=r"rope_theta = 1.0 must be above 1 for rope_scaling yarn"):
        model(YARN, rope_theta=1.0)


@pytest.mark.parametrize("scaling", [None, YARN | {"factor": 2.0}])
def test_a_growth_may_change_it(scaling):
    options = GrowthConfig(operator=["zero_depth"])
    source, target = model(YARN), model(scaling, num_hidden_layers=4)
    assert event_problems(Event(source, target, options, "stages.0.model", "stages.1")) == []


def test_heads_of_yarn_do_not_grow():
    options = GrowthConfig(operator=["head_dim"])
    for scaling, problems in ((YARN, 1), (LLAMA3, 0)):
        source, target = model(scaling), model(scaling, head_dim=16)
        found = event_problems(Event(source, target, options, "stages.0.model", "stages.1"))
        assert len(found) == problems
        assert not found or "does not support rope_scaling yarn" in found[0]
