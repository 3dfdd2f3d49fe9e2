"""The course: each program's claims at a small budget, its page, and its behaviour as a program.

A program holds what it found against truths of its own, and ends with 1 where they differ. So each runs once, and what
it says is true is computed here another way.
"""

import importlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.ndimage
import scipy.optimize
import scipy.stats
import sklearn.datasets
import torch
from matplotlib.image import imread

import course
import fastelbo.testing

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
SMALL = {  # options of a run of seconds
    "em": [],
    "em_to_vae": ["--steps", "250"],
    "missing_pixels": ["--epochs", "1"],
    "functionals": ["--steps", "100"],
    "families": ["--starts", "3"],
    "flexible_posterior": ["--steps", "60"],
    "laplace": [],
    "posterior_of_weights": ["--steps", "400"],
    "density": ["--epochs", "20"],
    "gan": ["--steps", "200"],
    "diffusion_as_vae": ["--steps", "40"],
    "diffusion_of_digits": ["--epochs", "3"],
    "ring": ["--steps", "150"],
    "autoencoder_to_vae": ["--epochs", "30"],
    "completion": ["--epochs", "12"],
    "disentanglement": ["--epochs", "5"],
    "pixelrnn": ["--epochs", "3"],
    "tokens": ["--epochs", "10"],
    "student_forcing": ["--epochs", "3"],
    "sketch_to_digit": ["--epochs", "3"],
    "decoder_variance": ["--epochs", "12"],
    "family_tree": ["--epochs", "6"],
}
each_program = pytest.mark.parametrize("name", course.PROGRAMS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A program's claims by name, its truths by name, and the folder of its pictures; each program runs once."""
    seen = {}

    def once(name):
        if name not in seen:
            output = tmp_path_factory.mktemp("course") / name
            claims = importlib.import_module(name).main([*SMALL[name], "--output", str(output)])
            seen[name] = (
                {what: found for what, found, _, _ in claims},
                {what: true for what, _, true, _ in claims},
                output,
            )
        return seen[name]

    return once


def test_every_program_has_a_small_budget_and_is_short():
    assert list(SMALL) == list(course.PROGRAMS)
    for name in course.PROGRAMS:
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 180, name
        imports = set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
        assert imports <= {"torch", "fastelbo", "matplotlib", "tqdm", "sklearn"}


def test_all_tell_and_end_alike():
    """What every program repeats so that it can be copied alone is the same in all."""
    texts = [(ROOT / "examples" / f"{name}.py").read_text() for name in course.PROGRAMS]
    assert len({text[text.index("def report(") : text.index("def main(")] for text in texts}) == 1
    assert len({text[text.index("    try:\n        args.output") :] for text in texts}) == 1


@each_program
def test_claims_hold_and_pictures_are_drawn(name, ran):
    found, true, output = ran(name)
    assert len(found) >= 4 and all(map(math.isfinite, [*found.values(), *true.values()]))
    for path in output.iterdir():
        picture = imread(path)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01
    assert len(list(output.iterdir())) == 1


@each_program
def test_page_has_the_programs_claims(name, ran):
    """In the words of the program, and numbers that hold."""
    page = (ROOT / "docs" / "course" / f"{name}.md").read_text()
    table = [row for row in page[page.index("| what | found") :].splitlines() if row.startswith("| ")]
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table]
    assert rows[0] == ["what", "found", "exact or independent", "within"]
    assert [row[0] for row in rows[1:]] == list(ran(name)[0])
    for what, found, true, within in rows[1:]:
        difference, side = float(found) - float(true), {"at least": 1, "at most": -1}.get(within)
        if side is None:  # of numbers rounded to seven digits
            assert abs(difference) <= float(within) + 1e-6 * abs(float(true)), what
        else:
            assert side * difference >= 0, what


