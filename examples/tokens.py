"""Tokens in place of pixels: digits become 2x2 codes of two numbers from 0 to 3, and a PixelCNN is the prior of codes.

The encoder's numbers are rounded (finite scalar quantisation, Mentzer et al. 2023), which gradients pass over. Of codes
there are 4^8 = 65,536, so that all is a sum: the mass of the prior, its entropy, what the sampler should draw, and the
evidence of an image, p(x) = sum_c p(c) p(x | c), of which its own code gives a bound.

    python examples/tokens.py --output demo/course/tokens
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.cluster
import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler

PLACES, CHANNELS, DRAWS, GROUPS = 4 ** torch.arange(7, -1, -1), 32, 20000, 100
CODES = (torch.arange(4**8)[:, None] // PLACES % 4).view(-1, 2, 2, 2)


class Tokens(nn.Module):
    """From digits to codes and back."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(1, CHANNELS, 2, stride=2), nn.Conv2d(CHANNELS, 64, 2, stride=2)
        self.encoder = nn.Sequential(first, nn.ELU(), second, nn.ELU(), nn.Conv2d(64, 2, 1))
        self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 128), nn.ELU(), nn.Linear(128, 64))
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def encode(self, x: Tensor) -> Tensor:
        """Codes [N, 2, 2, 2] of images [N, 1, 8, 8]: whole numbers, whose gradient is that of what was rounded."""
        between = 3 * self.encoder(x).sigmoid()
        return between + (between.round() - between).detach()

    def decode(self, codes: Tensor) -> Tensor:
        """The mean image of codes."""
        return self.decoder(codes / 1.5 - 1).view(-1, 1, 8, 8)

    def loss(self, x: Tensor) -> Tensor:
        """-ln p(x | code) of each image."""
        return fastelbo.gaussian_nll(x, self.decode(self.encode(x)), self.x_logvar, event_ndim=3)


class Prior(nn.Module):
    """A PixelCNN of codes, whose two numbers are its colours."""

    def __init__(self) -> None:
        super().__init__()
        first = MaskedConv2d(2, CHANNELS, 3, mask_type="A", channel_groups=2, activation="elu")
        second = MaskedConv2d(CHANNELS, CHANNELS, 3, mask_type="B", channel_groups=2, activation="elu")
        self.layers = nn.Sequential(first, second, MaskedConv2d(CHANNELS, 8, 1, mask_type="B", channel_groups=2))

    def forward(self, codes: Tensor) -> Tensor:
        """Logits [N, 8, 2, 2], the colours innermost."""
        return self.layers(codes / 1.5 - 1)

    def loss(self, codes: Tensor) -> Tensor:
        """-ln p of each code, its terms in double precision."""
        logits = self(codes.float()).unflatten(1, (4, 2)).double()
        return F.cross_entropy(logits, codes.long(), reduction="none").sum((1, 2, 3))


