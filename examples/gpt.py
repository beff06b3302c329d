"""Train a small GPT-2 of Hugging Face's transformers on the codes of images, sample from it, and decode the samples.

  vqvae encode --checkpoint logs/vqvae-mnist --dataset mnist --output codes.npz
  python examples/gpt.py codes.npz --checkpoint logs/vqvae-mnist

An image becomes a sequence: a token for its class, then its codes, row after row. Needs `pip install transformers`.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from vqvae import load, tokens
from vqvae.plots import image_grid


def read_sequences(files: str) -> tuple[Tensor, int, tuple[int, ...]]:
    """The sequences `[N, 1 + h*w]` in a file of codes or its shards, the codebook size K, and the grid (h, w).

    Codes are 0 to K - 1. The first token is K + label, or K for images without a label.
    """
    content = tokens.load_codes(files)
    codes = content.codes.astype(np.int64)
    labels = np.zeros(len(codes), np.int64) if content.labels is None else content.labels.clip(0)
    sequences = np.concatenate([content.num_codes + labels[:, None], codes.reshape(len(codes), -1)], axis=1)
    return torch.from_numpy(sequences), content.num_codes, codes.shape[1:]


def train(sequences: Tensor, steps: int, device: str) -> GPT2LMHeadModel:
    """A GPT-2 that predicts each code from those before it. Prints its loss, also on a held-out twentieth."""
    sizes = {"vocab_size": int(sequences.max()) + 1, "n_positions": sequences.shape[1], "n_embd": 128}
    config = GPT2Config(**sizes, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).to(device)
    held_out, training = sequences.tensor_split([max(1, len(sequences) // 20)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = training[torch.randint(len(training), (64,))].to(device)
        loss = model(batch, labels=batch).loss  # nats per code
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0 or step == steps:
            with torch.no_grad():
                batch = held_out[:500].to(device)
                test = model.eval()(batch, labels=batch).loss
            model.train()
            print(f"step {step:,}: {loss / math.log(2):.3f} bits/code, held out {test / math.log(2):.3f}", flush=True)
    return model.eval()


def sample(model: GPT2LMHeadModel, num_codes: int, count: int) -> Tensor:
    """The codes `[count, h*w]` of new images, of the classes in turn."""
    classes = torch.arange(num_codes, model.config.vocab_size, device=model.device)
    start = classes[torch.arange(count) % len(classes)].unsqueeze(1)
    options = {"do_sample": True, "top_k": 0, "max_length": model.config.n_positions}
    return model.generate(start, suppress_tokens=classes.tolist(), **options)[:, 1:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="a file that vqvae encode wrote; codes.npz stands for its shards, too")
    parser.add_argument("--checkpoint", required=True, help="the model that encoded it, which decodes the samples")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=Path("gpt.png"), help="image of 100 samples (default: gpt.png)")
    options = parser.parse_args(argv)
    sequences, num_codes, grid = read_sequences(options.codes)
    if len(sequences) < 2:
        parser.error(f"{options.codes} has {len(sequences)} images; encode two or more")
    gpt = train(sequences, options.steps, device="cuda" if torch.cuda.is_available() else "cpu")
    images = load(options.checkpoint).decode(sample(gpt, num_codes, 100).view(-1, *grid))
    image_grid(images, options.output, title="samples of a GPT-2 over codes", columns=10)


if __name__ == "__main__":
    main()
