"""Train the small language model that ships with the project: `python -m components.language_model.pretraining --help`.

The text is the standard library of the running interpreter without the documents that `components.corpus` holds out,
so that held-out documents are new to the language model as well as to the SAE.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.corpus.documents import split_of
from components.corpus.standard_library import read_standard_library
from components.hardware import keep_freed_memory

BOS = "<|bos|>"
HELD_OUT_FRACTION = 0.05  # the default of the corpus settings; a test keeps the two equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for config.json, model.safetensors and the tokenizer")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time; the learning rate decays over it")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence, BOS included")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = list(read_standard_library())
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for document in documents:
        texts[split_of(document.text, HELD_OUT_FRACTION)].append(document.text)

    tokenizer = train_tokenizer(texts["train"], arguments.vocabulary)
    arguments.output.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=arguments.context
    )
    wrapped.save_pretrained(arguments.output)
    bos = int(tokenizer.token_to_id(BOS) or 0)  # the only special token, so the first
    streams = {
        split: torch.tensor(
            [token for text in split_texts for token in [bos, *tokenizer.encode(text, add_special_tokens=False).ids]]
        )
        for split, split_texts in texts.items()
    }
    print(f"{len(documents)} documents; tokens: " + str({k: len(v) for k, v in streams.items()}), flush=True)

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=round(arguments.width * 8 / 3 / 32) * 32,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 32,
        num_key_value_heads=arguments.width // 32,
        max_position_embeddings=arguments.context,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos,
        initializer_range=0.02,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    # Muon for the matrices of the blocks, AdamW for the embedding and the norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]

    # Every epoch cuts the stream at another offset, so that no context is seen twice in the same frame.
    length = arguments.context - 1
    stream = streams["train"]
    generator = torch.Generator().manual_seed(arguments.seed)
    started, step, tokens, smoothed = time.monotonic(), 0, 0, float("nan")
    progress = 0.0
    while progress < 1.0:
        offset = int(torch.randint(length, (1,), generator=generator))
        sequences = stream[offset:][: (len(stream) - offset) // length * length].view(-1, length)
        for rows in torch.randperm(len(sequences), generator=generator).split(arguments.batch):
            if len(rows) < arguments.batch:
                continue
            progress = (time.monotonic() - started) / (60 * arguments.minutes)
            if progress >= 1.0:
                break
            rate = min(1.0, (step + 1) / 50) * min(1.0, max(0.0, (1.0 - progress) / 0.7))
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, base in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = base * rate
            loss = sequence_loss(model, sequences[rows].to(device), bos)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + rows.numel() * arguments.context
            smoothed = loss.item() if step == 1 else 0.98 * smoothed + 0.02 * loss.item()
            if step % 100 == 0:
                line = f"step {step} tokens {tokens:,} loss {smoothed:.3f} {tokens / (time.monotonic() - started):,.0f} tok/s"
                if step % 500 == 0:
                    line += f" held-out {held_out_loss(model, streams['held_out'], bos, length):.4f}"
                print(line, flush=True)
    final = held_out_loss(model, streams["held_out"], bos, length)
    model.save_pretrained(arguments.output)
    summary = {
        "held_out_loss": round(final, 4),
        "train_loss_smoothed": round(smoothed, 4),
        "steps": step,
        "tokens_seen": tokens,
        "train_tokens": len(streams["train"]),
        "held_out_tokens": len(streams["held_out"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "device": device,
    }
    print(json.dumps(summary), flush=True)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Jordan et al. 2024, "Muon").

    In float32 and batched over matrices of one shape: torch's own runs them one by one in bfloat16, which a CPU without
    bfloat16 units emulates (1.5 s a step here, against 0.05 s).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                stretch = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * stretch)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """`[n, rows, columns]` -> the same shape with all singular values near 1 (quintic Newton-Schulz iteration)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sequence_loss(model: torch.nn.Module, rows: torch.Tensor, bos: int) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of `[BOS, *row]`; rows `[batch, length]`."""
    inputs = torch.cat([torch.full_like(rows[:, :1], bos), rows], dim=1)
    logits = model(inputs[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows.flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: torch.Tensor, bos: int, length: int) -> float:
    rows = stream[: len(stream) // length * length].view(-1, length).to(next(model.parameters()).device)
    losses = [sequence_loss(model, part, bos).item() * len(part) for part in rows.split(64)]
    return sum(losses) / len(rows)


if __name__ == "__main__":
    main()