@each_program
def test_what_differs_ends_with_1(name, monkeypatch, tmp_path, capsys):
    program = importlib.import_module(name)
    claims = [("good", 1.0, 1.0, 0), ("nan", math.nan, 1.0, 1.0), ("low", 1.0, 2.0, "at least")]
    claims += [("high", 2.0, 1.0, "at most"), ("no number", math.nan, 0, "at most")]
    monkeypatch.setattr(program, "run", lambda args: claims)
    with pytest.raises(SystemExit) as ended:
        program.main(["--output", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: not as it must be: nan; low; high; no number\n"


@each_program
def test_bad_input_and_ctrl_c_end_in_a_sentence(name, monkeypatch, tmp_path, capsys):
    program = importlib.import_module(name)

    def ended(*options):
        with pytest.raises(SystemExit) as exit_info:
            program.main(list(map(str, options)))
        return exit_info.value.code, *capsys.readouterr()

    code, out, _ = ended("--help")
    assert code == 0 and "--seed" in out and "--output" in out
    budget = re.search(r"(--(?:steps|epochs|starts)) ", out)[1]
    for options in ((budget, 0), (budget, "many"), ("--seed", -1), ("--colour",)):
        code, out, err = ended(*options, "--output", tmp_path / "out")
        assert code == 2 and out == "" and options[0] in err.splitlines()[-1] and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        code, out, err = ended("--output", path)
        assert code == 2 and out == "" and f"--output: cannot write to {tmp_path / 'file'}" in err
    for error, expected in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        monkeypatch.setattr(program, "run", lambda args, error=error: (_ for _ in ()).throw(error))
        code, _, err = ended("--output", tmp_path / "out")
        assert (
            code == expected and ("Interrupted" in err or "No space left" in err) and len(err.strip().splitlines()) == 1
        )


def test_course_runs_programs_and_tells_which_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(course, "PROGRAMS", ("good", "bad"))
    monkeypatch.setattr(course, "__file__", str(tmp_path / "course.py"))
    table = "print('text'); print('| what | found |'); print('|:--|--:|'); print('| a | 1 |')"
    (tmp_path / "good.py").write_text(table)
    (tmp_path / "bad.py").write_text("import sys; print('| what |'); print('|:--|'); print('| b |'); sys.exit('no')")
    course.main(["--programs", "good", "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "| a | 1 |" in out and "text" not in out and "All 1 claims of 1 programs hold" in out
    with pytest.raises(SystemExit) as ended:
        course.main(["--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "| b |" in out and err.splitlines()[-1].endswith("not as they must be: bad")
    assert "no" in (tmp_path / "out" / "bad" / "printed.txt").read_text()
    for options in (["--jobs", "0"], ["--output", str(tmp_path / "bad.py")], ["--programs", "none"]):
        with pytest.raises(SystemExit) as ended:
            course.main(options)
        assert ended.value.code == 2


# em


def test_em_climbs_to_where_scipy_finds_the_top(ran):
    found, _, _ = ran("em")
    seen = np.array([0.4, 1.5, -2.2])
    top = scipy.optimize.minimize_scalar(
        lambda theta: -scipy.stats.norm(0, math.hypot(theta, 0.7)).logpdf(seen).sum(), (0.5, 1.0), tol=1e-12
    )
    assert found["toy: theta after 100 steps of EM; where the likelihood is greatest"] == pytest.approx(top.x, abs=1e-6)


def test_bounds_of_em_are_quadratures():
    import em

    theta, at, noise = 1.3, 0.8, em.NOISE
    total = 0.0
    for x in em.SEEN.tolist():
        q = scipy.stats.norm(at * x / (at**2 + noise**2), noise / math.hypot(at, noise))

        def integrand(z, x=x, q=q):
            joint = scipy.stats.norm(theta * z, noise).logpdf(x) + scipy.stats.norm.logpdf(z)
            return q.pdf(z) * (joint - q.logpdf(z))

        total += scipy.integrate.quad(integrand, -12, 12, epsabs=1e-12)[0]
    bound, best = em.toy_bound(*(torch.tensor(value, dtype=torch.float64) for value in ([theta], at)))
    assert bound.item() == pytest.approx(total, abs=1e-9)
    around = best + torch.tensor([-1e-3, 0, 1e-3], dtype=torch.float64)
    curve, _ = em.toy_bound(around, torch.tensor(at, dtype=torch.float64))
    assert curve.argmax() == 1


# em_to_vae


def test_best_linear_model_is_the_one_of_scikit_learns_pca(ran):
    import sklearn.decomposition

    x = sklearn.datasets.load_digits().data / 16
    best = sklearn.decomposition.PCA(4, svd_solver="full").fit(x)
    # Its covariance divides by N - 1.
    covariance = best.get_covariance() * (len(x) - 1) / len(x)
    expected = scipy.stats.multivariate_normal(x.mean(0), covariance).logpdf(x).mean()
    _, true, _ = ran("em_to_vae")
    assert true["nats an image by a linear VAE; the formula"] == pytest.approx(expected, abs=1e-8)


# missing_pixels


@pytest.fixture(scope="module")
def masked():
    """The program, a network with all its numbers at random, and images with every filling."""
    import missing_pixels

    torch.manual_seed(3)
    model = missing_pixels.pixelcnn(4).requires_grad_(False)
    fillings = (torch.rand(1, 1, 8, 8) > 0.5).float().repeat(4096, 1, 1, 1)
    fillings[:, 0, missing_pixels.HIDDEN] = missing_pixels.FILLINGS.float()
    return missing_pixels, model, fillings


def test_fillings_are_numbered_in_binary(masked):
    missing_pixels, *_ = masked
    expected = [[int(digit) for digit in f"{number:012b}"] for number in range(4096)]
    assert missing_pixels.FILLINGS.tolist() == expected
    assert (missing_pixels.FILLINGS * missing_pixels.PLACES).sum(1).tolist() == list(range(4096))


def test_log_probability_is_the_product_of_conditionals(masked):
    """By NumPy, pixel by pixel, each from an image whose later pixels are noise."""
    missing_pixels, model, fillings = masked
    image = fillings[1234, 0].numpy()
    expected = np.zeros((8, 8))
    for row, column in np.ndindex(8, 8):
        seen = image.copy().ravel()
        seen[8 * row + column :] = np.random.default_rng(0).random(64 - 8 * row - column)
        logit = model(torch.tensor(seen).view(1, 1, 8, 8))[0, 0, row, column].item()
        expected[row, column] = -np.logaddexp(0, -logit if image[row, column] else logit)
    np.testing.assert_allclose(missing_pixels.log_probs(model, fillings[1234:1235])[0], expected, rtol=0, atol=1e-6)


def test_best_bernoullis_are_those_that_scipy_finds(masked):
    missing_pixels, model, fillings = masked
    log_joint = 3 * missing_pixels.log_probs(model, fillings).sum((1, 2))
    ours = missing_pixels.best_bernoullis(log_joint, 200)
    h, log_p = missing_pixels.FILLINGS.numpy(), log_joint.numpy()

    def negative_bound(logits):
        log_q = (h * -np.logaddexp(0, -logits) + (1 - h) * -np.logaddexp(0, logits)).sum(1)
        return np.exp(log_q) @ (log_q - log_p)

    best = scipy.optimize.minimize(negative_bound, np.zeros(12), method="BFGS", options={"gtol": 1e-7})
    assert missing_pixels.bound(log_joint, ours).item() == pytest.approx(-best.fun, abs=1e-9)
    np.testing.assert_allclose(ours, best.x, atol=1e-3)


# functionals


def test_typical_sequences_are_counted_in_integers(monkeypatch):
    import functionals

    monkeypatch.setattr(functionals, "THROWS", 500)
    count, mass, heads = 0, 0.0, 0
    while mass < 0.99:
        count, mass = count + math.comb(500, heads), mass + scipy.stats.binom(500, 0.1).pmf(heads)
        heads += 1
    entropy = scipy.stats.bernoulli(0.1).entropy() / math.log(2)
    assert functionals.typical(0.1) == pytest.approx((math.log2(count) / 500, entropy), abs=1e-9)


def test_forms_of_the_bound_are_scipys_integral():
    import functionals

    q, prior = scipy.stats.norm(0.7, 0.4), scipy.stats.norm(0, 1)

    def integrand(z):
        return q.pdf(z) * (scipy.stats.norm(math.sin(2 * z) + z, 0.5).logpdf(1.3) + prior.logpdf(z) - q.logpdf(z))

    bound = scipy.integrate.quad(integrand, -4, 5, epsabs=1e-11, limit=200)[0]
    forms = functionals.forms_of_the_bound(functionals.normal(0.7, 0.4))
    np.testing.assert_allclose(forms, bound, rtol=0, atol=1e-9)


# families


def test_best_q_for_two_modes_is_the_one_that_scipy_finds():
    """By Gauss and Hermite's rule in place of a grid, from the densities of SciPy."""
    import families

    q, (least,) = families.fit(families.kl, families.TWO_MODES, torch.tensor([[[2.0, 0, 0, 0, 0, 0]]]).double(), "full")
    nodes, quadrature = np.polynomial.hermite_e.hermegauss(60)
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    quadrature = np.outer(quadrature, quadrature).ravel() / (2 * math.pi)
    modes = [scipy.stats.multivariate_normal([-2, -0.5], families.COVARIANCES[0])]
    modes += [scipy.stats.multivariate_normal([2, 0.5], families.COVARIANCES[1])]

    def divergence(x):
        lower = np.array([[math.exp(x[2]), 0], [x[4], math.exp(x[3])]])
        z = x[:2] + noise @ lower.T
        log_p = np.logaddexp(math.log(0.35) + modes[0].logpdf(z), math.log(0.65) + modes[1].logpdf(z))
        return -x[2] - x[3] - 1 - math.log(2 * math.pi) - quadrature @ log_p

    best = scipy.optimize.minimize(divergence, [2.0, 0.5, 0, 0, 0], method="BFGS")
    assert least.item() == pytest.approx(best.fun, abs=1e-5)
    np.testing.assert_allclose(q[0][0, 0], best.x[:2], atol=1e-3)


def test_share_outside_of_a_region_is_scipys():
    import families

    lower = torch.tensor([[1.0, 0.0], [1.08, 0.5231]]).double()
    q = torch.eye(2).double() * 0.5
    values = np.linalg.eigvalsh((torch.linalg.solve(lower, q) @ torch.linalg.solve(lower, q).T).numpy())

    def given(y):
        rest = (families.EDGE - values[0] * y**2) / values[1]
        return scipy.stats.norm.pdf(y) * (scipy.stats.chi2(1).sf(rest) if rest > 0 else 1)

    expected, _ = scipy.integrate.quad(given, -12, 12, limit=500, epsabs=1e-12)
    drawn, exact = families.outside(q, lower)
    assert exact == pytest.approx(expected, abs=1e-6)
    assert abs(drawn - exact) < 5 * math.sqrt(exact / families.DRAWS)


# flexible_posterior


def test_a_mixture_loses_its_kl_by_draws_of_torch_distributions():
    import flexible_posterior

    torch.manual_seed(0)
    lost, q = flexible_posterior.climb(flexible_posterior.Mixture(4), 1, 20)
    mean, log_scale, weight = q.numbers.split([2, 2, 1], dim=1)
    normals = torch.distributions.Independent(torch.distributions.Normal(mean, log_scale.exp()), 1)
    mixed = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weight[:, 0]), normals)
    z = mixed.sample((100_000,))
    seen = torch.distributions.Normal(z[:, 1] - z[:, 0] ** 2, 0.4).log_prob(torch.tensor(-1.0).double())
    ratio = mixed.log_prob(z) - seen - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    off = ratio.mean() + flexible_posterior.EVIDENCE[1] - lost
    assert abs(off) < 4 * ratio.std() / math.sqrt(len(z))


def test_layers_have_as_many_numbers_as_the_mixtures_that_they_beat():
    import flexible_posterior

    layers = [layer for layer in flexible_posterior.STARTS["2 layers"]().modules() if hasattr(layer, "mask")]
    assert sum(int(layer.mask.sum()) + len(layer.bias) for layer in layers) == 36
    assert flexible_posterior.STARTS["7 G"]().numbers.numel() == 35


# laplace


def test_evidence_on_the_grid_is_scipys_integral():
    import laplace

    signed = laplace.threes_and_eights()
    mode, curvature = laplace.laplace(lambda w: laplace.loss(w, signed), torch.zeros(2).double())
    x = signed.numpy()

    def loss(w):
        return np.logaddexp(0, -x @ w).mean() + 0.05 * (w @ w)

    best = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-10)
    np.testing.assert_allclose(mode, best.x, atol=1e-6)
    centre, half = mode.numpy(), 9 / np.sqrt(20 * np.linalg.eigvalsh(curvature.numpy())[0])
    nodes, weights = np.polynomial.legendre.leggauss(60)
    values = [[math.exp(20 * (best.fun - loss(centre + half * np.array([a, b])))) for b in nodes] for a in nodes]
    expected = math.log(weights @ np.array(values) @ weights * half**2) - 20 * best.fun
    assert laplace.integrate(signed, 20, mode, curvature)[2].item() == pytest.approx(expected, abs=1e-7)


# posterior_of_weights


def network_of_two_weights():
    """What the program saw, as NumPy arrays, and the joint density of its network's weights, by SciPy."""
    torch.manual_seed(0)
    x = np.linspace(0, 1, 20)
    y = 1.5 * np.tanh(x) + 0.2 * torch.randn(20, dtype=torch.float64).numpy()

    def log_joint(w):
        log_prior = scipy.stats.norm(0, 2).logpdf(w).sum(-1)
        return log_prior + scipy.stats.norm(w[..., 1:] * np.tanh(w[..., :1] * x), 0.2).logpdf(y).sum(-1)

    return x, y, log_joint


def test_exact_deviation_of_the_network_is_that_of_lines(ran):
    """For each w the posterior of v is a normal: the network's function at 3 is a mixture of those."""
    x, y, _ = network_of_two_weights()

    def given(w, power):
        f = np.tanh(w * x)
        precision = f @ f / 0.04 + 0.25
        mean, tanh = f @ y / 0.04 / precision, math.tanh(3 * w)
        density = scipy.stats.multivariate_normal(cov=4 * np.outer(f, f) + 0.04 * np.eye(20)).pdf(y)
        values = 1, mean * tanh, (mean**2 + 1 / precision) * tanh**2
        return density * scipy.stats.norm(0, 2).pdf(w) * values[power]

    mass, first, second = (scipy.integrate.quad(given, 0, 16, args=power, epsabs=0)[0] for power in range(3))
    _, true, _ = ran("posterior_of_weights")
    expected = math.sqrt(second / mass - (first / mass) ** 2)
    assert 3 * true["network: deviation at 3 by backprop; a third of the exact"] == pytest.approx(expected, rel=1e-7)


def test_backprop_lacks_what_the_best_q_that_scipy_finds_does(ran):
    _, _, log_joint = network_of_two_weights()
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    noise = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / (2 * math.pi)

    def negative_bound(q):
        return -weights @ log_joint(q[:2] + np.exp(q[2:]) * noise) - q[2:].sum() - 1 - math.log(2 * math.pi)

    best = -scipy.optimize.minimize(negative_bound, [1.3, 1.3, -2, -2], method="BFGS").fun
    found, _, _ = ran("posterior_of_weights")
    evidence = found["network: ln p(y) by a grid; by one integral of lines"]
    lacking = found["network: nats that backprop's weights lack; their KL on the grid"]
    assert 0 < lacking - (evidence - best) < 0.01  # 1e-4 to 5e-3 over seeds


# density


def test_every_image_is_counted_by_its_number():
    import density

    torch.manual_seed(0)
    model = density.PixelCNN().requires_grad_(False)
    table = density.count_all(model, 2)
    assert table.shape == (65536, 2)
    for number in (0, 1, 4711, 65535):
        image = torch.tensor([int(digit) for digit in f"{number:016b}"]).float().view(1, 1, 4, 4)
        ours = model.log_prob(image.repeat(2, 1, 1, 1), torch.arange(2))
        torch.testing.assert_close(table[number], ours, rtol=0, atol=1e-5)
    assert (table.exp().sum(0) - 1).abs().max() < 1e-6


# gan


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_divergences_are_scipys_integrals(shift):
    import gan

    def p(x):
        return 0.5 * scipy.stats.norm.pdf(x, -1.5, 0.7) + 0.5 * scipy.stats.norm.pdf(x, 1.0, 0.5)

    def q(x):
        return scipy.stats.norm.pdf(x, shift, 1.2)

    def kl(a, b):
        return scipy.integrate.quad(lambda x: a(x) * math.log(a(x) / b(x)), -11, 11, limit=200, epsabs=1e-11)[0]

    jsd = kl(p, lambda x: (p(x) + q(x)) / 2) + kl(q, lambda x: (p(x) + q(x)) / 2)
    np.testing.assert_allclose(gan.divergences(shift), (jsd, kl(q, p)), rtol=1e-6)


def test_gradients_of_the_generator_are_differences_of_its_losses():
    """With D held, q's draws moved by a little."""
    import gan

    _, cell, p, q = gan.densities(2.0)
    d = p / (p + q)
    ahead, behind = gan.densities(2.0 + 1e-4)[3], gan.densities(2.0 - 1e-4)[3]
    losses = torch.log1p(-d), -d.log()
    expected = [((ahead - behind) / 2e-4 * loss).sum().item() * cell.item() for loss in losses]
    np.testing.assert_allclose(gan.generator_gradients(2.0), expected, rtol=1e-3)


# diffusion_as_vae


def test_bound_of_a_diffusion_is_that_of_torch_distributions_by_draws():
    """Of one image and a way back that is not the best, beside a mean over draws of all levels."""
    import diffusion_as_vae

    torch.manual_seed(0)
    x, levels, draws = torch.tensor([[0.7, -1.3]]).double(), 4, 400_000
    gains, logvars = 0.5 + torch.rand(levels, 2).double(), torch.randn(levels, 2).double()
    prior = torch.tensor([0.3, -0.2]).double()
    a, _ = diffusion_as_vae.schedule(levels)
    log_ratio, below = torch.zeros(draws).double(), x.expand(draws, 2)
    for t in range(1, levels + 1):
        r = a[t] / a[t - 1]
        step = torch.distributions.Normal(r * below, (1 - r**2).sqrt())
        above = step.sample()
        back = torch.distributions.Normal(gains[t - 1] * above, (logvars[t - 1] / 2).exp())
        log_ratio += (step.log_prob(above) - back.log_prob(below)).sum(1)
        below = above
    log_ratio -= torch.distributions.Normal(0.0, (prior / 2).exp()).log_prob(below).sum(1)
    ours = diffusion_as_vae.bound(x, gains, logvars, prior).item()
    assert abs(log_ratio.mean().item() - ours) < 4 * log_ratio.std().item() / math.sqrt(draws)
    assert log_ratio.std() / math.sqrt(draws) < 0.01 * abs(ours)


# diffusion_of_digits


def test_shares_of_levels_are_those_of_bayes_rule():
    """By SciPy's normal densities, of two pixels by themselves and of three images that alone can be."""
    import diffusion_of_digits

    x, a, std = torch.tensor([[0.3, -0.9]]), 0.8, 0.6
    share = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(17), 2), dtype=torch.float32)
    greys = diffusion_of_digits.GREYS.numpy()
    ours = diffusion_of_digits.by_pixel(share.log(), x, a, std**2).exp()
    expected = share.numpy() * scipy.stats.norm(a * greys, std).pdf(x.numpy()[..., None])
    np.testing.assert_allclose(ours, expected / expected.sum(-1, keepdims=True), rtol=1e-5)

    images = np.random.default_rng(1).integers(17, size=(3, 64))
    x = torch.tensor(a * greys[images[:1]] + std * np.random.default_rng(2).normal(size=(1, 64)), dtype=torch.float32)
    levels = torch.nn.functional.one_hot(torch.tensor(images), 17).float()
    log_p = scipy.stats.norm(a * greys[images], std / 3).logpdf(x.numpy()).sum(1)
    weight = np.exp(log_p - np.logaddexp.reduce(log_p))
    ours = diffusion_of_digits.by_heart(levels, x, a, std**2 / 9).exp()
    np.testing.assert_allclose(ours[0], np.einsum("m,mdv->dv", weight, levels), rtol=1e-4, atol=1e-6)


def test_a_step_loses_what_its_signal_to_noise_does():
    """L_t-1 is half the gain in a^2 / variance times the square error of the guess, whatever the way there."""
    import diffusion_of_digits

    a, var = diffusion_of_digits.schedule(20)
    images = torch.randint(17, (4, 64))
    guess = torch.randn(4, 64, dtype=torch.float64)
    for t in (2, 11, 20):
        x_t = torch.randn(4, 64, dtype=torch.float64)
        q = diffusion_of_digits.back(t, x_t, diffusion_of_digits.GREYS[images].double(), a, var)
        p = diffusion_of_digits.back(t, x_t, guess, a, var)
        lost = a[t - 1] ** 2 / var[t - 1] - a[t] ** 2 / var[t]
        expected = lost / 2 * (diffusion_of_digits.GREYS[images] - guess).square().sum(1)
        kl = torch.distributions.kl_divergence(
            *(torch.distributions.Normal(mean, math.sqrt(v)) for mean, v in (q, p))
        ).sum(1)
        torch.testing.assert_close(kl, expected)


def test_step_back_is_the_normal_given_both_neighbours():
    import diffusion_of_digits

    a, var = diffusion_of_digits.schedule(8)
    x_0, x_t, t = 0.3, -0.7, 4
    r = a[t] / a[t - 1]

    before, noise = scipy.stats.norm(a[t - 1] * x_0, math.sqrt(var[t - 1])), scipy.stats.norm(0, math.sqrt(1 - r**2))

    def joint(z, power=0):
        return z**power * before.pdf(z) * noise.pdf(x_t - r * z)

    mass, first, second = (scipy.integrate.quad(joint, -4, 4, args=power, epsabs=1e-13)[0] for power in range(3))
    mean, variance = diffusion_of_digits.back(t, x_t, x_0, a, var)
    assert mean == pytest.approx(first / mass, abs=1e-7)
    assert variance == pytest.approx(second / mass - (first / mass) ** 2, abs=1e-7)


def test_bits_of_independent_pixels_are_counted(ran):
    torch.manual_seed(0)
    images = sklearn.datasets.load_digits().data.astype(int)[torch.randperm(1797).numpy()]
    test, seen = images[:300], images[300:]
    share = np.stack([(seen == level).sum(0) + 1 / 17 for level in range(17)]) / (len(seen) + 1)
    bits = -np.log2(share[test, np.arange(64)]).mean()
    found, _, _ = ran("diffusion_of_digits")
    assert found["independent pixels: bits per pixel of test images; uniform"] == pytest.approx(bits, abs=1e-5)


# ring


def test_density_of_the_ring_is_what_scipy_integrates_to_1():
    import ring

    def density(y, x):
        return ring.log_density(torch.tensor([x, y], dtype=torch.float64)).exp().item()

    total, _ = scipy.integrate.quad(lambda r: 2 * math.pi * r * density(0.0, r), 1, 3)
    assert total == pytest.approx(1, abs=1e-8)
    draws = ring.ring(torch.randn(20000, 2, dtype=torch.float64)).norm(dim=1).numpy()
    assert scipy.stats.kstest(draws, scipy.stats.rayleigh(1, 0.1).cdf).pvalue > 0.001


# autoencoder_to_vae


def test_parts_of_the_rate_are_those_by_draws():
    import autoencoder_to_vae

    mean = torch.tensor([[0.0, 1.0], [0.5, -1.0], [-1.5, 0.2]]).double()
    logvar = torch.tensor([[-2.0, -1.0], [-3.0, -1.5], [0.0, -2.0]]).double()
    tells, misses, mass = autoencoder_to_vae.parts_of_the_rate(mean, logvar)
    each = torch.distributions.Independent(torch.distributions.Normal(mean, (logvar / 2).exp()), 1)
    z = each.sample((200_000,))
    log_q = each.log_prob(z[:, :, None])
    log_all = log_q.logsumexp(-1) - math.log(3)
    log_own, log_p = each.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert tells == pytest.approx((log_own - log_all).mean().item(), abs=0.01)
    assert misses == pytest.approx((log_all - log_p).mean().item(), abs=0.02)
    assert mass == pytest.approx(1, abs=1e-6)


# pixelrnn


@pytest.mark.parametrize("layer", ["Row LSTM", "Diagonal BiLSTM", "PixelCNN"])
def test_recurrent_networks_are_causal(layer):
    import pixelrnn

    fastelbo.testing.assert_causal(pixelrnn.network(layer), (1, 5, 6))


def test_diagonal_lstm_is_the_loop_over_pixels():
    """Row by row, column by column, from the states of the left neighbour and of the one above."""
    import pixelrnn

    torch.manual_seed(1)
    layer, x = pixelrnn.DiagonalBiLSTM().double(), torch.randn(1, pixelrnn.CHANNELS, 3, 4).double()
    weight = layer.of_state[0].weight
    h, cell, zero = {}, {}, torch.zeros(pixelrnn.CHANNELS).double()
    for row, column in np.ndindex(3, 4):
        left, above = (row, column - 1), (row - 1, column)
        gates = layer.of_input[0](x)[0, :, row, column]
        gates = gates + weight[..., 0] @ h.get(above, zero) + weight[..., 1] @ h.get(left, zero)
        out, forget, new, content = gates.chunk(4)
        cell[row, column] = forget.sigmoid() * cell.get(left, zero) + new.sigmoid() * content.tanh()
        h[row, column] = out.sigmoid() * cell[row, column].tanh()
    expected = torch.stack([h[place] for place in np.ndindex(3, 4)], dim=1).view(1, -1, 3, 4)
    torch.testing.assert_close(layer.along(x, 0), expected)


# decoder_variance


def test_mass_of_a_grey_level_is_scipys():
    import decoder_variance

    images = torch.tensor([[0.0, 1.0, 8.0, 15.0, 16.0]])
    mean, logvar = torch.tensor([[0.1, 0.6, 0.5, 0.1, 0.2]]), torch.tensor(2 * math.log(0.07))
    edges = np.array([[-np.inf, 1, 8, 15, 16], [1, 2, 9, 16, np.inf]]) / 17
    normal = scipy.stats.norm(mean.numpy()[0].astype(float), math.exp(logvar.item() / 2))
    mass = np.where(
        edges[0] > mean.numpy(), normal.sf(edges[0]) - normal.sf(edges[1]), np.diff(normal.cdf(edges), axis=0)
    )
    np.testing.assert_allclose(decoder_variance.log_levels(images, mean, logvar), np.log(mass), rtol=1e-5)


# family_tree


def test_sums_of_the_boltzmann_machine_are_scikit_learns():
    """Its free energies, and what its own chain would do next."""
    import sklearn.neural_network

    import family_tree

    x = (np.random.default_rng(0).random((200, 12)) < 0.3).astype(float)
    fitted = sklearn.neural_network.BernoulliRBM(5, n_iter=5, random_state=0).fit(x)
    rbm = family_tree.RBM(fitted)
    np.testing.assert_allclose(rbm.log_joint(torch.tensor(x)), -fitted._free_energy(x), rtol=1e-12)
    images = np.array([[int(digit) for digit in f"{number:012b}"] for number in range(4096)], dtype=float)
    assert np.exp(-fitted._free_energy(images) - rbm.log_z.item()).sum() == pytest.approx(1, abs=1e-12)
    mean = np.exp(-fitted._free_energy(images) - rbm.log_z.item()) @ images
    np.testing.assert_allclose((rbm.log_h - rbm.log_z).exp() @ rbm.logits.sigmoid(), mean, rtol=1e-10)


# tokens


def test_chi_squared_of_codes_is_scipys():
    import tokens

    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(4**8, 0.2))
    drawn = random.choice(4**8, tokens.DRAWS, p=p)
    order = np.argsort(p)
    parts = np.split(order, np.searchsorted(np.cumsum(p[order]), np.arange(1, tokens.GROUPS) / tokens.GROUPS))
    seen = [np.isin(drawn, part).sum() for part in parts]
    expected = scipy.stats.chisquare(seen, [tokens.DRAWS * p[part].sum() for part in parts]).pvalue
    assert tokens.p_value(torch.tensor(p).log(), torch.tensor(drawn)) == pytest.approx(expected, abs=1e-6)