def train(model: nn.Module, x: Tensor, epochs: int, name: str) -> nn.Module:
    """Minimises the mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), name, unit="epoch", disable=None):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            model.loss(x[batch]).mean().backward()
            optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def p_value(log_p: Tensor, drawn: Tensor) -> float:
    """Of the chi-squared of draws, over groups of codes that are as likely as each other."""
    order = log_p.argsort()
    group = (log_p[order].exp().cumsum(0) * GROUPS).long().clamp(max=GROUPS - 1)[order.argsort()]
    expected = DRAWS * torch.zeros(GROUPS).double().index_add_(0, group, log_p.exp())
    seen = torch.bincount(group[drawn], minlength=GROUPS)
    chi_squared = ((seen - expected).square() / expected).sum()
    return torch.special.gammaincc(chi_squared.new_tensor((GROUPS - 1) / 2), chi_squared / 2).item()


def save_picture(path: Path, rows: dict[str, Tensor]) -> None:
    """Rows of images."""
    panels = Figure(figsize=(12, 3.6), layout="constrained").subplots(len(rows), 1)
    for axes, (title, images) in zip(panels, rows.items(), strict=True):
        strip = F.pad(images[:24, 0], (1, 1), value=0.5).permute(1, 0, 2).flatten(1)
        axes.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])
    panels[0].figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains both, counts, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x = torch.tensor(sklearn.datasets.load_digits().images).float()[torch.randperm(1797), None] / 16
    test, x = x.split([300, 1497])
    tokens = train(Tokens(), x, args.epochs, "tokens")
    prior = train(Prior(), codes := tokens.encode(x).round(), args.epochs, "prior")
    number, of_test = ((c.round().long().flatten(1) * PLACES).sum(1) for c in (codes, tokens.encode(test)))
    log_p = -torch.cat([prior.loss(part) for part in CODES.split(8192)])
    counts = torch.stack([(codes == level).sum(0) + 1 for level in range(4)]).flatten(1)
    log_alone = (counts / counts.sum(0)).double().log().gather(0, CODES.flatten(1)).sum(1)
    log_table = torch.bincount(number, minlength=4**8).add(1).div(len(x) + 4**8).log()
    bits = [-log_q[of_test].mean().item() / math.log(2) for log_q in (log_p, log_alone, log_table)]
    means = torch.cat([tokens.decode(part) for part in CODES.split(8192)])
    away = torch.cdist(test.flatten(1), means.flatten(1)).square().double()
    log_joint = log_p - (away * torch.exp(-tokens.x_logvar) + 64 * (tokens.x_logvar + math.log(2 * math.pi))) / 2
    bound, error = (of_all.gather(1, of_test[:, None]).mean().item() for of_all in (log_joint, away))
    clusters = sklearn.cluster.KMeans(16, n_init=1, random_state=args.seed % 2**32).fit(x.flatten(1).numpy())
    theirs = -clusters.score(test.flatten(1).numpy()) / len(test)
    drawn = IncrementalSampler(prior, (2, 2, 2), levels=4).sample(DRAWS, seed=args.seed)
    drawn, mixed = (drawn.flatten(1) * PLACES).sum(1), log_alone.exp().multinomial(2000, replacement=True)
    off = (log_p[drawn].mean() - log_p.exp() @ log_p).abs() / (log_p[drawn].std() / DRAWS**0.5)
    near = [torch.cdist(means[c[:2000]].flatten(1), x.flatten(1)).amin(1).mean().item() for c in (drawn, mixed)]
    rows = {"test images": test, "from their codes": means[of_test], "codes from the prior": means[drawn]}
    save_picture(args.output / "tokens.png", rows | {"independent codes": means[mixed]})
    print(f"The picture is {args.output / 'tokens.png'}")
    return [
        ("sum of the prior over all codes", log_p.exp().sum().item(), 1, 1e-6),
        ("bits of a test image's code by the prior; independent", bits[0], bits[1], "at most"),
        ("bits of it by the prior; by a table of all codes", bits[0], bits[2], "at most"),
        ("bits of the sampler's codes: standard errors from the entropy", off.item(), 4, "at most"),
        ("their frequencies: p-value of chi-squared", p_value(log_p, drawn), 0.001, "at least"),
        ("bound by a test image's own code; ln p(x) by all", bound, log_joint.logsumexp(1).mean().item(), "at most"),
        ("squared error of a test image; of 16 clusters' means", error, theirs, "at most"),
        ("from drawn images to digits; from those of independent codes", near[0], near[1], "at most"),
    ]


def report(claims: list[tuple[str, float, float, float | str]]) -> list[str]:
    """Prints what was found beside what is true, a claim a row; returns those that fail."""
    print("\n| what | found | exact or independent | within |\n|:--|--:|--:|--:|")
    failed, side = [], {"at least": 1, "at most": -1}
    for what, found, true, within in claims:
        print(f"| {what:<66} | {found:>12.7g} | {true:>12.7g} | {within:>8} |")
        good = side[within] * (found - true) >= 0 if within in side else abs(found - true) <= within
        failed += [] if good else [what]
    return failed


def main(argv: list[str] | None = None) -> list[tuple[str, float, float, float | str]]:
    """The command line."""
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add("--epochs", type=int, default=60, help="of each network (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/tokens", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs must be 1 or more, --seed from 0 to 2**63 - 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # now rather than after the work
        claims = run(args)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")
    if failed := report(claims):
        parser.exit(1, f"{parser.prog}: not as it must be: {'; '.join(failed)}\n")
    return claims


if __name__ == "__main__":
    main()
