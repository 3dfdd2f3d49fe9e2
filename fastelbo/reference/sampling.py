"""The instructions of a sampler's program (fastelbo/sampling/program.py) in plain torch, and the draw of a level."""

import torch
import torch.nn.functional as F  # noqa: N812

PANEL = 16  # channels that are packed, computed and kept together


def draw(logits, uniforms, temperature):
    r"""The levels whose cumulative probability first exceeds a uniform number.

    .. math:: \min\left\{k : \sum_{j \le k} p_j > u\right\}, \qquad p \propto \exp(\text{logits} / T)

    Args:
        logits: [N, levels, ...].
        uniforms: [N, ...].
        temperature: T; 0 for the likeliest level.

    Returns:
        int64 [N, ...]; -1 where the logits make no distribution.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.where(logits.isnan().any(1), -1, logits.argmax(1))
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    sums = weights.cumsum(1)
    total = sums[:, -1:]
    last = (sums < total).sum(1)  # where u is 1
    found = (sums <= uniforms[:, None] * total).sum(1)
    return torch.where(total[:, 0].isnan(), -1, torch.minimum(found, last))


#: The pointwise functions of one operand or two, and parameters. Their order is that of Function in
#: csrc/common/sampling.h; gates are the last.
FUNCTIONS = {
    "none": lambda a, _: a,
    "relu": lambda a, _: torch.relu(a),
    "elu": lambda a, _, alpha: F.elu(a, alpha),
    "leaky_relu": lambda a, _, slope: F.leaky_relu(a, slope),
    "sigmoid": lambda a, _: torch.sigmoid(a),
    "tanh": lambda a, _: torch.tanh(a),
    "silu": lambda a, _: F.silu(a),
    "gelu": lambda a, _: F.gelu(a),
    "gelu_tanh": lambda a, _: F.gelu(a, approximate="tanh"),
    "softplus": lambda a, _, beta, threshold: F.softplus(a, beta, threshold),
    "exp": lambda a, _: torch.exp(a),
    "abs": lambda a, _: torch.abs(a),
    "clamp": lambda a, _, low, high: torch.clamp(a, low, high),
    "affine": lambda a, _, scale, shift: a * scale + shift,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "prelu": lambda a, slope: torch.where(a > 0, a, slope * a),
    "tanh_sigmoid": lambda a, b: torch.tanh(a) * torch.sigmoid(b),
    "glu": lambda a, b: a * torch.sigmoid(b),
}


class Line:
    """Pixels of a row, of all images: numbers of a feature are a view [N, pixels, width]."""

    def __init__(self, workspace, row, column, count):
        self.workspace, self.row, self.column, self.count = workspace, row, column, count

    def view(self, ref, width, up=0, offset=0):
        """The first numbers of a feature, `up` rows above."""
        slot = (self.row - ref.down - up) % ref.depth
        start = self.workspace.storage_offset() + ref.offset + offset
        start += slot * ref.row_stride + self.column * ref.column_stride
        n, size = self.workspace.shape
        return self.workspace.as_strided((n, self.count, width), (size, ref.column_stride, 1), start)

    read = view

    def write(self, ref, values, offset=0):
        """Stores [N, pixels, width]."""
        self.view(ref, values.shape[2], offset=offset).copy_(values)


class Scattered:
    """Pixels of any rows and columns, of all images."""

    def __init__(self, workspace, pixels):
        self.workspace = workspace
        self.rows, self.columns = torch.tensor(pixels, device=workspace.device).reshape(-1, 2).unbind(1)

    def _index(self, ref, width, up, offset):
        slots = (self.rows - ref.down - up) % ref.depth
        starts = ref.offset + slots * ref.row_stride + self.columns * ref.column_stride + offset
        return starts[:, None] + torch.arange(width, device=starts.device)

    def read(self, ref, width, up=0, offset=0):
        """The first numbers of a feature, `up` rows above: [N, pixels, width]."""
        return self.workspace[:, self._index(ref, width, up, offset)]

    def write(self, ref, values, offset=0):
        """Stores [N, pixels, width]."""
        self.workspace[:, self._index(ref, values.shape[2], 0, offset)] = values


class Section:
    """Instructions that run one after the other.

    Args:
        instructions: of a program.
        weights: of the program; they are laid out for torch once.
    """

    def __init__(self, instructions, weights):
        self.instructions = [(i, *self._matrices(i, weights)) for i in instructions]

    @staticmethod
    def _matrices(i, weights):
        if i.op != "conv":
            return None, None
        outputs = i.panels * i.halves * PANEL
        packed = weights[i.weight : i.weight + outputs * i.inputs]
        matrix = packed.reshape(outputs // PANEL, i.inputs, PANEL).transpose(1, 2).reshape(outputs, i.inputs)
        return matrix.contiguous(), weights[i.bias : i.bias + outputs]

    def run(self, pixels):
        """Computes the features of pixels."""
        for i, weight, bias in self.instructions:
            width = i.panels * PANEL
            if i.op == "copy":
                for run in i.runs:
                    pixels.write(i.out, pixels.read(i.a, run.length, offset=run.offset), run.to)
                continue
            if i.op == "point":
                b = pixels.read(i.b, width) if i.b.offset >= 0 else None
                pixels.write(i.out, FUNCTIONS[i.function](pixels.read(i.a, width), b, *i.parameters))
                continue
            inputs = [pixels.read(i.a, run.length, run.down, run.offset) for run in i.runs]
            if inputs:
                z = F.linear(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 2), weight, bias)
            else:
                z = bias.expand(pixels.read(i.out, width).shape[:2] + bias.shape)
            a, b = z[:, :, :width], z[:, :, width:]
            if i.b.offset >= 0:
                a = a + pixels.read(i.b, width)
            if i.c.offset >= 0:
                b = b + pixels.read(i.c, width)
            y = FUNCTIONS[i.function](a, b, *i.parameters)
            if i.d.offset >= 0:
                y = y + pixels.read(i.d, width)
            pixels.write(i.out, y)