def test_prior_of_codes_is_the_product_of_its_factors():
    """Number after number, each from codes whose later numbers are noise."""
    import tokens

    torch.manual_seed(0)
    prior, code = tokens.Prior().requires_grad_(False), tokens.CODES[4711]
    total = 0.0
    for row, column, colour in np.ndindex(2, 2, 2):
        seen = torch.randint(4, (2, 2, 2))
        for place in np.ndindex(2, 2, 2):
            if place < (row, column, colour):
                seen[place[2], place[0], place[1]] = code[place[2], place[0], place[1]]
        logits = prior(seen[None].float()).view(4, 2, 2, 2)[:, colour, row, column]
        total += logits.log_softmax(0)[code[colour, row, column]].item()
    assert prior.loss(code[None]).item() == pytest.approx(-total, abs=1e-5)


# student_forcing


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.5, 1.0])
def test_limit_of_scheduled_sampling_is_that_of_the_law_of_pairs(epsilon):
    """Pixel by pixel, from the joint probabilities of the data's pixel and of the one that is fed."""
    import student_forcing

    after = np.array([[0.9, 0.1], [0.2, 0.8]])
    first = np.array([2 / 3, 1 / 3])
    pairs, kl = epsilon * np.diag(first) + (1 - epsilon) * np.outer(first, first), 0.0
    for _ in range(student_forcing.WIDTH - 1):
        q = (pairs.T @ after) / pairs.sum(0)[:, None]  # the best answer to what is fed
        kl += first @ (after * np.log(after / q)).sum(1)
        drawn = np.einsum("xv,xy,vw->yw", pairs, after, q)
        pairs = epsilon * np.diag(first) + (1 - epsilon) * drawn
    assert student_forcing.kl_of_the_limit(epsilon) == pytest.approx(kl, abs=1e-12)


