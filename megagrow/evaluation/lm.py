"""The model interface of lm-eval, under the name `megagrow`.

Texts are encoded as lm-eval's own Hugging Face model encodes them. Data-parallel ranks share the
requests of a call and exchange their answers within it, so that lm-eval sees one process on each
rank.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megagrow.errors import DataError, InputError
from megagrow.evaluation.likelihood import Pair, log_likelihoods
from megagrow.evaluation.logprobs import Generation, Scorer, Scores, generate_greedily
from megagrow.evaluation.model import Loaded, load
from megagrow.evaluation.tokenizer import Texts
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.launch import own_device, read_launch
from megagrow.parallel.process_groups import Topology, init_process_group, make_topology

MAX_GENERATED = 256
"""Tokens, where a task does not say how many (lm-eval's own number)."""

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


class Evaluated(TemplateLM):  # type: ignore[misc]
    """A model of ours for lm-eval; all ranks make the same calls together."""

    def __init__(
        self, scorer: Scores, texts: Texts, topology: Topology, max_length: int, batch_size: int
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._texts = texts
        self._topology = topology
        self._device = topology.device
        self.max_length = max_length
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        return self._texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._texts.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._texts.encode(string, add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """lm-eval's, without its bar: it ends before the first pass begins."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return self._shared([request.args[0] for request in requests], self._rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._shared([request.args for request in requests], self._written)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._shared([(context, rest) for _, context, rest in requests], self._scored)

    def _scored(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return log_likelihoods(pairs, self._scorer, self.max_length, self.batch_size, self._device)

    def _rolling(self, strings: list[str]) -> list[float]:
        windows = [self._windows(string) for string in strings]
        found = iter(self._scored([pair for pairs in windows for pair in pairs]))
        return [sum(next(found)[0] for _ in pairs) for pairs in windows]

    def _windows(self, string: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    def _written(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        texts = [self._text(context, options) for context, options in requests]
        order = sorted(texts, key=lambda text: -len(text.context))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            generate_greedily(batch, self._scorer, self._texts.eos_id, self._texts.decode)
        return [text.result or "" for text in texts]

    def _text(self, context: str, options: dict[str, Any]) -> Generation:
        if options.get("do_sample") or options.get("temperature"):
            raise DataError("this task samples its answers; only greedy decoding is done here")
        until = options.get("until") or []
        most = int(options.get("max_gen_toks", MAX_GENERATED))
        if most >= self.max_length:
            raise DataError(
                f"{most} tokens are to be written, the model reads {self.max_length}: set "
                "max_gen_toks"
            )
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        return Generation(ids, tuple([until] if isinstance(until, str) else until), most)

    def _shared(
        self, requests: list[RequestT], answer: Callable[[list[RequestT]], list[AnswerT]]
    ) -> list[AnswerT]:
        """Answers of all requests on all ranks, each computed by one data-parallel rank."""
        dp, dp_rank = self._topology.dp, self._topology.dp_rank
        bounds = [len(requests) * part // dp for part in range(dp + 1)]
        part = requests[bounds[dp_rank] : bounds[dp_rank + 1]]
        if dp == 1:
            return self._to_the_end(answer, part)
        own = run_on_all_ranks(lambda: self._to_the_end(answer, part))
        parts: list[Any] = [None] * dp
        dist.all_gather_object(parts, own, group=self._topology.dp_group)
        return [found for part in parts for found in part]

    def _to_the_end(
        self, answer: Callable[[list[RequestT]], list[AnswerT]], requests: list[RequestT]
    ) -> list[AnswerT]:
        """Answers, when all ranks are done: those that may not stop before others do not."""
        try:
            found = answer(requests)
        except InputError:
            self._scorer.finish()
            raise
        self._scorer.finish()
        return found


def evaluated(loaded: Loaded, topology: Topology, batch_size: int) -> Evaluated:
    """A model that was loaded, for lm-eval."""
    length = loaded.model.config.max_position_embeddings
    return Evaluated(Scorer(loaded, topology), loaded.texts, topology, length, batch_size)


@register_model("megagrow")
class MegagrowLM(Evaluated):
    """A checkpoint of any layout, a run's newest, or a Hugging Face folder, opened by its path.

    InputError as `load`; also where batch_size is no number, which alone is understood. Each rank
    computes on its own GPU, or on the CPU where there is none, whatever `device` says: lm-eval's
    command line names the first GPU by itself.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        tp: int = 1,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise DataError(f"batch_size {batch_size}: should be a number of sequences")
        topology = join(tp)
        loaded = load(Path(checkpoint), topology, tokenizer, dtype)
        length = loaded.model.config.max_position_embeddings
        scorer = Scorer(loaded, topology)
        super().__init__(scorer, loaded.texts, topology, length, int(batch_size))


def join(tp: int) -> Topology:
    """The grid of all ranks of this start, with `tp` tensor-parallel ones. InputError if that does
    not divide their number."""
    launch = read_launch()
    if launch.world_size % tp != 0:
        raise DataError(f"--tp {tp} does not divide the {launch.world_size} ranks of this start")
    if dist.is_initialized():
        return make_topology(tp, own_device(launch))
    return make_topology(tp, init_process_group(launch))
