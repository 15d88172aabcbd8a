"""Plain PyTorch training loops, the upper bound, with three implementations of the same model.

Without metrics and checks: batches are slices of a memory-mapped file, loss, gradient clipping and
fused AdamW are those of torch. Several ranks use torch's DistributedDataParallel.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tools.benchmarks.training.gate import Boundary, TrainingCase

LR, CLIP, BETAS, DECAY = 1e-3, 1.0, (0.9, 0.95), 0.1

Forward = Callable[[nn.Module, Tensor], Tensor]


def own_model(case: TrainingCase) -> tuple[nn.Module, Forward]:
    """Build megagrow's model, without tensor parallelism and without an engine."""
    from megagrow.config.schema import ModelConfig
    from megagrow.model.decoder import CausalLM

    positions = torch.arange(case.sequence).expand(case.micro, -1)
    model = CausalLM(ModelConfig.model_validate(case.model))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model, lambda model, ids: model(ids, positions)


def hugging_face_model(case: TrainingCase) -> tuple[nn.Module, Forward]:
    """Build the model of transformers with torch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **case.model, use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa"
    )
    return LlamaForCausalLM(config), lambda model, ids: model(input_ids=ids).logits


def litgpt_model(case: TrainingCase) -> tuple[nn.Module, Forward]:
    """Build the model of litgpt."""
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = case.model
    config = Config(
        block_size=case.sequence,
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    return GPT(config), lambda model, ids: model(ids)


MODELS = {"own": own_model, "hugging_face": hugging_face_model, "litgpt": litgpt_model}


def plain_loop(case: TrainingCase, boundary: Boundary, model_name: str, rank: int) -> None:
    """Train one of the MODELS for all steps of a case."""
    torch.manual_seed(0)
    model, forward = MODELS[model_name](case)
    wrapped: Any = model
    if case.ranks > 1:
        dist.init_process_group("gloo")
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    groups = [{"params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    batches = micro_batches(case, rank)
    for step in range(case.steps):
        boundary()
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / case.steps))
        for index in range(case.accumulation):
            ids, labels = next(batches)
            last = index + 1 == case.accumulation
            with nullcontext() if last or case.ranks == 1 else wrapped.no_sync():
                logits = forward(wrapped, ids)
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
                (loss / case.accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    boundary()
    if case.ranks > 1:
        dist.destroy_process_group()


def micro_batches(case: TrainingCase, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's micro-batches in file order: token ids and labels, (micro, sequence)."""
    from pathlib import Path

    from megagrow.data.indexed import IndexedCorpus

    tokens, rows = IndexedCorpus(Path(case.corpus)).tokens, case.micro
    size, at = rows * case.sequence, rank
    while True:
        start = at * size % (len(tokens) - size - 1)
        part = torch.from_numpy(tokens[start : start + size + 1].astype("int64"))
        yield part[:-1].view(rows, -1), part[1:].view(rows, -1)
        at += case.ranks
