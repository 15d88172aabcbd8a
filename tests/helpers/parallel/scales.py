"""Scales of hyper-parameters by class of parameter."""

from megagrow.parallel.optimizers.rules import ParamScale
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.parallel.engines import CONFIG

CLASSES = (
    ("embed", ParamScale(lr=1.0, weight_decay=1.0, eps=0.5, norm=2.0)),
    ("lm_head", ParamScale(lr=0.5, weight_decay=2.0, eps=1.0, norm=0.25)),
    ("norm", ParamScale(lr=1.5, weight_decay=1.0, eps=4.0, norm=3.0)),
    ("down_proj", ParamScale(lr=0.25, weight_decay=4.0, eps=0.5, norm=0.5)),
    ("", ParamScale(lr=0.7, weight_decay=1.4, eps=0.1, norm=1.75)),
)
"""Part of a parameter's name -> its scale; the first that fits."""

PLAN = parameter_plan(CONFIG, 1)
SCALES = {name: next(scale for part, scale in CLASSES if part in name) for name in PLAN}
