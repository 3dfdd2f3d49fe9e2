"""Runs Gluon kernels as the Python that they are, without a GPU: a model of the copy engine, of barriers and of
products from shared memory, which is as late and as early as the hardware may be.

A copy's destination is poisoned when the copy starts and filled when its barrier has been waited for; a product reads
its operands only when it has been waited for, and so does a copy back to global memory. Warps that are specialised are
threads. A buffer that is refilled too soon, read too soon, or a barrier that is never reached thus shows as NaN, as a
wrong sum or as an error. Shared memory is as in the NVMMA layout, 128 bytes wide, but for the swizzle.
"""

import contextlib
import threading
from types import SimpleNamespace

import torch

SECONDS = 20  # after which a wait is a deadlock


class Buffer:
    """A shape in shared memory, from an offset on; columns beyond 64 lie behind all rows of the first 64."""

    def __init__(self, memory, offset, shape, order=None):
        self.memory, self.offset, self.shape = memory, offset, list(shape)
        self.order = order or list(range(len(shape)))
        self.dtype = memory.dtype

    def _places(self):
        *rows, columns = self.shape
        count = 1
        for size in rows:
            count *= size
        row = torch.arange(count)[:, None]
        column = torch.arange(columns)[None, :]
        place = self.offset + column // 64 * (count * min(columns, 64)) + row * min(columns, 64) + column % 64
        return place.reshape(self.shape).permute(self.order)

    def read(self):
        return self.memory[self._places()]

    def write(self, values):
        self.memory[self._places()] = values.to(self.memory.dtype)

    def index(self, i):
        size = 1
        for n in self.shape[1:]:
            size *= n
        return Buffer(self.memory, self.offset + int(i) * size, self.shape[1:])

    def reshape(self, shape):
        assert self.order == sorted(self.order) and shape[-1] == self.shape[-1], "rows of another width"
        return Buffer(self.memory, self.offset, shape)

    def permute(self, order):
        assert self.order == sorted(self.order)
        return Buffer(self.memory, self.offset, self.shape, list(order))

    def reinterpret(self, dtype, shape, layout):
        return Stack(self.memory, self.offset, shape) if len(shape) == 3 else Buffer(self.memory, self.offset, shape)

    _reinterpret = reinterpret

    def store(self, values):
        self.write(values)

    def load(self, layout):
        return self.read()


class Stack(Buffer):
    """Several buffers of two dimensions: only ever indexed."""


class Barrier:
    def __init__(self):
        self.condition = threading.Condition()
        self.count = self.arrived = self.bytes = self.phase = 0
        self.landing = []

    def _advance(self):
        if self.arrived == self.count and self.bytes == 0:
            self.phase += 1
            self.arrived = 0
            self.condition.notify_all()

    def arrive(self, expected=0):
        with self.condition:
            self.arrived += 1
            assert self.arrived <= self.count, "more arrivals than the barrier counts"
            self.bytes += expected
            self._advance()

    def land(self, buffer, values, size):
        with self.condition:
            buffer.write(torch.full_like(values, float("nan")))
            self.landing.append((buffer, values))
            self.bytes -= size
            self._advance()

    def wait(self, parity):
        with self.condition:
            # the phase with this parity has completed when the current one has the other
            done = self.condition.wait_for(lambda: self.phase % 2 != parity, 0 if Program.threads == 1 else SECONDS)
            assert done, "deadlock"
            for buffer, values in self.landing:
                buffer.write(values)
            self.landing.clear()


class Barriers:
    def __init__(self, shape):
        self.barriers = [Barrier() for _ in range(shape[0])]

    def index(self, i):
        return self.barriers[int(i)]


class Pointer:
    def __init__(self, tensor, place=0):
        self.tensor, self.place = tensor, place

    def __add__(self, other):
        return Pointer(self.tensor, self.place + other)


class Descriptor:
    def __init__(self, descriptor):
        base = descriptor.base.detach()  # threads record gradients
        self.base, self.layout = base.as_strided(descriptor.shape, descriptor.strides), descriptor.layout
        self.dtype = self.base.dtype
        shape = list(descriptor.block_shape)
        size = 2
        for n in shape:
            size *= n
        assert all(n & (n - 1) == 0 and n <= 256 for n in shape), "a box of the copy engine"
        self.block_type = SimpleNamespace(shape=shape, nbytes=size)

    def _inside(self, at):
        """Where box and tensor meet: slices of each."""
        pairs = [
            (max(0, -int(a)), max(0, min(int(n), int(size) - int(a))))
            for a, n, size in zip(at, self.block_type.shape, self.base.shape, strict=True)
        ]
        box = tuple(slice(low, max(low, high)) for low, high in pairs)
        image = tuple(slice(int(a) + s.start, int(a) + s.stop) for a, s in zip(at, box, strict=True))
        return box, image

    def get(self, at):
        box, image = self._inside(at)
        found = torch.zeros(self.block_type.shape, dtype=self.dtype)
        found[box] = self.base[image]
        return found

    def put(self, at, values):
        box, image = self._inside(at)
        self.base[image] = values.to(self.dtype)[box]


class Accumulator:
    def __init__(self, value):
        self.value = value


