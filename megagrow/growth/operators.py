"""Table of operators: name in a run file, map builder, and properties."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from megagrow.config.growth import GrowthConfig, OperatorName, StatePolicy
from megagrow.config.model import same_function
from megagrow.config.schema import ModelConfig
from megagrow.growth import depth, width
from megagrow.growth.build_map import GrowthSpec, assemble
from megagrow.growth.depth import Depth, DepthOperator, same_depth
from megagrow.growth.isometric import isometric_map
from megagrow.growth.map import GrowthMap
from megagrow.growth.width import WidthOperator, same_width
from megagrow.parallel.optimizers.rules import ADAMW, UpdateRule


@dataclass(frozen=True)
class Operator:
    """One operator: it grows either the depth or the width."""

    source: str
    """Publication."""
    sizes: str
    """Target sizes that it accepts, for the documentation; `growth.constraints` checks them."""
    deeper: DepthOperator | None = None
    wider: WidthOperator | None = None
    state: StatePolicy = "transport"
    """Default optimizer-state policy."""
    follows: bool = False
    """True if by default hyper-parameters are scaled so that the grown model follows the
    trajectory of its source."""
    masked: bool = False
    """True if masks ramp in the new parts during training, unless `ramp_tokens` is 0."""
    learned: bool = False
    """True if the map is trained before it is applied (LiGO)."""
    from_nothing: bool = False
    """True if the source may have no layers, because no layer of the target is a copy."""
    rewarms: bool = False
    """True if new entries have a separate learning rate by default."""
    keys: tuple[str, ...] = ()
    """Keys of the growth section that only some operators use, and this one does."""


_DEPTH, _WIDTH = "more layers", "larger widths"
_HIDDEN = "larger widths, `hidden_size` by an integer factor"
_FACTORS = "larger widths, each by an integer factor"
_BLOCK = "n more layers, where n divides the number of layers"

_COPIES = ("copy_order", "copy_split")
_DIRECT_WIDTH = (*_COPIES, "paper_exact", "noise")

OPERATORS: dict[OperatorName, Operator] = {
    "direct_depth": Operator(
        "Gstack: Du et al. 2024; StackingBERT: Gong et al. 2019",
        "layers by an integer factor; any number with `layer_map`",
        depth.direct_depth,
        state="asymmetric",  # docs/results/optimizer-states.md
        keys=("layer_map",),
    ),
    "direct_width": Operator(
        "Du et al. 2024; Net2Net, bert2BERT",
        _HIDDEN + "; any with `paper_exact`",
        wider=width.direct_width,
        keys=_DIRECT_WIDTH,
    ),
    "learn_depth": Operator(
        "LiGO: Wang et al. 2023",
        _DEPTH,
        depth.zero_depth,
        state="reset",
        learned=True,
        keys=("layer_map", "learn"),
    ),
    "learn_width": Operator(
        "LiGO: Wang et al. 2023",
        _HIDDEN,
        wider=width.direct_width,
        state="reset",
        learned=True,
        keys=(*_COPIES, "learn"),
    ),
    "zero_depth": Operator(
        "Du et al. 2024; LEMON: Wang et al. 2024",
        _DEPTH,
        depth.zero_depth,
        keys=("layer_map", "new_layer_init"),
    ),
    "zero_width": Operator(
        "Du et al. 2024; Gesmundo and Maile 2023",
        _WIDTH,
        wider=width.zero_width,
        keys=("paper_exact",),
    ),
    "random_depth": Operator(
        "Du et al. 2024; MSG: Yao et al. 2024",
        _DEPTH,
        depth.random_depth,
        masked=True,
        from_nothing=True,
        keys=("layer_map", "ramp_tokens"),
    ),
    "random_width": Operator(
        "Du et al. 2024; MSG: Yao et al. 2024",
        _WIDTH,
        wider=width.random_width,
        masked=True,
        keys=("ramp_tokens",),
    ),
    "net2net_width": Operator(
        "Net2Net: Chen et al. 2016", _HIDDEN, wider=width.net2net_width, keys=("noise",)
    ),
    "staged_width": Operator(
        "Staged Training: Shen et al. 2022",
        "all widths by a factor of 2",
        wider=width.staged_width,
        keys=_DIRECT_WIDTH,
    ),
    "bert2bert_fpi": Operator("bert2BERT: Chen et al. 2022", _WIDTH, wider=width.bert2bert_fpi),
    "bert2bert_aki": Operator("bert2BERT: Chen et al. 2022", _WIDTH, wider=width.bert2bert_aki),
    "lemon": Operator("LEMON: Wang et al. 2024", _WIDTH, wider=width.lemon, keys=("noise",)),
    "hypercloning": Operator(
        "HyperCloning: Samragh et al. 2024", _FACTORS, wider=width.hypercloning, keys=("noise",)
    ),
    "mup_copy": Operator(
        "muP upscaling: arXiv 2602.10545",
        _FACTORS,
        wider=width.direct_width,
        follows=True,
        keys=_DIRECT_WIDTH,
    ),
    "sparkling": Operator(
        "SPARKLING: arXiv 2602.02472",
        _WIDTH,
        wider=width.sparkling,
        state="asymmetric",
        rewarms=True,
        keys=("new_layer_init",),
    ),
    "isometric": Operator(
        "after SliceGPT: Ashkboos et al. 2024",
        "larger `hidden_size`, with an untied head",
        wider=width.isometric,
    ),
    "head_dim": Operator(
        "Gesmundo and Maile 2023, under RoPE",
        "larger `head_dim`, by an integer factor",
        wider=width.head_dim,
    ),
    "vocabulary": Operator("field practice", "larger `vocab_size`", wider=width.vocabulary),
    "solar": Operator(
        "SOLAR: Kim et al. 2023",
        "an even number of layers, at most twice as many",
        depth.solar,
        state="asymmetric",
    ),
    "llama_pro": Operator(
        "LLaMA-Pro: Wu et al. 2024", _BLOCK, depth.llama_pro, keys=("new_layer_init",)
    ),
    "mslt": Operator(
        "MSLT: Yang et al. 2020",
        "more layers, at most twice as many",
        depth.mslt,
        state="asymmetric",
    ),
    "midas": Operator("MIDAS: Saunshi et al. 2024", _BLOCK, depth.midas, state="asymmetric"),
    "lidas": Operator(
        "LIDAS: arXiv 2512.08819", _BLOCK + " at least twice", depth.lidas, state="asymmetric"
    ),
}


def operators_of(options: GrowthConfig) -> list[Operator]:
    """Return the operators of a growth event."""
    return [OPERATORS[name] for name in options.operator]


def state_policy(options: GrowthConfig) -> StatePolicy:
    """Return the optimizer-state policy: that of the run file, else the default of the operators.

    With two operators it is the policy that keeps less.
    """
    if options.optimizer_state is not None:
        return options.optimizer_state
    wanted = {operator.state for operator in operators_of(options)}
    order: tuple[StatePolicy, ...] = (
        "reset",
        "keep_second_moment",
        "estimate_second_moment",
        "asymmetric",
        "transport",
    )
    return next(policy for policy in order if policy in wanted)


def follows_exactly(options: GrowthConfig) -> bool:
    """Return True if hyper-parameters are scaled for exact continuation."""
    if options.exact_continuation is not None:
        return options.exact_continuation
    return any(operator.follows for operator in operators_of(options))


def is_learned(options: GrowthConfig) -> bool:
    """Return True if the map is trained before it is applied."""
    return any(operator.learned for operator in operators_of(options))


def is_masked(options: GrowthConfig) -> bool:
    """Return True if new parts of the grown model are masked at first."""
    return options.ramp_tokens != 0 and any(each.masked for each in operators_of(options))


def depth_of(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return the growth in depth; the identity without a depth operator."""
    deeper = [each.deeper for each in operators_of(options) if each.deeper is not None]
    return deeper[-1](source, target, options) if deeper else same_depth(source)


