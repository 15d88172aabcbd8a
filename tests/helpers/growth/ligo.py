"""Learned growths by their definition: the formula of every tensor written out, with kron."""

import torch
from torch import Tensor
from torch.func import functional_call

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.build_map import GrowthSpec
from megagrow.growth.ligo import LigoParameters, initial
from megagrow.growth.operators import resolve_operators
from megagrow.model.decoder import CausalLM
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.hugging_face import hugging_face, tiny
from tools.docs.operators.dense_growth import State

WIDER = {
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "intermediate_size": 60,
}
"""Whole copies of the residual stream, one and a half of the groups, some of the neurons."""

DEEPER = {"num_hidden_layers": 5}

GROWTHS = {
    "depth": (["learn_depth"], DEEPER),
    "width": (["learn_width"], WIDER),
    "both": (["learn_width", "learn_depth"], WIDER | DEEPER),
}


def source_of(tied: bool) -> ModelConfig:
    return tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=4, tie_word_embeddings=tied)


def growing_of(name: str, tied: bool, **options: object) -> GrowthSpec:
    operators, sizes = GROWTHS[name]
    source = source_of(tied)
    chosen = GrowthConfig(operator=operators, **options)
    return resolve_operators(source, source.model_copy(update=sizes), chosen, "7/stage-1")


def state_of(config: ModelConfig, seed: int = 0) -> State:
    """Weights of a model and random moments, whole, fp32."""
    plan = parameter_plan(config, tp=1)
    weights = dict(hugging_face(config, seed).named_parameters())
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {"fp32": weights[name].detach().view(spec.rows, spec.cols)}
        | {
            kind: torch.rand(spec.rows, spec.cols, generator=generator)
            for kind in ("exp_avg", "exp_avg_sq")
        }
        for name, spec in plan.items()
    }


def disturbed(learned: LigoParameters, seed: int = 0) -> LigoParameters:
    """The same with noise on every number, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in learned.tensors():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return learned


def outputs(config: ModelConfig, values: dict[str, Tensor], inputs: tuple) -> Tensor:
    """Logits of the plain model with these weights, (rows, cols) each, in their type."""
    with torch.device("meta"):
        model = CausalLM(config).to(next(iter(values.values())).dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = {name: value.view(shapes[name]) for name, value in values.items()}
    return functional_call(model, weights, inputs)


def learned_of(
    name: str, tied: bool, dtype: torch.dtype = torch.float32, **options
) -> LigoParameters:
    return initial(growing_of(name, tied, **options), torch.device("cpu"), dtype)


def by_formula(learned: LigoParameters, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the target by name, (rows, cols): the paper's equations 37 to 42, with A for what
    reads, and heads mixed as wholes."""
    source, target = learned.growth.source, learned.growth.target
    b = {axis: _wide(learned, axis, m) for axis, m in learned.produces.items()}
    a = {axis: _wide(learned, axis, m) for axis, m in learned.consumes.items()}
    write, read = b.get("residual"), a.get("residual")
    made = {
        "q_proj": (b.get("query"), read),
        "k_proj": (b.get("key"), read),
        "v_proj": (b.get("value"), read),
        "o_proj": (write, a.get("mixed")),
        "gate_proj": (b.get("ffn"), read),
        "up_proj": (b.get("ffn"), read),
        "down_proj": (write, a.get("ffn")),
        "input_layernorm": (write, None),
        "post_attention_layernorm": (write, None),
    }
    out = {"model.embed_tokens.weight": _product(None, weights["model.embed_tokens.weight"], write)}
    for layer in range(target.num_hidden_layers):
        for name in weights:
            if ".layers.0." in name:
                matrix = sum(
                    _factor(learned, name.split(".0.", 1)[1], layer, j)
                    * weights[name.replace(".0.", f".{j}.")]
                    for j in range(source.num_hidden_layers)
                )
                left, right = made[name.split(".")[-2]]
                out[name.replace(".0.", f".{layer}.")] = _product(left, matrix, right)
    norm = _product(write, weights["model.norm.weight"], None)
    if "lm_head.weight" in weights:
        out["lm_head.weight"] = _product(None, weights["lm_head.weight"], read)
    else:
        norm = norm * source.hidden_size / target.hidden_size
    return out | {"model.norm.weight": norm}


def _wide(learned: LigoParameters, axis: str, matrix: Tensor) -> Tensor:
    """Return B or A on the entries of an activation axis."""
    heads = axis in ("query", "key", "value", "mixed")
    size = learned.growth.source.head_dim if heads else 1
    return torch.kron(matrix, torch.eye(size).to(matrix))


def _factor(learned: LigoParameters, tensor: str, layer: int, j: int) -> Tensor | float:
    return learned.depth[tensor][layer, j] if tensor in learned.depth else float(layer == j)


def _product(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    matrix = matrix if left is None else left @ matrix
    return matrix if right is None else matrix @ right.T