class Program:
    """The program that runs, and the state of its threads."""

    id = count = 0
    threads = 1
    local = threading.local()

    @classmethod
    def queue(cls, name):
        if not hasattr(cls.local, name):
            setattr(cls.local, name, [])
        return getattr(cls.local, name)


def _product(a, b, total, is_async=False):
    assert is_async
    found = total if isinstance(total, Accumulator) else Accumulator(total)
    Program.queue("products").append((found, a, b))
    return found


def _wait_products(num_outstanding=0, deps=()):
    queue = Program.queue("products")
    while len(queue) > num_outstanding:
        total, a, b = queue.pop(0)
        total.value = total.value + a.read().to(total.value.dtype) @ b.read().to(total.value.dtype)
    found = [dep if queue or not isinstance(dep, Accumulator) else dep.value for dep in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _copy_in(descriptor, at, barrier, buffer, pred=True):
    if pred:
        barrier.land(buffer, descriptor.get(at), descriptor.block_type.nbytes)


def _copy_out(descriptor, at, buffer):
    Program.queue("stores").append((descriptor, list(at), buffer))


def _wait_stores(pendings):
    assert pendings == 0
    queue = Program.queue("stores")
    while queue:
        descriptor, at, buffer = queue.pop(0)
        descriptor.put(at, buffer.read())


def _specialize(functions, warps, registers):
    assert len(functions) == len(warps) + 1 == len(registers) + 1
    failures = []

    def run(function, arguments):
        try:
            function(*arguments)
            assert not Program.queue("products") and not Program.queue("stores"), "left running"
        except BaseException as error:
            failures.append(error)

    Program.threads = len(functions)
    threads = [threading.Thread(target=run, args=pair) for pair in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Program.threads = 1
    if failures:
        raise failures[0]


def _load(pointer, mask, other):
    place, mask = torch.broadcast_tensors(torch.as_tensor(pointer.place), mask)
    values = pointer.tensor.reshape(-1)[torch.where(mask, place, 0)]
    return torch.where(mask, values, other)


def _store(pointer, values, mask):
    place, mask, values = torch.broadcast_tensors(torch.as_tensor(pointer.place), mask, values)
    pointer.tensor.view(-1)[place[mask]] = values[mask].to(pointer.tensor.dtype)


def _as_tensors(function):
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype))


def _allocate(dtype, shape, layout):
    if dtype == "barrier":
        return Barriers(shape) if len(shape) == 2 else Barrier()
    size = 1
    for n in shape:
        size *= n
    size += 64 * 512  # so that a view beyond the end is seen as NaN
    return Buffer(torch.full((size,), float("nan"), dtype=dtype), 0, shape)


def _init(barrier, count):
    barrier.count = count


def _expect(barrier, size, pred=True):
    if pred:
        barrier.arrive(size)


def _arrive(barrier, pred=True):
    if pred:
        barrier.arrive()


class Language:
    """gluon.language, with numbers of the type `real`."""

    def __init__(self, real_language, real):
        self._real_language = real_language
        self.float32, self.int64 = real, "barrier"
        self.program_id = lambda axis: Program.id
        self.num_programs = lambda axis: Program.count
        self.static_range = range
        self.zeros = lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype)
        self.arange = lambda low, high, layout: torch.arange(low, high)
        self.cast = lambda value, dtype: value
        self.where = torch.where
        self.exp, self.abs = torch.exp, torch.abs
        self.maximum, self.minimum = _as_tensors(torch.maximum), _as_tensors(torch.minimum)
        self.load, self.store = _load, _store
        self.allocate_shared_memory = _allocate
        self.warp_specialize = _specialize

    def __getattr__(self, name):  # layouts
        return getattr(self._real_language, name)


@contextlib.contextmanager
def standing_in(module, monkeypatch, real=torch.float64):
    """A function run(kernel, grid, arguments) for the kernels of a module of launches."""
    from triton.experimental.gluon import language
    from triton.runtime.jit import JITFunction

    names = {
        "gl": Language(language, real),
        "mbarrier": SimpleNamespace(
            init=_init, expect=_expect, arrive=_arrive, wait=lambda b, p: b.wait(p), MBarrierLayout=lambda: None
        ),
        "tma": SimpleNamespace(store_wait=_wait_stores),
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": _wait_products,
        "fence_async_shared": lambda: None,
        "_barrier": lambda: None,
        "_descriptor": lambda tensor, box: SimpleNamespace(
            base=tensor, shape=tensor.shape, strides=tensor.stride(), block_shape=box, layout=None
        ),
        "_copy_in": _copy_in,
        "_copy_out": _copy_out,
    }
    for name, value in vars(module.kernels).items():
        if isinstance(value, JITFunction):
            names.setdefault(name, value.fn)

    def run(kernel, grid, arguments):
        given = {}
        for name, value in arguments.items():
            if hasattr(value, "block_shape"):
                value = Descriptor(value)
            elif isinstance(value, torch.Tensor):
                value = Pointer(value.detach())
            given[name] = value
        Program.count = grid[0]
        for Program.id in range(grid[0]):
            kernel(**given)
            assert not Program.queue("products") and not Program.queue("stores"), "left running"

    with monkeypatch.context() as patch:
        for name, value in names.items():
            patch.setattr(module if name == "_descriptor" else module.kernels, name, value)
        yield run
