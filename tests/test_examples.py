"""The examples but train_vae.py and train_pixelcnn.py, which have files of their own."""

import math
import runpy
import sys

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.neighbors
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.image import imread
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import bayesian_regression
import common
import conditional_vae
import hierarchical_vae
import variational_fit

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LARGE_BATCHES = ("--epochs", "1", "--batch-size", "500")
TINY = {  # options of a short run, and the pictures that it writes
    bayesian_regression: (("--steps", "20", "--observations", "10"), ("predictions.png", "weights.png")),
    conditional_vae: (LARGE_BATCHES, ("analogies.png", "samples.png", "training_curve.png")),
    hierarchical_vae: (
        (*LARGE_BATCHES, "--latents", "4", "3", "2"),
        ("kl.png", "reconstructions.png", "samples.png", "training_curve.png"),
    ),
    variational_fit: (("--steps", "20"), ("fits.png",)),
}
each_example = pytest.mark.parametrize("example", TINY, ids=lambda module: module.__name__)


def digits(example, *options):
    args = example.parse_args(options)
    if example is conditional_vae:
        data = conditional_vae.Data.load(args.seed, CPU)
        return data, conditional_vae.start_training(data, args, CPU)
    return common.split(common.load_digits(), args.seed, CPU), hierarchical_vae.start_training(args, CPU)


