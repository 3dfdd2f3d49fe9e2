"""The family tree of generative models, a leaf a row: what each knows of the same digits, in exact bits.

Explicit and tractable: independent pixels, a mixture of such by EM, a PixelCNN. Explicit by a bound: a VAE of two
latents, whose evidence is also a sum over a grid. Indirect, by a Markov chain: scikit-learn's restricted Boltzmann
machine, of few hidden units, with which Z = sum_h exp(b h) prod_i (1 + exp(a_i + (h W)_i)) is a sum; its Gibbs chain
must come to its own expectations. Implicit models have no bits at all. The digits are 8x8 and black or white.

    python examples/family_tree.py --output demo/course/family_tree
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import sklearn.neural_network
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from fastelbo.nn import MaskedConv2d

HIDDEN, CHAINS, SWEEPS = 10, 4000, 300


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """ln of the probability of pixels, summed over the last dimension."""
    return (x * logits - F.softplus(logits)).sum(-1)


def mixture_by_em(x: Tensor, components: int, steps: int) -> tuple[Tensor, Tensor]:
    """Log-weights and logits of a mixture of independent pixels; each has seen one image of either kind more."""
    r = torch.rand(len(x), components, dtype=x.dtype).softmax(1)
    for _ in range(steps):
        share = (r.T @ x + 0.5) / (r.sum(0)[:, None] + 1)
        log_weights, logits = r.mean(0).log(), share.logit()
        r = (log_weights + log_bernoulli(x[:, None], logits)).softmax(1)
    return log_weights, logits


def fit(model: nn.Module, loss, x: Tensor, epochs: int, name: str) -> nn.Module:
    """Minimises the mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=True)
    for _ in tqdm(range(epochs), name, unit="epoch", disable=None):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(model, x[batch]).mean().backward()
            optimizer.step()
    return model.requires_grad_(False)


def pixelcnn_loss(model: nn.Module, x: Tensor) -> Tensor:
    """-ln p of each image [64]."""
    return -log_bernoulli(x, model(x.view(-1, 1, 8, 8)).flatten(1))


def vae_loss(model: nn.ModuleDict, x: Tensor) -> Tensor:
    """-ELBO of each image, with a decoder of independent pixels."""
    z, kl = fastelbo.gaussian_rsample_kl(*model["encoder"](x).chunk(2, dim=1))
    return kl - log_bernoulli(x, model["decoder"](z))


def vae_evidence(model: nn.ModuleDict, x: Tensor) -> Tensor:
    """ln p of each image, a sum over a grid of z."""
    line = torch.linspace(-5, 5, 101)
    z = torch.cartesian_prod(line, line)
    logits, log_share = model["decoder"](z), fastelbo.gaussian_log_prob(z, 0.0, 0.0) + 2 * (line[1] - line[0]).log()
    return (x @ logits.T - F.softplus(logits).sum(1) + log_share).logsumexp(1)


class RBM:
    """What scikit-learn has fitted, with its sums."""

    def __init__(self, fitted: sklearn.neural_network.BernoulliRBM) -> None:
        parts = fitted.components_, fitted.intercept_visible_, fitted.intercept_hidden_
        self.weight, self.visible, self.hidden = map(torch.tensor, parts)
        h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(self.hidden))
        self.logits = self.visible + h @ self.weight  # of the pixels, for each h
        self.log_h = h @ self.hidden + F.softplus(self.logits).sum(1)  # not normalised
        self.log_z = self.log_h.logsumexp(0)

    def log_joint(self, x: Tensor) -> Tensor:
        """ln p of images, hidden units summed out, before it is normalised."""
        return x @ self.visible + F.softplus(self.hidden + x @ self.weight.T).sum(-1)


def save_picture(path: Path, bits: dict[str, float]) -> None:
    """Bits per pixel, a bar a leaf."""
    axes = Figure(figsize=(8, 3), layout="constrained").subplots()
    bars = axes.barh(list(bits)[::-1], list(bits.values())[::-1])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(title="What each knows of digits", xlabel="bits per pixel of test images", xlim=(0, 1.15))
    axes.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Fits all, adds up; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x = torch.tensor(sklearn.datasets.load_digits().data)[torch.randperm(1797)].gt(8).double()
    test, x = x.split([300, 1497])
    weights, logits = mixture_by_em(x, 20, 40)
    conv = [MaskedConv2d(16, 16, 3, mask_type="B", activation="elu") for _ in range(2)]
    conv = [MaskedConv2d(1, 16, 5, mask_type="A", activation="elu"), *conv, MaskedConv2d(16, 1, 1, mask_type="B")]
    pixelcnn = fit(nn.Sequential(*conv), pixelcnn_loss, x.float(), args.epochs, "PixelCNN")
    parts = [nn.Sequential(nn.Linear(n, 64), nn.Tanh(), nn.Linear(64, m)) for n, m in ((64, 4), (2, 64))]
    vae = fit(nn.ModuleDict(zip(("encoder", "decoder"), parts, strict=True)), vae_loss, x.float(), args.epochs, "VAE")
    machine = {"n_components": HIDDEN, "learning_rate": 0.05, "n_iter": args.epochs, "random_state": args.seed % 2**32}
    fitted = sklearn.neural_network.BernoulliRBM(**machine).fit(x.numpy())
    rbm, few = RBM(fitted), RBM(sklearn.neural_network.BernoulliRBM(**machine).fit(x[:, 26:38].numpy()))
    chains = test[torch.randint(300, (CHAINS,))].numpy()
    for _ in tqdm(range(SWEEPS), "Gibbs", unit="sweep", disable=None):
        chains = fitted.gibbs(chains)
    expected = (rbm.log_h - rbm.log_z).exp() @ rbm.logits.sigmoid()
    off = (torch.tensor(chains).double().mean(0) - expected).abs().max().item()
    all_few = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 12)
    over_images = few.log_joint(all_few).logsumexp(0).item()
    evidence, bound = vae_evidence(vae, test.float()), -vae_loss(vae, test.float())
    share = (x.sum(0) + 0.5) / (len(x) + 1)
    nats = {"uniform": torch.tensor(-64 * math.log(2)), "independent pixels": log_bernoulli(test, share.logit())}
    nats["mixture of 20"] = (weights + log_bernoulli(test[:, None], logits)).logsumexp(1)
    nats |= {"PixelCNN": -pixelcnn_loss(pixelcnn, test.float()), "VAE, its bound": bound, "VAE, its evidence": evidence}
    nats[f"RBM of {HIDDEN}"] = rbm.log_joint(test) - rbm.log_z
    bits = {name: -value.mean().item() / (64 * math.log(2)) for name, value in nats.items()}
    save_picture(args.output / "family_tree.png", bits)
    print(f"The picture is {args.output / 'family_tree.png'}")
    alone = bits["independent pixels"]
    return [
        ("independent pixels: bits per pixel; uniform", alone, 1, "at most"),
        *((f"{name}: bits per pixel; independent pixels", bits[name], alone, "at most") for name in list(bits)[2:]),
        ("VAE: bits by the bound; by the evidence", bits["VAE, its bound"], bits["VAE, its evidence"], "at least"),
        ("RBM of 12 pixels: ln Z over hidden; over all images", few.log_z.item(), over_images, 1e-9),
        ("RBM: its Gibbs chain's mean pixels, furthest from the sum's", off, 0, 0.05),
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
    add("--epochs", type=int, default=20, help="of each network (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/family_tree", help="for the picture (default: %(default)s)")
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
