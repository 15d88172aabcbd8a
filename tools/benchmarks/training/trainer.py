"""Hugging Face Trainer with the Llama model of transformers, with and without DeepSpeed."""

from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.training.gate import Boundary, TrainingCase
from tools.benchmarks.training.loops import BETAS, CLIP, DECAY, LR, hugging_face_model


class SequenceDataset(torch.utils.data.Dataset):
    """Sequences of a corpus in file order, in the format of the Trainer's collator."""

    def __init__(self, case: TrainingCase) -> None:
        from megagrow.data.indexed import IndexedCorpus

        self._tokens, self._length = IndexedCorpus(Path(case.corpus)).tokens, case.sequence

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = self._tokens[index * self._length : (index + 1) * self._length].astype("int64")
        return {"input_ids": part, "labels": part}


def train_with_trainer(case: TrainingCase, boundary: Boundary, deepspeed: bool) -> None:
    """Train all steps of a case."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            boundary()

    arguments = TrainingArguments(
        output_dir=case.folder,
        max_steps=case.steps,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=case.accumulation,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=_deepspeed(case) if deepspeed else None,
    )
    model, _ = hugging_face_model(case)
    trainer = Trainer(model, arguments, train_dataset=SequenceDataset(case), callbacks=[Steps()])
    boundary()
    trainer.train()


def _deepspeed(case: TrainingCase) -> dict[str, Any]:
    return {
        "train_batch_size": case.batch,
        "train_micro_batch_size_per_gpu": case.micro,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