# completion


def test_best_diagonal_q_of_the_seen_pixels_is_the_one_that_scipy_finds():
    """From the densities of torch.distributions, of one image."""
    import completion

    torch.manual_seed(0)
    x = torch.randn(200, 64).double() * torch.linspace(0.1, 2, 64).double()
    linear = completion.Linear(x)
    (mean, logvar), gap = linear.best(x[:1], completion.SEEN)
    weight, centre = linear.weight[completion.SEEN].numpy(), linear.centre[completion.SEEN].numpy()
    variance, seen = math.exp(linear.x_logvar.item()), x[0, completion.SEEN].numpy()

    def negative_bound(q):
        mean, logvar = np.split(q, 2)
        expected = ((seen - centre - weight @ mean) ** 2).sum() + np.exp(logvar) @ (weight**2).sum(0)
        nll = 0.5 * expected / variance + 0.5 * len(seen) * math.log(2 * math.pi * variance)
        return nll + 0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum()

    best = scipy.optimize.minimize(negative_bound, np.zeros(2 * completion.LATENTS), method="BFGS")
    np.testing.assert_allclose(np.concatenate([mean[0], logvar[0]]), best.x, atol=1e-4)
    covariance = weight @ weight.T + variance * np.eye(len(seen))
    evidence = scipy.stats.multivariate_normal(centre, covariance).logpdf(seen)
    assert gap.item() == pytest.approx(evidence + best.fun, abs=1e-6)


