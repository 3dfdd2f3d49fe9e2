"""The ops on sharded tensors (torch.distributed.tensor): how these lie on the ranks. docs/distributed.md has the tour.

Each op computes on a rank's own shards and says how the results lie on the ranks; autograd and torch.compile see
nothing but to_local, the op, and from_local. torch's register_sharding would not do: a rule there chooses placements
but cannot change an argument, and each shard needs a noise_offset of its own.
"""

import math

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def sharded(*tensors) -> bool:
    """Whether a tensor is a DTensor; asked of each call, so torch.distributed.tensor is not imported for it."""
    for tensor in tensors:  # noqa: SIM110 (a generator takes four times as long)
        if type(tensor) not in _PLAIN and hasattr(tensor, "placements"):
            return True
    return False


def placed_as(other, tensor):
    """A tensor that all ranks have whole, cut as a DTensor is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


class _Layout:
    """How an op's tensors lie on the ranks of their device mesh.

    Args:
        tensors: by the names in which errors should speak of them.
    """

    def __init__(self, tensors):
        self.anchor = next((name for name, tensor in tensors.items() if sharded(tensor)), None)
        if self.anchor is None:
            raise ValueError("noise must be a plain tensor as the others are; got a DTensor")
        self.mesh = tensors[self.anchor].device_mesh
        for name, tensor in tensors.items():
            self.check(name, tensor)
        self.coordinate = self.mesh.get_coordinate()
        if self.coordinate is None:
            raise ValueError(f"{self.anchor} must be on a mesh that this rank is part of; got {self.mesh}")

    def check(self, name, tensor):
        """A tensor must be a DTensor on the mesh, with placements that can be moved."""
        if tensor is None or _is_number(tensor):
            return
        if not sharded(tensor):
            raise ValueError(
                f"{name} must be a DTensor as {self.anchor} is; got a torch.Tensor of shape {tuple(tensor.shape)}: "
                "torch.distributed.tensor.distribute_tensor makes one, also of a parameter that is replicated"
            )
        if tensor.device_mesh != self.mesh:
            raise ValueError(f"{name} must be on the mesh of {self.anchor}, {self.mesh}; got {tensor.device_mesh}")
        for placement in tensor.placements:
            if not _covered(placement):
                raise ValueError(f"{name} must be placed by Shard, Replicate or Partial; got {placement}")

    def shard(self, tensor, placements, split):
        """A rank's shard of a tensor, moved to the placements first.

        Args:
            split: for each dimension of the mesh, whether its ranks compute different things: the gradient of what
                they share is then the sum of theirs.
        """
        from torch.distributed.tensor import Partial

        if tensor is None or not sharded(tensor):
            return tensor
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        pairs = zip(placements, split, strict=True)
        grads = tuple(Partial() if apart and placement.is_replicate() else placement for placement, apart in pairs)
        return tensor.to_local(grad_placements=grads)

    def join(self, local, placements, shape):
        """A result of the given global shape, of which each rank has computed a shard."""
        from torch.distributed.tensor import DTensor

        if len(shape) == 0:  # torch takes no empty stride
            return DTensor.from_local(local, self.mesh, placements, run_check=False)
        strides = []  # in the memory order of the shard; a sort would not do for numbers that torch.compile traces
        for d in range(len(shape)):
            step = 1
            for e in range(len(shape)):
                if local.stride(e) < local.stride(d) or (local.stride(e) == local.stride(d) and e > d):
                    step *= max(shape[e], 1)
            strides.append(step)
        size = torch.Size(shape)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=size, stride=tuple(strides))


def _is_number(tensor):
    """Whether a plain tensor can stand beside DTensors: one number, the same on all ranks, that takes no gradient."""
    return not sharded(tensor) and tensor.numel() == 1 and not tensor.requires_grad


def _covered(placement):
    strided = hasattr(placement, "split_factor")  # some versions call it a shard too
    return placement.is_replicate() or placement.is_partial() or (placement.is_shard() and not strided)


class Gaussian(_Layout):
    """The layout of a Gaussian op, over the shape to which its tensors broadcast.

    Every dimension may be cut. The first tensor that is sharded over a dimension of the mesh decides, and the others
    follow; pending sums (Partial) are added up before.

    Args:
        shape: the broadcast shape.
        tensors: those that broadcast to it, by name.
    """

    def __init__(self, shape, **tensors):
        super().__init__(tensors)
        self.shape, self.tensors = shape, tensors
        self.cuts = tuple(self._cut(position) for position in range(self.mesh.ndim))
        self.starts, self.sizes = self._block()

    def _cut(self, position):
        """The dimension of the shape that a dimension of the mesh cuts, or None."""
        for tensor in self.tensors.values():
            dim = _cut_at(tensor, position)
            if dim is not None and tensor.shape[dim] != 1:
                return dim + len(self.shape) - tensor.dim()
        return None

    def _block(self):
        """Start and size of this rank's part along each dimension: chunks as those of torch.chunk."""
        starts, sizes = [0] * len(self.shape), list(self.shape)
        for position, d in enumerate(self.cuts):
            if d is not None:
                chunk = -(-sizes[d] // self.mesh.size(position))
                start = min(self.coordinate[position] * chunk, sizes[d])
                starts[d] += start
                sizes[d] = min(chunk, sizes[d] - start)
        return starts, sizes

    def shards(self, *tensors):
        """This rank's shards of tensors; of all that the layout was made with, where none is named."""
        return tuple(self._shard(tensor) for tensor in tensors or self.tensors.values())

    def _shard(self, tensor):
        from torch.distributed.tensor import Replicate, Shard

        if tensor is None:
            return None
        placements = []
        for d in self.cuts:
            dim = -1 if d is None else d - len(self.shape) + tensor.dim()
            placements.append(Shard(dim) if dim >= 0 and tensor.shape[dim] != 1 else Replicate())
        return self.shard(tensor, tuple(placements), [d is not None for d in self.cuts])

    def draw(self, seed, noise, noise_offset, normals):
        """Seed, noise and noise_offset with which this rank draws its part of the whole draw.

        A part that is contiguous in row-major order needs an offset alone. Of any other the rank draws the rows that it
        lies in, as a tensor, and cuts its part out.

        Args:
            seed, noise, noise_offset: of the whole.
            normals: draws those of a shape, from seed and noise_offset.
        """
        if noise is not None:
            self.check("noise", noise)
            return None, self._shard(noise), 0
        seed = self._common(seed)
        rank = len(self.shape)
        outer = next((d for d, size in enumerate(self.sizes) if size != 1), rank)
        for d in range(min(outer + 1, rank)):
            noise_offset = noise_offset + self.starts[d] * math.prod(self.shape[d + 1 :])
        inner = range(outer + 1, rank)
        if all(self.sizes[d] == self.shape[d] for d in inner):
            return seed, None, noise_offset
        noise = normals((*self.sizes[: outer + 1], *self.shape[outer + 1 :]), seed, noise_offset)
        for d in inner:
            noise = noise.narrow(d - rank, self.starts[d], self.sizes[d])
        return None, noise.clone(), 0

    def _common(self, seed):
        """The seed of the mesh's first rank: one sum over all, of which the others' terms are 0."""
        from torch.distributed.tensor import DTensor, Partial

        if sharded(seed):
            return seed.full_tensor()
        term = seed if all(index == 0 for index in self.coordinate) else torch.zeros_like(seed)
        return DTensor.from_local(term, self.mesh, [Partial()] * self.mesh.ndim, run_check=False).full_tensor()

    def sample(self, z, num_samples):
        """The sample, of this rank's."""
        from torch.distributed.tensor import Replicate, Shard

        leading = () if num_samples is None else (num_samples,)
        placements = [Replicate() if d is None else Shard(d + len(leading)) for d in self.cuts]
        return self.join(z, placements, (*leading, *self.shape))

    def terms(self, terms, event_ndim):
        """What is summed over events, of this rank's: a partial sum where an event is cut."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        kept = len(self.shape) - event_ndim
        placements = [Replicate() if d is None else Shard(d) if d < kept else Partial() for d in self.cuts]
        return self.join(terms, placements, self.shape[:kept])


# How a convolution is split: the dimension of input, weight, bias, cond, residual and output; None where all ranks have
# it whole.
_SPLIT = {"images": (0, None, None, 0, 0, 0), "channels": (None, 0, 0, 1, 1, 1), None: (None,) * 6}


class Convolution(_Layout):
    """The layout of a masked convolution: over each dimension of the mesh the images are split, or the output channels.

    Args:
        tensors: input, weight, bias, cond and residual, as the ops of masked_conv2d take them.
        groups: channel groups at the last tap; 1 where there are none.
        order: of the groups.
        gate: the activation, where that is a gate, or None.
    """

    def __init__(self, tensors, groups, order, gate):
        self.tensors = tensors
        super().__init__(dict(zip(("input", "weight", "bias", "cond", "residual"), tensors, strict=True)))
        self.modes = tuple(self._mode(position) for position in range(self.mesh.ndim))
        if "channels" in self.modes:
            parts = 1
            for position, mode in enumerate(self.modes):
                parts *= self.mesh.size(position) if mode == "channels" else 1
            self._check_channels(parts, groups, order, gate)

    def _mode(self, position):
        input, weight = (_cut_at(tensor, position) for tensor in self.tensors[:2])
        for mode, (of_input, of_weight, *_) in _SPLIT.items():
            if (input, weight) == (of_input, of_weight):
                return mode
        names = ["replicated" if dim is None else f"Shard({dim})" for dim in (input, weight)]
        raise ValueError(
            "input and weight must be Shard(0) and replicated (images), replicated and Shard(0) (output channels), or "
            f"both replicated, over each dimension of the mesh; got {names[0]} and {names[1]}"
        )

    def _check_channels(self, parts, groups, order, gate):
        channels = self.tensors[1].shape[0]
        if gate is not None:
            raise ValueError(
                f"weight must be replicated under a gate, which joins channels of both halves; got Shard(0) for {gate}"
            )
        if groups > 1 and (order == "contiguous" or channels % (groups * parts)):
            raise ValueError(
                "weight must be replicated for channel groups, or be Shard(0) with interleaved groups whose number "
                f"divides the output channels of each rank; got {groups} {order} groups of {channels} channels on "
                f"{parts} ranks"
            )
        if channels % parts:
            raise ValueError(f"weight must have output channels that its {parts} ranks divide; got {channels}")

    def _placements(self, position):
        from torch.distributed.tensor import Replicate, Shard

        dims = (_SPLIT[mode][position] for mode in self.modes)
        return tuple(Replicate() if dim is None else Shard(dim) for dim in dims)

    def shards(self):
        """This rank's shards of all tensors."""
        split = [mode is not None for mode in self.modes]
        return tuple(self.shard(tensor, self._placements(at), split) for at, tensor in enumerate(self.tensors))

    def image(self, y, shape):
        """The output, of this rank's."""
        return self.join(y, self._placements(5), shape)


def _cut_at(tensor, position):
    """The dimension of a tensor that a dimension of the mesh cuts, or None."""
    if not sharded(tensor):
        return None
    # not placement.dim, which torch.compile may take for a dynamic number
    return next((dim for dim in range(tensor.dim()) if tensor.placements[position].is_shard(dim)), None)