def resolve_operators(
    source: ModelConfig,
    target: ModelConfig,
    options: GrowthConfig,
    stream: str,
    matrices: UpdateRule = ADAMW,
) -> GrowthSpec:
    """Resolve the operators of a run file to the growth in depth and width.

    `matrices` is the optimizer of the matrices of decoder layers in the target.
    """
    chosen = operators_of(options)
    found_depth, found_width = depth_of(source, target, options), same_width(source)
    for operator in chosen:
        if operator.wider is not None:
            found_width = operator.wider(source, target, options, generator_of(stream))
    policy = state_policy(options)
    return GrowthSpec(source, target, found_depth, found_width, options, policy, stream, matrices)


def growth_map(
    source: ModelConfig,
    target: ModelConfig,
    options: GrowthConfig,
    stream: str = "",
    matrices: UpdateRule = ADAMW,
) -> GrowthMap:
    """Return the map from a source to a target model.

    `stream` names its random stream (run seed and stage); `matrices` is the optimizer of the
    matrices of decoder layers in the target. The configs must have passed
    `growth.validation.growth_problems`.
    """
    parts = resolve_operators(source, target, options, stream, matrices)
    isometric = "isometric" in options.operator
    made = isometric_map(parts, generator_of(stream)) if isometric else assemble(parts)
    return made if same_function(source, target) else replace(made, preserves_function=False)


def generator_of(stream: str) -> np.random.Generator:
    """Return the generator of an operator's random draws; equal on all ranks."""
    digest = hashlib.blake2b(f"{stream}/operator".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
