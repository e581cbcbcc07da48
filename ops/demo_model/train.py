"""Trains the demo checkpoint: `python ops/demo_model/train.py`. Writes workers/models/demo, the tokenizer too if there is none.

On a GPU this takes minutes, on a CPU days (see README.md). The data depends on the seed alone; two runs differ only by the
order in which a device adds floating-point numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ops.demo_model import train_tokenizer  # noqa: E402
from ops.demo_model.batches import Batch, Encoder, Shards, fixed  # noqa: E402
from ops.demo_model.held_out import evaluation_sets  # noqa: E402
from ops.demo_model.model import ALPHA, ChatGLM, Shape, is_branch_end  # noqa: E402

CHECKPOINT = ROOT / "workers" / "models" / "demo"
WEIGHTS_FILE = "model.safetensors"
WARMUP_STEPS = 400
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end earlier, with the same decay of the rate"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="of a batch, padding included")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument(
        "--processes", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="that make data"
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is in the folder")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = args.out / train_tokenizer.MODEL_FILE
    if not tokenizer_file.exists():
        tokenizer_file.write_bytes(train_tokenizer.train())
    encoder = Encoder(tokenizer_file)
    shape = Shape()
    model = ChatGLM(shape).to(args.device)
    start = args.out / WEIGHTS_FILE if args.evaluate else args.start
    if start:
        model.load_state_dict({name: t.float() for name, t in load_file(start).items()})
    seconds = 0.0
    steps = 0
    if not args.evaluate:
        shards = Shards(tokenizer_file, args.seed, args.tokens, shape.max_sequence_length)
        began = time.monotonic()
        steps = fit(model, shards.stream(args.processes), args)
        seconds = time.monotonic() - began
        write(model, args.out, shape.config(encoder.token_ids))
    scores = evaluate(model, encoder, args.device, args.tokens)
    print(json.dumps(scores, indent=1))
    if not args.evaluate:
        report = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": steps,
            "tokens_per_step": args.tokens,
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name()
            if args.device == "cuda"
            else platform.processor() or "cpu",
            "torch": torch.__version__,
            "seed": args.seed,
            "exact_match": scores,
        }
        (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def fit(model: ChatGLM, batches: Iterator[Batch], args: argparse.Namespace) -> int:
    """Trains for `args.steps` steps or `args.seconds`; says how many steps it was."""
    optimizer = torch.optim.AdamW(_groups(model), lr=args.rate, betas=BETAS, fused=args.device == "cuda")
    began = time.monotonic()
    shown, tokens, total = began, 0, torch.zeros((), device=args.device)
    for step in range(1, args.steps + 1):
        # What is done, in steps or in time, whichever is nearer to the end.
        done = max(step / args.steps, (time.monotonic() - began) / args.seconds)
        if done >= 1 and step < args.steps:
            return step
        for group in optimizer.param_groups:
            group["lr"] = (
                group["scale"]
                * args.rate
                * min(step / WARMUP_STEPS, 1.0)
                * (0.5 + 0.5 * math.cos(math.pi * done))
            )
        batch = next(batches)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(*on_device(batch, args.device))
        loss = functional.cross_entropy(logits.float(), torch.from_numpy(batch.targets).to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        total += loss.detach()
        tokens += batch.ids.size
        if step % 100 == 0 or step == args.steps:
            now = time.monotonic()
            print(
                f"step {step} of {args.steps}  loss {total.item() / (step % 100 or 100):.4f}  "
                f"{tokens / (now - shown):,.0f} tokens/s  {now - began:.0f} s",
                flush=True,
            )
            shown, tokens, total = now, 0, torch.zeros_like(total)
    return int(args.steps)


def _groups(model: ChatGLM) -> list[dict[str, object]]:
    """Parameters by their weight decay and by what their learning rate is multiplied with."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.dim() == 2, is_branch_end(name)), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": ALPHA if ends else 1.0,
            # Decay is multiplied with the learning rate; it shall be the same for all.
            "weight_decay": WEIGHT_DECAY / (ALPHA if ends else 1.0) if decays else 0.0,
        }
        for (decays, ends), parameters in groups.items()
    ]


def on_device(batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    parts = (batch.ids, batch.context_lens, batch.wanted)
    ids, context_lens, wanted = (torch.from_numpy(part).to(device, non_blocking=True) for part in parts)
    return ids, context_lens, wanted


@torch.no_grad()
def evaluate(model: ChatGLM, encoder: Encoder, device: str, tokens: int) -> dict[str, float]:
    """Share of examples of each set that greedy decoding answers exactly, the end included.

    Greedy decoding gives the wanted answer if and only if each of its tokens is the most likely one after those before it,
    so one forward pass decides. The weights are rounded to fp16 as they are saved; the arithmetic is fp32.
    """
    rounded = ChatGLM(model.shape).to(device)
    rounded.load_state_dict({name: t.half().float() for name, t in model.state_dict().items()})
    scores = {}
    for name, examples in evaluation_sets().items():
        right: list[bool] = []
        for batch in fixed(encoder, examples, tokens):
            hits = rounded(*on_device(batch, device)).argmax(-1).cpu() == torch.from_numpy(batch.targets)
            all_right = torch.ones(len(batch.ids), dtype=torch.int64)
            all_right.scatter_reduce_(0, torch.from_numpy(batch.rows), hits.long(), "amin")
            right.extend(all_right.bool().tolist())
        scores[name] = round(sum(right) / len(right), 4)
    return scores


def write(model: ChatGLM, folder: Path, config: dict[str, object]) -> None:
    """The checkpoint's config and fp16 weights."""
    weights = {name: t.detach().half().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # The library makes a file that only its owner can read.
    (folder / WEIGHTS_FILE).chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
