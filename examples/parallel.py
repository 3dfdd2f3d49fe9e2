"""Training on the ranks of torchrun: who computes which rows, replicas or shards of the model, and their checkpoint."""

import contextlib
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Method(nn.Module):
    """A method of a model as the forward of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args, **keywords):
        """The method."""
        return getattr(self.model, self.name)(*args, **keywords)


def check_history(history: object) -> None:
    """A history is a list of pairs of numbers."""
    if not isinstance(history, list):
        raise ValueError(f"its history must be a list; got {type(history).__name__}")
    for figures in history:
        if not (
            isinstance(figures, (tuple, list))
            and len(figures) == 2
            and all(isinstance(figure, (int, float)) for figure in figures)
        ):
            raise ValueError(f"its history must be of pairs of numbers; got {figures!r}")


class Ranks:
    """This process among those of torchrun; one alone, which nothing here changes, where there is no torchrun.

    All ranks shuffle, dequantise and draw as one process would for the whole batch, and each computes its own rows.

    Args:
        kind: "ddp", a replica of the model on every rank, or "fsdp", sharded weights, gradients and optimiser.
        accumulate: parts in which each rank takes its rows of a batch, one after the other.
        torchrun: whether torchrun has started this process.
    """

    def __init__(self, kind: str = "ddp", accumulate: int = 1, torchrun: bool = False) -> None:
        self.kind, self.accumulate, self.torchrun = kind, accumulate, torchrun
        self.rank, self.count, self.local = 0, 1, 0
        if torchrun:
            self.rank, self.count, self.local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.first = self.rank == 0
        self._whole = self._wrapped = None

    def device(self, name: str) -> str:
        """The device of this rank: of several GPUs the one of its number."""
        return f"cuda:{self.local}" if self.torchrun and name == "cuda" else name

    def start(self, device: torch.device) -> None:
        """Joins the process group. From then on the first rank alone prints."""
        if not self.torchrun:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if not self.first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def stop(self) -> None:
        """Leaves the process group."""
        if self.torchrun:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module, method: str = "forward") -> None:
        """Makes a method of the model the one that trains: before the optimiser is made, which takes the shards."""
        if not self.torchrun:
            return
        if self.kind == "ddp":
            self._wrapped = nn.parallel.DistributedDataParallel(_Method(model, method))
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self._whole = copy.deepcopy(model).to("meta")
        for block in model.children():
            fully_shard(list(block) if isinstance(block, nn.ModuleList) else block)
        fully_shard(model)
        register_fsdp_forward_method(model, method)

    def call(self, model: nn.Module, method: str, *args, **keywords):
        """Calls the method that trains."""
        return (getattr(model, method) if self._wrapped is None else self._wrapped)(*args, **keywords)

    def parts(self, rows: int) -> Iterator[tuple[slice, bool]]:
        """This rank's rows of a batch, part after part, and whether a part is the last."""
        size = rows // (self.count * self.accumulate)
        if size * self.count * self.accumulate != rows:
            raise ValueError(f"rows must be a multiple of {self.count} ranks times {self.accumulate}; got {rows}")
        for part in range(self.accumulate):
            start = (self.rank * self.accumulate + part) * size
            yield slice(start, start + size), part == self.accumulate - 1

    @contextlib.contextmanager
    def synchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are averaged over the ranks in the backward of the last part alone."""
        if self._wrapped is not None and not last:
            with self._wrapped.no_sync():
                yield
            return
        if self._whole is not None:
            model.set_requires_gradient_sync(last)
        yield

    def share(self, rows: int) -> slice:
        """This rank's rows of a test set, of nearly equal size on all ranks."""
        start, stop = (rows * index // self.count for index in (self.rank, self.rank + 1))
        return slice(start, stop)

    def sum(self, *values: Tensor) -> list[float]:
        """The sums of numbers over the ranks."""
        total = torch.stack([value.double() for value in values])
        if self.torchrun:
            dist.all_reduce(total)
        return total.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The means of numbers over the ranks."""
        if self.torchrun:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def whole(self, model: nn.Module) -> nn.Module:
        """The model with whole weights, on every rank, to look at when training is over."""
        if self._whole is None:
            return model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
        device = next(model.parameters()).device
        self._whole.to_empty(device=device).load_state_dict({key: value.to(device) for key, value in state.items()})
        return self._whole

    # Checkpoints: a directory per epoch, of which each rank writes its part. Complete is one that has .metadata, which
    # torch writes last; older ones go when a newer one is complete.

    def _state(self, training) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(training.model, training.optimizer)
        random = {"order": training.order.get_state(), "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda_rng"] = torch.cuda.get_rng_state()
        return {"model": model, "optimizer": optimizer, **random}

    def save(self, path: Path, training) -> None:
        """Writes the checkpoint of the epochs done."""
        import torch.distributed.checkpoint as dcp

        directory = path.with_suffix("")
        target = directory / str(len(training.history))
        if self.first:
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        notes = json.dumps([training.settings, training.history])  # torch would take a dict or a list apart
        try:
            dcp.save({**self._state(training), "notes": notes}, checkpoint_id=target)
        except dcp.CheckpointException as error:  # of no kind of Exception
            raise OSError(f"{target}: {next(iter(error.failures.values()))[0]}") from None
        if self.first:
            for other in directory.iterdir():
                if other != target:
                    shutil.rmtree(other)
        dist.barrier()

    def load(self, path: Path, training) -> dict:
        """Restores the last complete checkpoint, of any number of ranks, if its settings are those of the training;
        returns its settings."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        directory = path.with_suffix("")
        complete = [int(path.parent.name) for path in directory.glob("*/.metadata")]
        if not complete:
            raise FileNotFoundError(directory)
        source = directory / str(max(complete))
        notes = {"notes": ""}
        try:
            dcp.load(notes, checkpoint_id=source)
            settings, history = json.loads(notes["notes"])
            if settings != training.settings:
                return settings
            check_history(history)
            state = self._state(training)
            dcp.load(state, checkpoint_id=source)
        except dcp.CheckpointException as error:  # of no kind of Exception
            raise ValueError(next(iter(error.failures.values()))[0]) from None
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(training.model, training.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        training.history = [tuple(figures) for figures in history]
        training.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return settings
