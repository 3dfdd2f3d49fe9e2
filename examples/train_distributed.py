"""Trains the VAE of train_vae.py in one process or on the ranks of torchrun, and keeps checkpoints.

All ranks shuffle and draw as one process would for the whole batch, and each computes its own rows: the op is given the
batch's seed and the offset of the rows. So the curve is that of one process, to rounding, on any number of ranks, with
whole replicas (DDP) or sharded weights, gradients and optimiser (FSDP2), in however many parts a rank takes its rows.

Of each epoch there is a checkpoint, a directory of torch.distributed.checkpoint, of which each rank writes its part.
--resume goes on from the last complete one: bit for bit, and on another number of ranks or with the other --parallel to
rounding. `python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE` makes one file of it.

    python examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --device cpu
    torchrun --nproc-per-node 8 examples/train_distributed.py --parallel fsdp --resume
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import sklearn.datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fastelbo

LEVELS, LATENTS, HIDDEN, CHECKSUMS = 17, 12, 512, "checksums.json"


class VAE(nn.Module):
    """A multilayer perceptron on either side of a Gaussian bottleneck, and one learned log-variance for all pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.Linear(n, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()] for n in (64, LATENTS)]
        self.encoder = nn.Sequential(*layers[0], nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(*layers[1], nn.Linear(HIDDEN, 64), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.full((1,), -3.0))  # not 0-d, which FSDP cannot shard

    def forward(self, x: Tensor, seed: Tensor, first: int) -> Tensor:
        """Minus the ELBO of each image, of which the first is the row of that number in the batch of all ranks."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        offset = fastelbo.distributed.noise_offset(mean, first)
        z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=seed, noise_offset=offset)
        return fastelbo.gaussian_nll(x, self.decoder(z), self.x_logvar) + kl


class Training:
    """A model, its optimiser, and all that is random: the same on all ranks, but for the shards of FSDP2."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.settings, self.history = {"batch_size": args.batch_size, "seed": args.seed}, []
        self.accumulate, self.device, self.rank, self.ranks = (
            args.accumulate,
            device,
            dist.get_rank(),
            dist.get_world_size(),
        )
        self.generator = torch.Generator().manual_seed(args.seed)
        images = torch.tensor(sklearn.datasets.load_digits().data, dtype=torch.float32)
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))]
        self.images, self.test_images = images[len(images) // 6 :], images[: len(images) // 6]
        torch.manual_seed(args.seed)
        self.model = self.forward = VAE().to(device)
        if args.parallel == "ddp":
            self.forward = DistributedDataParallel(self.model)
        else:
            for module in (self.model.encoder, self.model.decoder, self.model):
                fully_shard(module)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)

    def draw(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1) of a whole batch, each grey level spread evenly over its share, and a seed."""
        x = (images + torch.rand(images.shape, generator=generator)) / LEVELS
        return x.to(self.device), torch.randint(2**63 - 1, (1,), generator=generator).to(self.device)

    def train_epoch(self) -> Tensor:
        """One pass in a new order, a last, incomplete batch left out; returns the loss of each step."""
        losses, batch_size = [], self.settings["batch_size"]
        size = batch_size // (self.ranks * self.accumulate)
        order = torch.randperm(len(self.images), generator=self.generator)
        for batch in order[: len(order) - len(order) % batch_size].split(batch_size):
            x, seed = self.draw(self.images[batch], self.generator)
            losses.append(torch.zeros((), device=self.device))
            for part in range(self.accumulate):  # gradients are averaged over the ranks in the backward of the last
                last, first = part == self.accumulate - 1, (self.rank * self.accumulate + part) * size
                if self.forward is self.model:
                    self.model.set_requires_gradient_sync(last)
                alone = self.forward is not self.model and not last
                with self.forward.no_sync() if alone else contextlib.nullcontext():
                    loss = self.forward(x[first : first + size], seed, first).mean() / self.accumulate
                    loss.backward()
                losses[-1] += loss.detach()
            self.optimizer.step()
            self.optimizer.zero_grad()
        losses = torch.stack(losses)
        dist.all_reduce(losses)
        return losses / self.ranks

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss of the test images, always with the same noise; each rank has a share of nearly the same size."""
        x, seed = self.draw(self.test_images, torch.Generator().manual_seed(1))
        first, stop = (len(x) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        total = self.forward(x[first:stop], seed, first).double().sum()
        dist.all_reduce(total)
        return total.item() / len(x)

    def state(self) -> dict:
        """What a checkpoint keeps beside settings and history."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "generator": self.generator.get_state()}

    def save(self, directory: Path) -> None:
        """Writes the checkpoint, complete when it has the checksums of its files; then older ones go."""
        target = directory / str(len(self.history))
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        notes = json.dumps([self.settings, self.history])  # torch would take a dict or a list apart
        try:
            dcp.save({**self.state(), "notes": notes}, checkpoint_id=target)
        except dcp.CheckpointException as error:  # of no kind of Exception
            raise OSError(str(next(iter(error.failures.values()))[0])) from None
        if self.rank == 0:
            checksums = {path.name: zlib.crc32(path.read_bytes()) for path in target.iterdir()}
            (target / CHECKSUMS).write_text(json.dumps(checksums))
            for other in directory.iterdir():
                if other != target:
                    shutil.rmtree(other)
        dist.barrier()

    def load(self, directory: Path) -> None:
        """Restores the last complete checkpoint, of any number of ranks, if its settings are those of this run."""
        complete, notes = [int(path.parent.name) for path in directory.glob(f"*/{CHECKSUMS}")], {"notes": ""}
        if not complete:
            refuse(f"--resume: there is no checkpoint in {directory}")
        source = directory / str(max(complete))
        try:
            for name, checksum in json.loads((source / CHECKSUMS).read_text()).items():
                if zlib.crc32((source / name).read_bytes()) != checksum:
                    raise ValueError(f"{name} has another checksum")
            dcp.load(notes, checkpoint_id=source)
            settings, history = json.loads(notes["notes"])
            if settings != self.settings:
                refuse(f"--resume: {source} was made with {settings}; this run has {self.settings}")
            self.history, state = [(float(train), float(test)) for train, test in history], self.state()
            dcp.load(state, checkpoint_id=source)
            models = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.model, self.optimizer, **models)
            self.generator.set_state(state["generator"])
        except (Exception, dcp.CheckpointException) as error:  # a damaged file can make torch raise nearly anything
            causes = getattr(error, "failures", {0: (error,)})
            reason = str(next(iter(causes.values()))[0]).partition("\n")[0]
            refuse(f"--resume: {source} is damaged, or not of this script: {reason}")


def refuse(sentence: str) -> None:
    """Ends this rank with exit code 2, after a sentence by the first."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(2)


def run(args: argparse.Namespace, device: torch.device) -> list[tuple[float, float]]:
    """Trains up to the last epoch, with a checkpoint after each; returns the ELBOs in training and of test images."""
    training, directory = Training(args, device), args.output / "checkpoint"
    if args.resume:
        training.load(directory)
    if len(training.history) > args.epochs:
        refuse(f"--epochs: the checkpoint has {len(training.history)} already; got {args.epochs}")
    args.output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # now rather than after an epoch
    epochs, hidden = range(len(training.history), args.epochs), None if training.rank == 0 else True
    for _ in (bar := tqdm(epochs, unit="epoch", disable=hidden)):
        training.history.append((-training.train_epoch().mean().item(), -training.evaluate()))
        training.save(directory)
        bar.set_postfix_str("ELBO train {:.1f}, test {:.1f} nats".format(*training.history[-1]))
    if training.rank == 0:
        axes = Figure().subplots()
        axes.plot(range(1, args.epochs + 1), training.history, label=["train", "test"])
        axes.set(title="Evidence lower bound during training", xlabel="epoch", ylabel="nats per image")
        axes.legend()
        axes.figure.savefig(args.output / "training_curve.png", dpi=150)
        print(f"ELBO of test images: {training.history[-1][1]:.2f} nats per image. Picture, checkpoint: {args.output}")
    return training.history


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="replicas or shards (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="parts in which a rank takes its rows (default: %(default)s)")
    add("--epochs", type=int, default=80, help="passes over the training set in all (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images per step, of all ranks (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/distributed", help="folder, the same of all ranks (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    args = parser.parse_args(argv)
    if min(args.epochs, args.accumulate) < 1 or not 0 <= args.seed < 2**63:
        refuse("--epochs and --accumulate must be 1 or more, --seed from 0 to 2**63 - 1")
    parts = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.batch_size not in range(parts, 1499, parts):
        refuse(f"--batch-size must be a multiple of ranks times --accumulate, {parts}, to 1498; got {args.batch_size}")
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo", **alone)
    try:
        history = run(args, device)
        dist.destroy_process_group()  # where all ranks come to: one that is interrupted waits for no other
        return history
    except OSError as error:
        refuse(f"--output: cannot write to {args.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"\nInterrupted; --resume goes on from what is in {args.output / 'checkpoint'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