# disentanglement


def test_gap_of_a_code_that_is_wrong_once_in_eight_is_the_channels_capacity():
    import disentanglement

    first, second, slip = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(8)).T
    codes = torch.stack((first ^ (slip == 0), second, slip), dim=1).double()
    expected = np.array([1 - scipy.stats.entropy([1 / 8, 7 / 8], base=2), 1])
    factors = torch.stack((first, second), dim=1)
    assert disentanglement.gap(codes, factors) == pytest.approx(expected.mean(), abs=1e-12)
    np.testing.assert_allclose(disentanglement.table(codes, factors), [[expected[0], 0, 0], [0, 1, 0]], atol=1e-12)


def test_images_of_factors_are_scipys_turned_and_moved():
    """The middle of each place, the size and the angle of one image, by SciPy's splines of order 1."""
    from sklearn.datasets import load_digits

    import disentanglement

    x, factors = disentanglement.turned_digits()
    assert len({tuple(row) for row in factors.tolist()}) == len(x) == 1500
    wanted = torch.tensor([1, 4, 2, 0, 3])
    ours = x[(factors == wanted).all(1)].view(14, 14)
    angle, zoom, across, down = 0.8, 2.1 - 1.6 / 3, -0.35, 0.175
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # rows, then columns
    matrix = turn * zoom * 8 / 14
    offset = 3.5 - matrix @ (np.array([6.5, 6.5]) + 7 * np.array([down, across]))
    image = np.pad(load_digits().images[2] / 16, 8)
    theirs = scipy.ndimage.affine_transform(image, matrix, offset + 8, (14, 14), order=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# sketch_to_digit


def test_sketch_is_the_ink_that_scipys_erosion_takes_away():
    import sketch_to_digit

    images = torch.randint(0, 3, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0)).clamp(max=2)
    images[:25] = images[:25].clamp(min=1)  # with ink inside
    images[:25, :, 3, 4] = 0
    for image, ours in zip(images, sketch_to_digit.sketch(images), strict=True):
        ink = image[0].numpy() > 0
        np.testing.assert_array_equal(ours[0] > 0, ink & ~scipy.ndimage.binary_erosion(ink))


def test_network_sees_the_sketch_ahead_and_no_later_pixel():
    import sketch_to_digit

    torch.manual_seed(0)
    model = sketch_to_digit.PixelCNN(3).double()
    x, cond = torch.rand(1, 1, 5, 5).double(), torch.rand(1, 1, 5, 5).double()
    of_x, of_cond = torch.autograd.functional.jacobian(lambda x, s: model(x, model.look(s)).sum(1).flatten(), (x, cond))
    assert of_x.view(25, 25).triu().abs().max() == 0
    assert of_cond.view(25, 25)[0, 6].abs() > 0 and of_cond.view(25, 25)[0, 18].abs() > 0
