"""Depthwise growth: whole layers are copied, by any index list.

Du et al. 2024, "Stacking Your Transformers", section 3.1 and appendix A.3.
"""

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Gather, GrowthMap, Kind, Term
from megagrow.parallel.plan import parameter_plan


def stacked_layers(source_layers: int, target_layers: int) -> list[int]:
    """Gstack: the whole stack repeated, [0..l-1] x g."""
    return [layer % source_layers for layer in range(target_layers)]


def direct_depth(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> GrowthMap:
    """The paper's G_direct in depth: target layer i is a copy of source layer `layers[i]`.

    Embedding, final norm and head are copied once; moments go where their weights go. The grown
    model does not compute the same function (the loss jumps, and recovers).
    """
    layers = list(options.layers or ()) or stacked_layers(
        source.num_hidden_layers, target.num_hidden_layers
    )
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in parameter_plan(target, tp=1).items():
        origin = name
        if spec.layer is not None:
            origin = name.replace(f"layers.{spec.layer}.", f"layers.{layers[spec.layer]}.", 1)
        terms[name] = (Gather(origin),)
    kinds: tuple[Kind, ...] = ("fp32", "exp_avg", "exp_avg_sq")
    return GrowthMap(
        terms,
        terms,
        kinds=kinds if options.optimizer_state != "reset" else kinds[:1],
        preserves_function=layers == list(range(source.num_hidden_layers)),
        provenance=tuple(layers),
    )
