"""The target of a learned growth as a model: each part makes its weights when it is called.

The weights of a part (the embedding, one layer, the final norm, the head) are made out of the
frozen source and the learned numbers, used, and forgotten; on the way back they are made once
more. So of the larger model no rank ever holds more than its slice of one part.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from megagrow.growth.ligo import Learned, grown_slice
from megagrow.model.llama import LlamaForCausalLM
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.materialize import build_model
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec, parameter_plan
from megagrow.reshard.exchange import Side
from megagrow.reshard.mixture import mixtures


class Formed(nn.Module):
    """A part of a model that has no weights of its own: `form` makes them for every call."""

    def __init__(self, part: nn.Module, form: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.part = part
        self.form = form

    def forward(self, *inputs: Any) -> Tensor:
        return checkpoint(self._call, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _call(self, *inputs: Any) -> Tensor:
        return functional_call(self.part, dict(self.form()), inputs)


@dataclass(frozen=True, eq=False)
class Forming:
    """What the target's weights are made of, and how they are spread."""

    learned: Learned
    source: Side
    settings: EngineSettings
    """Of the target."""
    topology: Topology
    dtype: torch.dtype
    """Of the forward and backward pass; weights are made in the type of the learned numbers."""

    @cached_property
    def plan(self) -> dict[str, ParamSpec]:
        """Of the target."""
        return parameter_plan(self.settings.model, self.topology.tp)

    def weights(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """This rank's slices of some of the target's parameters, in the type that is computed in:
        `names` are the logical ones by what they are to be called here. Collective."""
        tp, tp_rank = self.topology.tp, self.topology.tp_rank
        specs = [self.plan[name] for name in names.values()]
        recipes = [self.learned.recipe(spec) for spec in specs]
        factors = torch.stack([recipe.alphas for recipe in recipes])
        mixed = mixtures(factors, [recipe.sources for recipe in recipes], self.source)
        found = {}
        for called, spec, recipe, matrix in zip(names, specs, recipes, mixed, strict=True):
            weight = grown_slice(spec, recipe, matrix, tp, tp_rank)
            if spec.tp_dim is None and weight.requires_grad:
                # All tensor-parallel ranks find its whole gradient, which is to count once.
                weight.register_hook(lambda grad: grad / tp)
            found[called] = weight.to(self.dtype)
        return found


def formed_model(forming: Forming) -> LlamaForCausalLM:
    """This rank's share of the target, without weights."""
    settings, topology = forming.settings, forming.topology
    # Parts are recomputed as a whole, so nothing within them is.
    parallel = settings.parallel.model_copy(update={"activation_checkpointing": "none"})
    plan = forming.plan
    model = build_model(plan, replace(settings, parallel=parallel), topology, forming.dtype)
    for part in _parts(settings.model.num_hidden_layers):
        names = {n.removeprefix(f"{part}."): n for n in plan if n.startswith(f"{part}.")}
        if part == "lm_head" and not names:
            names = {"weight": "model.embed_tokens.weight"}
        whole = model.get_submodule(part)
        model.set_submodule(part, Formed(whole, partial(forming.weights, names)))
    return model


def _parts(layers: int) -> list[str]:
    blocks = (f"model.layers.{layer}" for layer in range(layers))
    return ["model.embed_tokens", *blocks, "model.norm", "lm_head"]
