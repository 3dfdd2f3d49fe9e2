"""Leaves out the steps that nothing reads, and joins those that one instruction can take."""

from collections import Counter

from fastelbo.sampling.network import Const, Conv, Join, Network, Point, Value, View


def _operands(step):
    if isinstance(step, Conv):
        return [step.x, step.cond, step.residual]
    return list(step.operands if isinstance(step, Point) else step.parts)


def _prune(network):
    needed, kept = {network.logits.value}, []
    for step in reversed(network.steps):
        if step.out in needed:
            kept.append(step)
            needed.update(operand.value for operand in _operands(step) if isinstance(operand, View))
    network.steps = kept[::-1]


def fuse(network: Network) -> None:
    """Changes the steps of a finished network, not what they compute."""
    _prune(network)
    uses = Counter(id(o.value) for step in network.steps for o in _operands(step) if isinstance(o, View))
    uses[id(network.logits.value)] += 1
    made: dict[Value, Conv | Point | Join] = {}
    for position, step in enumerate(network.steps):
        if isinstance(step, Point):
            joined = _gate(step, made, uses) or step
            joined = _into_conv(joined, made, uses) or joined
            network.steps[position] = joined
        made[step.out] = network.steps[position]
    _prune(network)


def _made_for(view, made, uses, count=1):
    """The step that computes all channels of a view, for its reader alone."""
    step = made.get(view.value) if isinstance(view, View) and not view.down and not view.right else None
    return step if step is not None and uses[id(view.value)] == count else None


def _whole(view):
    return view.channels == tuple(range(len(view.value.colours)))


def _gate(step, made, uses):
    """tanh(a) sigmoid(b), or a sigmoid(b), as one function."""
    if step.function != "mul":
        return None
    for a, b in (step.operands, step.operands[::-1]):
        right = _made_for(b, made, uses)
        if not isinstance(right, Point) or right.function != "sigmoid" or not _whole(b) or not isinstance(a, View):
            continue
        left = _made_for(a, made, uses)
        if isinstance(left, Point) and left.function == "tanh" and _whole(a):
            return Point("tanh_sigmoid", (left.operands[0], right.operands[0]), (), step.out)
        return Point("glu", (a, right.operands[0]), (), step.out)
    return None


def _into_conv(step, made, uses):
    """An activation, a gate or a sum as the end of the convolution that it takes."""
    first = step.operands[0]
    if step.function in ("relu", "elu") and step.parameters in ((), (1.0,)):
        conv = _made_for(first, made, uses)
        if _is_plain(conv) and _whole(first) and _alike(conv, step):
            return _ending(conv, step, activation=step.function)
    if step.function in ("tanh_sigmoid", "glu"):
        a, b = step.operands
        if isinstance(a, View) and isinstance(b, View) and a.value is b.value:
            conv, half = _made_for(a, made, uses, 2), len(a.value.colours) // 2
            halves = tuple(range(half)), tuple(range(half, 2 * half))
            together = (a.channels, b.channels) == halves and not b.down and not b.right
            if _is_plain(conv) and together and conv.out.phase == step.out.phase:
                return _ending(conv, step, activation=step.function)
    if step.function == "add":
        for own, other in (step.operands, step.operands[::-1]):
            conv = _made_for(own, made, uses)
            if not isinstance(conv, Conv) or not _whole(own) or not _alike(conv, step):
                continue
            if _is_plain(conv) and conv.cond is None:
                return _ending(conv, step, cond=other)
            if conv.residual is None and (not isinstance(other, Const) or other.channels == len(own.channels)):
                return _ending(conv, step, residual=other)
    return None


def _is_plain(conv):
    return isinstance(conv, Conv) and conv.activation is None and conv.residual is None


def _alike(conv, step):
    """Whether both are known at the same time."""
    return conv.out.phase == step.out.phase and conv.out.colours == step.out.colours


def _ending(conv, step, **more):
    parts = {name: getattr(conv, name) for name in ("x", "weight", "live", "taps", "bias", "cond", "activation")}
    return Conv(**{**parts, "residual": conv.residual, "out": step.out, **more})
