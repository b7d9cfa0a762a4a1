"""Hugging Face: a small BERT, fused, trained by the Trainer; its weights by safetensors; LoRA by PEFT on top of it.

The task is made up: is the first token of the lower half of the vocabulary? The result is the loss on held-out
sentences; a guess has ln 2, 0.693. Fuse after the model is made or loaded, and before PEFT wraps it.

python examples/with_transformers.py [--small]
"""

from __future__ import annotations

from options import options

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beside import Beside, Prepare, beside
from torch import nn

import dlkernels

import transformers  # isort: skip  after beside, which imports torchvision for it
from peft import LoraConfig, get_peft_model  # isort: skip
from safetensors.torch import load_file, save_file  # isort: skip

TOKENS, LENGTH = 10, 32
RATE, LORA_RATE = 3e-3, 1e-2  # LoRA trains few weights, and takes larger steps


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=TOKENS,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    ids = torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = (ids[:, 0] < TOKENS // 2).long()
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def train(prepare: Prepare, steps: int, lora: bool, seed: int) -> float:
    model = prepare(bert())
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], r=4, task_type="SEQ_CLS"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=LORA_RATE if lora else RATE,
                use_cpu=True,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=sentences(1024, seed=0),
            eval_dataset=sentences(128, seed=1),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def check_weights() -> None:
    """A fused model's weights are a stock model's: they are written by one and read by the other."""
    fused, stock = dlkernels.fuse(bert()).eval(), bert().eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(fused.state_dict(), file)
        stock.load_state_dict(load_file(file))
    ids = torch.arange(LENGTH)[None] % TOKENS
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, stock(ids).logits)
    print("the weights of the fused model, by safetensors, in a stock model: same outputs")


def main() -> dict[str, Beside]:
    args = options(__doc__)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses a name that will go
    check_weights()
    outcomes = {}
    for name, lora in (("all weights", False), ("LoRA", True)):
        print(f"{name}:")
        outcomes[name] = beside(
            partial(train, steps=20 if args.small else 200, lora=lora, seed=args.seed), seed=args.seed
        )
    return outcomes


if __name__ == "__main__":
    main()
