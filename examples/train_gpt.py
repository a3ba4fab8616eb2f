"""A small GPT on real text, with checkpoints: stop it whenever you like, start it again, and it goes on bit for bit.

    python examples/train_gpt.py                            # checkpoints go to ./checkpoints
    python examples/train_gpt.py --url s3://bucket/run-42   # the same, on S3

Checkpointing is the seven lines marked with `# <-`.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import asyncckpt  # <-


class Loader:
    """Batches of text windows in a shuffled order. Its position is state: a resumed run reads on where it stopped."""

    def __init__(self, *, batch: int, window: int, seed: int, max_bytes: int = 2**20):
        files = sorted(Path(os.__file__).parent.glob("*.py"))  # the standard library's source: text on every machine
        text = b"".join(path.read_bytes() for path in files)[:max_bytes]
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.batch, self.window, self.seed = batch, window, seed
        self.epoch = self.position = 0
        self.order = self.shuffled()

    def shuffled(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm((len(self.text) - 1) // self.window, generator=generator)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.position + self.batch > len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self.shuffled()
        starts = self.order[self.position : self.position + self.batch].tolist()
        self.position += self.batch
        rows = torch.stack([self.text[i * self.window : (i + 1) * self.window + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self.order = self.shuffled()


class GPT(nn.Module):
    def __init__(self, *, width: int = 192, layers: int = 6, heads: int = 6, window: int = 128, dropout: float = 0.1):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(window, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.bytes.weight  # tied: stored once, and tied again by a restore
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        window = inputs.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(window, device=inputs.device)
        x = self.bytes(inputs) + self.places(torch.arange(window, device=inputs.device))
        return self.head(self.blocks(x, mask=causal, is_causal=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="./checkpoints", help="s3://bucket/prefix or a folder")
    parser.add_argument("--endpoint-url", help="of an S3-compatible store")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--log", default=os.devnull, help="append one JSON line a step and a save")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with the next line: the same bits in every run
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(0)
    loader = Loader(batch=8, window=128, seed=0)
    model = GPT().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)  # --steps may grow

    def on_event(event: asyncckpt.events.Event) -> None:  # optional: where the time of each save went
        if isinstance(event, asyncckpt.events.SaveCommitted):
            log.write(json.dumps({"saved": asdict(event.report)}) + "\n")

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    state["rng"] = asyncckpt.RNG()  # <- dropout's next bits
    store = asyncckpt.S3Options(endpoint_url=args.endpoint_url) if args.endpoint_url else None
    saver = asyncckpt.Saver(args.url, store=store, keep=[asyncckpt.KeepLast(3)], hooks=[on_event])  # <-
    with Path(args.log).open("a", buffering=1) as log, saver:  # <- leaving the block waits for the last save
        restored = saver.restore(state)  # <- the newest good checkpoint, in place; None: nothing there yet
        for step in range(restored.step if restored else 0, args.steps):
            inputs, targets = (rows.to(args.device) for rows in loader.next_batch())
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            log.write(json.dumps({"step": step + 1, "loss": loss.item(), "hex": loss.item().hex()}) + "\n")
            print(f"step {step + 1:4}  loss {loss.item():.4f}", flush=True)
            if (step + 1) % args.save_every == 0:
                saver.save(step + 1, state, metrics={"loss": loss.item()})  # <-
        saver.wait()  # <- every save so far is committed, or SaveFailedError says which is not, and why


if __name__ == "__main__":
    main()