@each_example
def test_tiny_run_writes_pictures(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hierarchical_vae, "IMPORTANCE_SAMPLES", 32)
    options, pictures = TINY[example]
    assert example.main([*options, "--output", str(tmp_path / "new" / "out")]) == 0
    checkpoint = ["checkpoint.pt"] if "--epochs" in options else []
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted([*checkpoint, *pictures])
    for name in pictures:
        picture = imread(tmp_path / "new" / "out" / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01
    out = capsys.readouterr().out
    assert "nan" not in out and str(tmp_path / "new" / "out") in out


@pytest.mark.parametrize("example", [conditional_vae, hierarchical_vae], ids=lambda module: module.__name__)
def test_resumed_run_is_bit_identical(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "report", lambda *args: None)
    monkeypatch.setattr(example, "save_pictures", lambda *args: None)

    def run(directory, epochs, *options):
        torch.manual_seed(epochs)  # whatever state a new process would be in
        args = ["--output", str(tmp_path / directory), "--batch-size", "500", "--epochs", str(epochs), *options]
        assert example.main(args) == 0
        return torch.load(tmp_path / directory / "checkpoint.pt")

    straight, half = run("straight", 2), run("halves", 1)
    resumed = run("halves", 2, "--resume")
    assert resumed["history"] == straight["history"] and resumed["history"][:1] == half["history"]
    for name, weight in straight["model"].items():
        assert torch.equal(resumed["model"][name], weight), name


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (bayesian_regression, ("--steps", "0")),
        (bayesian_regression, ("--samples", "-1")),
        (bayesian_regression, ("--observations", "0")),
        (bayesian_regression, ("--backend", "cuda", "--device", "cpu")),
        (conditional_vae, ("--epochs", "0")),
        (conditional_vae, ("--device", "gpu")),
        (conditional_vae, ("--resume",)),
        (hierarchical_vae, ("--latents", "3")),
        (hierarchical_vae, ("--latents", "3", "0")),
        (hierarchical_vae, ("--free-bits", "-0.5")),
        (hierarchical_vae, ("--free-bits", "nan")),
        (hierarchical_vae, ("--batch-size", "0")),
        (variational_fit, ("--steps", "0")),
        (variational_fit, ("--samples", "0")),
        (variational_fit, ("--seed", "-1")),
        (variational_fit, ("--device", "meta")),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else " ".join(value),
)
def test_bad_option_is_refused(example, options, tmp_path, capsys):
    assert example.main([*options, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and options[0] in err
    assert not list(tmp_path.iterdir())


@each_example
def test_file_in_the_way_of_the_output_is_refused(example, tmp_path, capsys):
    (tmp_path / "out").write_text("in the way")
    assert example.main(["--output", str(tmp_path / "out")]) == 2
    assert "--output" in capsys.readouterr().err and (tmp_path / "out").read_text() == "in the way"


@each_example
def test_process_exits_with_the_code(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example.__file__, "--seed", "-1", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(example.__file__, run_name="__main__")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"{example.__name__}.py: --seed must be ")


@each_example
def test_help_and_unknown_options(example, capsys):
    for options, code in ((["--help"], 0), (["--backend", "numpy"], 2), (["--colour"], 2)):
        with pytest.raises(SystemExit) as exit_info:
            example.main(options)
        assert exit_info.value.code == code
    out = capsys.readouterr().out
    for option in ("--backend", "--device", "--output", "--seed", TINY[example][0][0]):
        assert option in out


def test_interrupted_run_without_checkpoints_says_no_more_than_that(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(variational_fit, "fit_all", interrupt)
    assert variational_fit.main(["--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nInterrupted\n"


def curve(example, backend):
    """The losses of some thirty steps."""
    torch.manual_seed(0)
    if example is variational_fit:
        args = example.parse_args(["--backend", backend, "--steps", "30"])
        p = example.targets(CPU)["two modes"]
        fits = (example.fit(kl, p, (-3.0, 1.0), args) for kl in (example.reverse_kl, example.forward_kl))
        return torch.tensor([losses for _, losses in fits])
    if example is bayesian_regression:
        args = example.parse_args(["--backend", backend, "--steps", "30"])
        observations = example.make_observations(20, CPU)
        return torch.tensor([example.fit(model, *observations, args)[1] for model in example.PRIORS])
    options = {hierarchical_vae: (0.5,)}
    data, training = digits(example, "--batch-size", "50")
    images = data if example is conditional_vae else data[0]
    return example.train_epoch(training, images, backend, *options.get(example, ()))


@each_example
def test_reference_and_cpu_give_the_same_curve(example):
    reference, cpu = curve(example, "reference"), curve(example, "cpu")
    assert cpu.numel() > 50
    # Both draw the same noise, so only rounding differs: single precision's unit, multiplied by what thirty steps of
    # Adam make of it. The examples' curves part by 4e-6 of their largest value at most.
    torch.testing.assert_close(cpu, reference, rtol=0, atol=3e-5 * reference.abs().max().item())


# variational_fit


def correlated():
    """Mean and covariance as NumPy arrays, and the target in single and double precision."""
    p = variational_fit.targets(CPU, torch.float64)["correlated Gaussian"]
    return p.mean.numpy(), p.covariance_matrix.numpy(), variational_fit.targets(CPU)["correlated Gaussian"], p


def modes():
    """Weights, means and covariances as NumPy arrays, and the target in single and double precision."""
    p = variational_fit.targets(CPU, torch.float64)["two modes"]
    components = p.component_distribution
    numbers = p.mixture_distribution.probs, components.mean, components.covariance_matrix
    return *(number.numpy() for number in numbers), variational_fit.targets(CPU)["two modes"], p


def modes_log_density(z):
    """By SciPy."""
    weights, means, covariances, *_ = modes()
    parts = zip(weights, means, covariances, strict=True)
    return np.logaddexp(*(np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(z) for w, m, c in parts))


def assert_close_gaussians(q, mean, std):
    """Means within a tenth of a standard deviation, standard deviations within 4 %.

    500 steps of 64 draws, over seeds 0 to 5: 0.044 and 1.7 % at most.
    """
    assert np.abs((q.mean.numpy() - mean) / std).max() < 0.1
    assert np.abs(np.log(q.stddev.numpy() / std)).max() < 0.04


ARGS_500 = variational_fit.parse_args(["--steps", "500", "--samples", "64"])


def test_reverse_kl_to_a_gaussian_finds_the_diagonal_of_its_precision():
    mean, covariance, p, exact = correlated()
    std = np.diag(np.linalg.inv(covariance)) ** -0.5
    assert (std < 0.5 * np.sqrt(np.diag(covariance))).all()  # another answer than the marginals
    q, _ = variational_fit.fit(variational_fit.reverse_kl, p, (-2.0, 2.0), ARGS_500)
    assert_close_gaussians(q, mean, std)
    best = variational_fit.best_by_reverse_kl(variational_fit.Grid(exact), q)
    np.testing.assert_allclose(best.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(best.stddev, std, rtol=1e-12)


def test_forward_kl_to_the_mixture_finds_its_moments():
    weights, means, covariances, p, exact = modes()
    mean = weights @ means
    variance = weights @ (np.diagonal(covariances, axis1=1, axis2=2) + (means - mean) ** 2)
    q, _ = variational_fit.fit(variational_fit.forward_kl, p, (0.0, 0.0), ARGS_500)
    assert_close_gaussians(q, mean, variance**0.5)
    best = variational_fit.best_by_forward_kl(variational_fit.Grid(exact))
    np.testing.assert_allclose(best.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(best.variance, variance, rtol=1e-12)


def test_reverse_kl_to_the_mixture_finds_the_mode_that_scipy_finds():
    *_, p, exact = modes()
    nodes, quadrature = np.polynomial.hermite_e.hermegauss(80)  # for 20, off by 4e-4
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    quadrature = np.outer(quadrature, quadrature).ravel() / (2 * math.pi)

    def kl(x):
        entropy = x[2:].sum() + 1 + math.log(2 * math.pi)
        return -entropy - quadrature @ modes_log_density(x[:2] + np.exp(x[2:]) * noise)

    found = scipy.optimize.minimize(kl, [-2.0, -0.5, -0.3, -0.3], method="BFGS")
    mean, std = found.x[:2], np.exp(found.x[2:])
    assert mean[0] < -1.5
    q, _ = variational_fit.fit(variational_fit.reverse_kl, p, (-3.0, 1.0), ARGS_500)
    assert_close_gaussians(q, mean, std)
    grid = variational_fit.Grid(exact)
    best = variational_fit.best_by_reverse_kl(grid, q)
    np.testing.assert_allclose(best.mean, mean, atol=1e-4)
    np.testing.assert_allclose(best.stddev, std, atol=1e-4)
    np.testing.assert_allclose(grid.reverse_kl(best), found.fun, atol=1e-6)


def test_grid_integrates_the_divergences_of_gaussians():
    *_, p = correlated()
    q = variational_fit.diagonal(torch.tensor([0.2, -1.0]), torch.tensor([0.16, 2.25]))
    grid = variational_fit.Grid(p)
    torch.testing.assert_close(grid.reverse_kl(q), kl_divergence(q, p), rtol=1e-10, atol=0)
    torch.testing.assert_close(grid.forward_kl(q), kl_divergence(p, q), rtol=1e-10, atol=0)


def test_laplace_has_position_and_curvature_of_the_mode():
    mean, covariance, _, p = correlated()
    q = variational_fit.laplace(p, (-2.0, 2.0))
    np.testing.assert_allclose(q.mean, mean, atol=1e-8)
    np.testing.assert_allclose(q.covariance_matrix, covariance, rtol=1e-8)

    q = variational_fit.laplace(modes()[-1], (3.0, -1.0))
    mode, step = q.mean.numpy(), 1e-3 * np.eye(2)
    gradient = [modes_log_density(mode + h) - modes_log_density(mode - h) for h in step]
    assert np.abs(gradient).max() / 2e-3 < 1e-5
    curvature = [
        [sum(a * b * modes_log_density(mode + a * h + b * k) for a in (1, -1) for b in (1, -1)) / 4e-6 for k in step]
        for h in step
    ]
    np.testing.assert_allclose(q.covariance_matrix, np.linalg.inv(-np.array(curvature)), rtol=1e-4)


# bayesian_regression


@pytest.fixture
def observations():
    return bayesian_regression.make_observations(60, CPU)


def numpy_posterior(x, y):
    """Mean and precision of the linear model's weights, and the log-evidence."""
    f, y = bayesian_regression.features(x.double()).numpy(), y.double().numpy()
    noise, prior = bayesian_regression.NOISE, bayesian_regression.PRIOR_STD
    rows = np.concatenate([f / noise, np.eye(f.shape[1]) / prior])
    mean, *_ = np.linalg.lstsq(rows, np.concatenate([y / noise, np.zeros(f.shape[1])]))
    covariance = prior**2 * f @ f.T + noise**2 * np.eye(len(y))
    return mean, rows.T @ rows, scipy.stats.multivariate_normal(cov=covariance).logpdf(y)


def test_exact_posterior_and_evidence(observations):
    exact = bayesian_regression.solve(*observations)
    mean, precision, log_evidence = numpy_posterior(*observations)
    np.testing.assert_allclose(exact.posterior.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(exact.posterior.precision_matrix, precision, rtol=1e-9)
    np.testing.assert_allclose(exact.log_evidence, log_evidence, rtol=1e-9)
    np.testing.assert_allclose(exact.mean_field.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(exact.mean_field.covariance_matrix, np.diag(1 / np.diag(precision)), rtol=1e-9)


def test_bayes_by_backprop_converges_to_the_best_independent_posterior(observations):
    args = bayesian_regression.parse_args(["--steps", "1500"])
    weights, _ = bayesian_regression.fit(bayesian_regression.linear, *observations, args)
    q = bayesian_regression.learned(weights)
    mean, precision, _ = numpy_posterior(*observations)
    # Over seeds 0 to 5, at most 0.13 standard deviations, 5 %, and 0.013 nats.
    assert np.abs((q.mean.numpy() - mean) * np.diag(precision) ** 0.5).max() < 0.3
    assert np.abs(np.log(q.stddev.numpy() * np.diag(precision) ** 0.5)).max() < 0.1
    exact = bayesian_regression.solve(*observations)
    assert 0 < exact.elbo(exact.mean_field) - exact.elbo(q) < 0.03


def test_estimated_bound_is_the_exact_one_in_the_mean(observations):
    weights = bayesian_regression.Weights(*bayesian_regression.PRIORS[bayesian_regression.linear])
    with torch.no_grad():
        estimates = torch.stack(
            [
                bayesian_regression.elbo(bayesian_regression.linear, weights, *observations, 1000, None).double()
                for _ in range(50)
            ]
        )
    exact = bayesian_regression.solve(*observations).elbo(bayesian_regression.learned(weights))
    error = estimates.std().item() / 50**0.5
    assert error < 1e-3 * abs(exact) and abs(estimates.mean().item() - exact) < 4 * error


def test_weights_are_drawn_with_their_kl():
    shapes, prior_std = [(3, 2), (4,)], [2.0, 0.5]
    weights = bayesian_regression.Weights(shapes, prior_std)
    with torch.no_grad():
        weights.rho.copy_(torch.linspace(-4, 2, 10))
    drawn, kl = weights.sample(20000, None)
    assert [each.shape for each in drawn] == [(20000, 3, 2), (20000, 4)]
    std = F.softplus(weights.rho)
    priors = torch.tensor([2.0] * 6 + [0.5] * 4)
    torch.testing.assert_close(kl, kl_divergence(Normal(weights.mean, std), Normal(0.0, priors)).sum())
    flat = torch.cat([each.flatten(1) for each in drawn], dim=1)
    assert ((flat.mean(0) - weights.mean).abs() < 5 * std / 20000**0.5).all()
    torch.testing.assert_close(flat.std(0), std, rtol=0.04, atol=0)  # eight standard errors


def test_network_is_the_one_of_torch():
    weights = bayesian_regression.Weights(*bayesian_regression.PRIORS[bayesian_regression.network])
    x = torch.linspace(-3, 3, 7)
    (w1, b1, w2, b2), _ = weights.sample(2, None)
    y = bayesian_regression.network(x, [w1, b1, w2, b2])
    for draw in range(2):
        hidden = torch.tanh(F.linear(x[:, None], w1[draw, :, None], b1[draw]))
        torch.testing.assert_close(y[draw], F.linear(hidden, w2[draw, None], b2[draw])[:, 0])


# conditional_vae


@pytest.fixture(scope="module")
def trained_conditional():
    torch.manual_seed(0)
    data, training = digits(conditional_vae)
    for _ in range(12):
        conditional_vae.train_epoch(training, data, "cpu")
    return data, training.model


def test_class_is_worth_more_than_its_price(trained_conditional):
    data, pair = trained_conditional
    terms = [conditional_vae.evaluate(model, data, "cpu") for model in (pair.conditional, pair.unconditional)]
    told, not_told = (-(nll + kl).mean().item() for nll, kl in terms)
    assert told - math.log(10) > not_told + 0.5  # 1.3 to 1.9 nats over seeds 0 to 3
    wrong = conditional_vae.evaluate(pair.conditional, data, "cpu", (data.test_classes + 1) % 10)
    assert told > -(sum(wrong)).mean().item() + 20


def test_samples_are_of_their_class_to_an_independent_judge(trained_conditional):
    data, pair = trained_conditional
    judge = sklearn.neighbors.KNeighborsClassifier(5)
    judge.fit(data.train.flatten(1).numpy() / 16, data.train_classes.numpy())
    samples = conditional_vae.sample(pair.conditional, 50, CPU)
    assert judge.score(samples.flatten(0, 1).numpy(), np.tile(np.arange(10), 50)) > 0.95
    on_test, on_samples = conditional_vae.external_accuracy(data, samples)
    assert 0.9 < on_test < 1 and on_samples > 0.95


def test_highest_elbo_names_the_class(trained_conditional):
    data, pair = trained_conditional
    named = conditional_vae.classify(pair.conditional, data, "cpu")
    assert (named == data.test_classes).float().mean() > 0.88  # 0.93 to 0.97 over seeds 0 to 3


def test_evaluation_is_that_of_torch_distributions(trained_conditional):
    data, pair = trained_conditional
    for model, told in ((pair.conditional, True), (pair.unconditional, False)):
        _, kl = conditional_vae.evaluate(model, data, "reference")
        x = conditional_vae.pixels(data.test, torch.Generator().manual_seed(conditional_vae.EVALUATION_SEED))
        inputs = torch.cat((x, F.one_hot(data.test_classes.long())), dim=1) if told else x
        with torch.no_grad():
            mean, logvar = model.encoder(inputs).chunk(2, dim=1)
        expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
        torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-4)


# hierarchical_vae


def test_kl_of_each_level_is_that_of_torch_distributions():
    model = hierarchical_vae.HierarchicalVAE(64, [5, 3, 2])
    levels = model.infer(torch.rand(6, 64), "cpu", samples=4, seed=1)
    assert [level.z.shape[-1] for level in levels] == [2, 3, 5]
    for level in levels:
        q, p = (
            Normal(torch.as_tensor(mean), (5 * torch.tanh(torch.as_tensor(s) / 5)).exp())
            for mean, s in (level.q, level.p)
        )
        torch.testing.assert_close(level.kl, kl_divergence(q, p).sum(-1))
        for ours, theirs in zip(hierarchical_vae.log_densities(level, "cpu"), (q, p), strict=True):
            torch.testing.assert_close(ours, theirs.log_prob(level.z).sum(-1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(levels[0].z[0], levels[0].z[1])


def test_importance_sampling_of_a_linear_hierarchy_is_exact(monkeypatch):
    class Linear(nn.Module):
        """Means that are linear in the input, and one standard deviation."""

        def __init__(self, weight, std):
            super().__init__()
            self.weight, self.s = weight, math.atanh(math.log(std) / 5) * 5

        def forward(self, above):
            mean = above @ self.weight.T
            return torch.cat((mean, torch.full_like(mean, self.s)), dim=-1)

    a, b, sigmas = torch.tensor([[0.8], [-0.5]]), torch.randn(4, 2), (0.7, 1.1)
    model = hierarchical_vae.HierarchicalVAE(4, [2, 1])
    model.priors[0] = Linear(a, sigmas[0])
    monkeypatch.setattr(model, "decode", lambda z: z @ b.T)
    with torch.no_grad():
        model.x_logvar.fill_(2 * math.log(sigmas[1]))
    x = torch.randn(5, 4)
    monkeypatch.setattr(hierarchical_vae, "fixed_pixels", lambda images: images)
    monkeypatch.setattr(hierarchical_vae, "IMPORTANCE_SAMPLES", 20000)
    monkeypatch.setattr(hierarchical_vae, "EVALUATION_SAMPLES", 10000)
    log_p_x, levels = hierarchical_vae.importance_sampled(model, x, "cpu")
    covariance = b @ (a @ a.T + sigmas[0] ** 2 * torch.eye(2)) @ b.T + sigmas[1] ** 2 * torch.eye(4)
    exact = MultivariateNormal(torch.zeros(4), covariance).log_prob(x).mean().item()
    assert abs(log_p_x - exact) < 0.05
    assert len(levels) == 2
    for kl, drawn, error in levels:
        assert 0 < error < 0.05 and abs(drawn - kl) < 4 * error
    nll, kls = hierarchical_vae.evaluate(model, x, "cpu")
    assert -nll - sum(kls) < exact - 0.05  # the untrained posterior is far from the exact one


def test_free_bits_stop_the_gradient_of_the_kl_at_the_floor():
    model = hierarchical_vae.HierarchicalVAE(64, [3, 2])
    x = torch.rand(8, 64)

    def gradients(floor, with_kl=True):
        levels = model.infer(x, "cpu", floor, seed=1)
        loss = model.nll(x, levels, "cpu").mean()
        loss = loss + sum(level.kl.mean() for level in levels) if with_kl else loss
        model.zero_grad()
        loss.backward()
        return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    (nll, without_kl), (floored, at_floor) = gradients(None, with_kl=False), gradients(100.0)
    assert floored == pytest.approx(nll + 100 * (3 + 2), rel=1e-6)
    for ours, expected in zip(at_floor, without_kl, strict=True):
        assert torch.equal(ours, expected)
    (loss, plain), (loss_0, free_0) = gradients(None), gradients(0.0)
    assert loss_0 == pytest.approx(loss, rel=1e-6) and not torch.allclose(plain[1], without_kl[1])
    for ours, expected in zip(free_0, plain, strict=True):
        torch.testing.assert_close(ours, expected)
