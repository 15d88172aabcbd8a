"""Moments that a growth transfers, against those that the grown model would have."""

import torch

from megagrow.config.schema import ModelConfig
from tests.helpers.growth.cases import Case
from tools.docs.operators.dense_growth import State, grown
from tools.docs.operators.reference_training import (
    Tensors,
    gradients,
    grown_weights,
    random_ids,
    random_weights,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def moved(found: Case, tensors: Tensors, kind: str) -> Tensors:
    """Return the grown form of a state of the source."""
    state = {name: {kind: tensor} for name, tensor in tensors.items()}
    return {name: k[kind] for name, k in grown(state, found.growth, found.target, (kind,)).items()}


def reached(found: Case) -> Tensors:
    """Return masks of the moments that come from the source; the others start at zero."""
    ones = {name: torch.ones_like(w) for name, w in random_weights(found.source).items()}
    return {name: made != 0 for name, made in moved(found, ones, "exp_avg").items()}


def _accumulated(config: ModelConfig, weights: Tensors, source: ModelConfig) -> State:
    """Return Adam's moments after some batches of tokens of `source`, with constant weights."""
    moments = {n: {k: torch.zeros_like(w) for k in MOMENTS} for n, w in weights.items()}
    for seed in range(2):
        for name, gradient in gradients(config, weights, random_ids(source, seed=seed)).items():
            moments[name]["exp_avg"].lerp_(gradient, 0.1)
            moments[name]["exp_avg_sq"].lerp_(gradient**2, 0.05)
    return moments


def worst_moment(found: Case) -> float:
    """Return the distance of the map's moments from those that the grown model would have."""
    before = random_weights(found.source)
    old = _accumulated(found.source, before, found.source)
    new = _accumulated(found.target, grown_weights(found, before), found.source)
    transported = grown(old, found.growth, found.target, MOMENTS)
    return max(
        (new[name][kind] - transported[name][kind])[mask].abs().max().item()
        for name, mask in reached(found).items()
        for kind in MOMENTS
        if mask.any()
    )
