"""Errors have one voice: the argument, the rule, what came. The same on every backend, in eager and while tracing."""

import numpy as np
import pytest
import torch

import fastelbo

M = torch.zeros(8, 32)  # mean
S = torch.zeros(8, 32)

NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
JAGGED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)

CASES = [
    # shapes
    ("rsample", (M, torch.zeros(8, 16)), {}, ValueError, "s must broadcast with mean of shape (8, 32); got (8, 16)"),
    ("kl", (M, torch.zeros(3)), {}, ValueError, "s_q must broadcast with mean_q of shape (8, 32); got (3,)"),
    ("kl", (M, S, torch.zeros(5), S), {}, ValueError, "mean_p must broadcast with mean_q of shape (8, 32); got (5,)"),
    ("log_prob", (M, torch.zeros(4), S), {}, ValueError, "mean must broadcast with x of shape (8, 32); got (4,)"),
    ("rsample", (torch.zeros([1] * 65), 0.0), {}, ValueError, "mean must have at most 64 dimensions; got 65"),
    # dtypes and types
    ("rsample", (M.long(), S), {}, TypeError, "mean must be float32, float64, bfloat16 or float16; got torch.int64"),
    ("kl", (M, S.int()), {}, TypeError, "s_q must be float32, float64, bfloat16 or float16; got torch.int32"),
    ("nll", (M, M.bool(), S), {}, TypeError, "mean must be float32, float64, bfloat16 or float16; got torch.bool"),
    ("rsample", (M.to(torch.complex64), S), {}, TypeError, "got torch.complex64"),
    ("rsample", (1.0, 2.0), {}, TypeError, "mean or s must be a tensor; got only numbers"),
    ("rsample", ([0.0], S), {}, TypeError, "mean must be a tensor or a number; got list"),
    ("kl", (M, "0"), {}, TypeError, "s_q must be a tensor or a number; got str"),
    ("rsample", (M, S), {"out_dtype": torch.int64}, TypeError, "out_dtype must be float32"),
    # devices
    ("rsample", (M, S.to("meta")), {}, ValueError, "s must be on the device of mean, cpu; got meta"),
    # scales
    ("rsample", (M, S), {"scale": "sigma"}, ValueError, "scale must be one of logvar, log_std, std, var, softplus; got 'sigma'"),
    ("kl", (M, S), {"scale": None}, TypeError, "scale must be a Scale or one of logvar"),
    ("kl", (M, S), {"scale_p": "std"}, ValueError, "scale_p must come with mean_p and s_p; got it alone"),
    # priors
    ("kl", (M, S, M), {}, ValueError, "mean_p and s_p must both be given, or neither; got no s_p"),
    ("rsample_kl", (M, S, None, S), {}, ValueError, "mean_p and s_p must both be given, or neither; got no mean_p"),
    # events
    ("kl", (M, S), {"event_ndim": 3}, ValueError, "event_ndim must be between 0 and 2 for shape (8, 32); got 3"),
    ("kl", (M, S), {"event_ndim": -1}, ValueError, "event_ndim must be between 0 and 2 for shape (8, 32); got -1"),
    ("log_prob", (M, M, S), {"event_ndim": 1.0}, TypeError, "event_ndim must be an int or None; got float"),
    ("kl", (M, S), {"reduction": "batchmean"}, ValueError, "reduction must be none, sum or mean; got 'batchmean'"),
    # draws
    ("rsample", (M, S), {"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
    ("rsample", (M, S), {"num_samples": 2.0}, TypeError, "num_samples must be an int or None; got float"),
    ("rsample", (M, S), {"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
    ("rsample", (M, S), {"noise_offset": -4}, ValueError, "noise_offset must be at least 0; got -4"),
    ("rsample", (M, S), {"noise_offset": 0.5}, TypeError, "noise_offset must be an int; got float"),
    ("rsample", (M, S), {"noise": torch.zeros(5)}, ValueError, "noise must broadcast to the sample's shape (8, 32); got (5,)"),
    ("rsample", (M, S), {"noise": torch.zeros(2, 8, 32)}, ValueError, "noise must broadcast to the sample's shape (8, 32)"),
    ("rsample", (M, S), {"noise": 1.0}, TypeError, "noise must be a tensor of float32"),
    ("rsample", (M, S), {"noise": M, "seed": 0}, ValueError, "noise must not be given together with seed or generator"),
    ("rsample", (M, S), {"seed": 0, "generator": torch.Generator()}, ValueError, "seed and generator must not both be given"),
    ("rsample", (M, S), {"seed": 2**64}, ValueError, "seed must fit in 64 bits; got 18446744073709551616"),
    ("rsample", (M, S), {"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor; got float"),
    ("rsample", (M, S), {"seed": torch.zeros(1)}, TypeError, "seed must be an int or an int64 tensor; got torch.float32"),
    ("rsample", (M, S), {"seed": torch.zeros(2).long()}, ValueError, "seed must have one element; got shape (2,)"),
    ("rsample", (M, S), {"seed": torch.zeros(1, device="meta").long()}, ValueError, "seed must be on the device of mean, cpu; got meta"),
    ("rsample", (M, S), {"generator": 3}, TypeError, "generator must be a torch.Generator; got int"),
    # objectives
    ("kl", (M, S), {"free_bits": -0.5}, ValueError, "free_bits must be at least 0; got -0.5"),
    ("kl", (M, S), {"free_bits": float("nan")}, ValueError, "free_bits must be at least 0; got nan"),
    ("kl", (M, S), {"free_bits": "1"}, TypeError, "free_bits must be a number or a 0-d tensor; got str"),
    ("kl", (M, S), {"free_bits": True}, TypeError, "free_bits must be a number or a 0-d tensor; got bool"),
    ("kl", (M, S), {"free_bits": torch.ones(1)}, ValueError, "free_bits must be a number or 0-d; got shape (1,)"),
    ("kl", (M, S), {"free_bits": torch.tensor(1)}, TypeError, "free_bits must be a number or a floating-point tensor; got torch.int64"),
    ("kl", (M, S), {"free_bits": torch.tensor(1.0, device="meta")}, ValueError, "free_bits must be on the device of the other tensors, cpu; got meta"),
    ("rsample_kl", (M, S), {"free_bits_per": "batchmean"}, ValueError, "free_bits_per must be dim, example or batch; got 'batchmean'"),
    ("kl", (M, S), {"free_bits": 1.0, "event_ndim": 0}, ValueError, "event_ndim must be at least 1 for free_bits_per='dim'; got 0"),
    ("kl", (M, S), {"balance": 0.8}, ValueError, "balance must come with mean_p and s_p; got it alone"),
    ("rsample_kl", (M, S, M, S), {"balance": 1.5}, ValueError, "balance must be between 0 and 1; got 1.5"),
    ("kl", (M, S, M, S), {"balance": torch.ones(1)}, ValueError, "balance must be a number or 0-d; got shape (1,)"),
    ("kl", (M, S), {"mask": torch.ones(32)}, TypeError, "mask must be a tensor of bool; got torch.float32"),
    ("rsample_kl", (M, S), {"mask": [True]}, TypeError, "mask must be a tensor of bool; got list"),
    ("nll", (M, M, S), {"mask": torch.ones(8).bool()}, ValueError, "mask must broadcast to shape (8, 32); got (8,)"),
    ("log_prob", (M, M, S), {"mask": torch.ones(2, 8, 32).bool()}, ValueError, "mask must broadcast to shape (8, 32); got (2, 8, 32)"),
    ("log_prob", (M, M, S), {"mask": torch.ones(32, device="meta").bool()}, ValueError, "mask must be on the device of the other tensors, cpu; got meta"),
    ("log_prob", (M, M, S), {"mask": None, "reduction": "all"}, ValueError, "reduction must be none, sum or mean"),
    ("nll", (M, M, S), {"beta_nll": 1.5}, ValueError, "beta_nll must be between 0 and 1; got 1.5"),
    ("nll", (M, M, S), {"beta_nll": None}, TypeError, "beta_nll must be a number; got NoneType"),
    ("rsample", (M, S), {"temperature": torch.ones(2)}, ValueError, "temperature must be a number or 0-d; got shape (2,)"),
    ("rsample", (M, S), {"temperature": torch.tensor(True)}, TypeError, "temperature must be a number; got torch.bool"),
    ("rsample", (M, S), {"temperature": torch.ones((), requires_grad=True)}, ValueError, "temperature must be a number, which gets no gradient; got a tensor that requires one"),
    ("rsample", (M, S), {"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be a number or on a device that holds one; got a tensor on meta"),
    ("rsample", (M, S), {"num_samples": torch.tensor(2.0)}, TypeError, "num_samples must be an int or None; got torch.float32"),
    ("rsample", (M, S), {"num_samples": np.float32(2)}, TypeError, "num_samples must be an int or None; got float32"),
    ("rsample", (M, S), {"num_samples": np.bool_(True)}, TypeError, "num_samples must be an int or None; got bool"),
    ("kl", (M, S), {"event_ndim": torch.ones(1).long()}, ValueError, "event_ndim must be a number or 0-d; got shape (1,)"),
    ("kl", (M, S), {"free_bits": np.bool_(True)}, TypeError, "free_bits must be a number or a 0-d tensor; got bool"),
    ("kl", (M, np.bool_(True)), {}, TypeError, "s_q must be a tensor or a number; got bool"),
    # events that broadcasting would make of a batch
    ("kl", (M[:, :1], 0.0, M[:, 0], 0.0), {}, ValueError, "mean_p must not have its first dimension broadcast into an event of mean_q, of shape (8, 1), unless event_ndim is given; got (8,)"),
    ("rsample_kl", (M[:, :1], S[:, 0]), {}, ValueError, "s_q must not have its first dimension broadcast into an event of mean_q, of shape (8, 1)"),
    # layouts
    ("kl", (M.to_sparse(), S), {}, TypeError, "mean_q must be a dense tensor; got a sparse_coo one"),
    ("kl", (M, S.to_sparse()), {}, TypeError, "s_q must be a dense tensor; got a sparse_coo one"),
    ("rsample", (NESTED, NESTED), {}, TypeError, "mean must be a dense tensor; got a nested one"),
    ("rsample", (M, JAGGED), {}, TypeError, "s must be a dense tensor; got a nested one"),
    ("log_prob", (M, M, NESTED), {}, TypeError, "s must be a dense tensor; got a nested one"),
    ("kl", (M, S), {"mask": M.bool().to_sparse()}, TypeError, "mask must be a dense tensor; got a sparse_coo one"),
    ("rsample", (M, S), {"noise": M.to_sparse()}, TypeError, "noise must be a dense tensor; got a sparse_coo one"),
    # numbers
    ("rsample", (M, S), {"temperature": float("nan")}, ValueError, "temperature must be finite; got nan"),
    ("rsample_kl", (M, S), {"temperature": float("inf")}, ValueError, "temperature must be finite; got inf"),
    ("rsample", (M, S), {"temperature": 10**400}, ValueError, "temperature must be finite; got 1000"),
    ("rsample", (M, 10**400), {}, ValueError, "s must be a number that a float holds; got one of 1329 bits"),
]  # fmt: skip


def case_id(case):
    op, _, keywords, error, message = case
    return f"{op}-{error.__name__}-{message.split(' must')[0].split(' is')[0].replace(' ', '_')[:24]}"


def at_home(value):
    """A tensor of the CPU on torch's default device, which is the backend's."""
    on_cpu = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return value.to(torch.get_default_device()) if on_cpu else value


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_raises(backend, case):
    op, arguments, keywords, error, message = case
    keywords = {name: at_home(value) for name, value in keywords.items()}
    with pytest.raises(error) as caught:
        getattr(fastelbo, f"gaussian_{op}")(*map(at_home, arguments), **keywords, backend=backend)
    assert message.replace(", cpu;", f", {at_home(M).device};") in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_floor_is_read_where_nobody_waits_for_it(value):
    with pytest.raises(ValueError, match=f"free_bits must be at least 0; got {value}"):
        fastelbo.gaussian_kl(M, S, free_bits=torch.tensor(value))


B, D, K = torch.zeros(8), torch.zeros(8, 32), torch.zeros(5, 8)
OBJECTIVES = [
    ("gaussian_elbo", (M, M, torch.zeros(7), D, D), {}, ValueError, "x_s must broadcast with x of shape (8, 32); got (7,)"),
    ("gaussian_elbo", (M, M, S, torch.zeros(3, 4), 0.0), {}, ValueError, "mean_q must be of the examples of x, (8,); got (3,)"),
    ("gaussian_elbo", (M, M, S, D.to("meta"), 0.0), {}, ValueError, "mean_q must be on the device of x, cpu; got meta"),
    ("gaussian_elbo", (M, M, S, D, D), {"beta": torch.ones(8)}, ValueError, "beta must be a number or 0-d; got shape (8,)"),
    ("gaussian_elbo", (M, M, S, D, D), {"beta": None}, TypeError, "beta must be a number or a 0-d tensor; got NoneType"),
    ("gaussian_elbo", (M, M, S, D, D), {"x_event_ndim": 3}, ValueError, "x_event_ndim must be between 0 and 2"),
    ("gaussian_elbo", (M, M, S, D, D), {"x_mask": M}, TypeError, "x_mask must be a tensor of bool; got torch.float32"),
    ("gaussian_elbo", (M, M, S, D, D), {"backend": "mkl"}, ValueError, "backend must be one of"),
    ("gaussian_elbo", (M, torch.zeros(5, 8, 32), S, D, D), {}, ValueError, "x_event_ndim must be given where x_mean and x_s, of shape (5, 8, 32), have more dimensions than x, of shape (8, 32); got None"),
    ("gaussian_elbo", (M[:, 0], M[:, :1], 0.0, D, D), {}, ValueError, "x must not have its first dimension broadcast into an event of x_mean, of shape (8, 1), unless x_event_ndim is given"),
    ("gaussian_elbo", (M, M, S, D, D), {"x_scale": "sigma"}, ValueError, "x_scale must be one of logvar"),
    ("gaussian_elbo", (M, M, S, D, D), {"z_scale": "sigma"}, ValueError, "z_scale must be one of logvar"),
    ("gaussian_elbo", (M, M, S, D, D), {"z_event_ndim": 3}, ValueError, "z_event_ndim must be between 0 and 2"),
    ("gaussian_elbo", (M, M, S, D, D), {"z_mask": M}, TypeError, "z_mask must be a tensor of bool"),
    ("gaussian_rsample_log_prob", (M[:, :1], M[:, 0]), {}, ValueError, "s must not have its first dimension broadcast"),
    ("gaussian_one_sample_kl", (M[:, :1], 0.0, M[:, 0], 0.0), {}, ValueError, "mean_p must not have its first dimension broadcast"),
    ("iwae_bound", (K, K, K), {"estimator": "vimco"}, ValueError, "estimator must be one of iwae, stl, dreg; got 'vimco'"),
    ("iwae_bound", (K, K, torch.zeros(3)), {}, ValueError, "log_q_z must broadcast with log_p_x of shape (5, 8); got (3,)"),
    ("iwae_bound", (K, K, K), {"dim": 2}, ValueError, "dim must be between -2 and 1 for shape (5, 8); got 2"),
    ("iwae_bound", (K, K, K), {"dim": None}, TypeError, "dim must be an int; got NoneType"),
    ("iwae_bound", (K[:0], 0.0, 0.0), {}, ValueError, "dim must have at least one sample; got shape (0, 8)"),
    ("iwae_bound", (K.long(), K, K), {}, TypeError, "log_p_x must be float32, float64, bfloat16 or float16; got torch.int64"),
    ("iwae_bound", (K, K, K), {"estimator": "stl"}, ValueError, "z must be given for estimator 'stl'; got None"),
    ("iwae_bound", (K, K, K), {"estimator": "dreg"}, ValueError, "z must be given for estimator 'dreg'; got None"),
    ("iwae_bound", (K, K, K), {"estimator": "dreg", "z": 1.0}, TypeError, "z must be a tensor; got float"),
    ("iwae_bound", (K, K, K), {"estimator": "dreg", "z": D}, ValueError, "z must begin with the shape of the log-densities, (5, 8); got (8, 32)"),
    ("importance_weighted_log_likelihood", ([],), {}, ValueError, "log_weights must hold at least one sample; got none"),
    ("importance_weighted_log_likelihood", ([K, K[:, :1]],), {}, ValueError, "log_weights must be of one batch, (8,); got (1,)"),
    ("importance_weighted_log_likelihood", (K,), {"dim": 2}, ValueError, "dim must be between -2 and 1"),
    ("gaussian_rsample_log_prob", (M, torch.zeros(7)), {}, ValueError, "s must broadcast with mean of shape (8, 32); got (7,)"),
    ("gaussian_rsample_log_prob", (M, S), {"noise": M, "seed": 0}, ValueError, "noise must not be given together with seed or generator"),
    ("gaussian_rsample_log_prob", (M, S), {"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
    ("gaussian_one_sample_kl", (M, S, M), {}, ValueError, "mean_p and s_p must both be given, or neither; got no s_p"),
    ("optimal_sigma", (M, torch.zeros(7)), {}, ValueError, "mean must broadcast with x of shape (8, 32); got (7,)"),
    ("optimal_sigma", (M, M), {"mask": M}, TypeError, "mask must be a tensor of bool; got torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", OBJECTIVES, ids=case_id)
def test_objectives_raise(case):
    function, arguments, keywords, error, message = case
    with pytest.raises(error) as caught:
        getattr(fastelbo, function)(*arguments, **keywords)
    assert message in str(caught.value)


def test_generator_of_another_device():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be on the device of mean, cpu; got cuda"):
        fastelbo.gaussian_rsample(M, S, generator=Elsewhere())


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[19]], ids=case_id)
def test_raises_the_same_while_tracing(case):
    op, arguments, keywords, error, message = case

    def call(*arguments):
        return getattr(fastelbo, f"gaussian_{op}")(*arguments, **keywords)

    with pytest.raises(Exception) as caught:
        torch.compile(call, backend="eager", fullgraph=True)(*arguments)
    assert message in str(caught.value)


CALLED_BEFORE = [  # what may be called, and what may not although Python says that it is the same
    ("kl", {"event_ndim": 1}, {"event_ndim": True}, TypeError),
    ("kl", {"event_ndim": 1}, {"event_ndim": 1.0}, TypeError),
    ("kl", {"free_bits": 1.0}, {"free_bits": True}, TypeError),
    ("log_prob", {"event_ndim": 0}, {"event_ndim": False}, TypeError),
    ("rsample", {}, {"temperature": True}, TypeError),
    ("rsample", {}, {"noise_offset": False}, TypeError),
    ("rsample", {"num_samples": 1}, {"num_samples": True}, TypeError),
    ("rsample_kl", {"num_samples": 1}, {"num_samples": 1.0}, TypeError),
    ("rsample_kl", {}, {"temperature": True}, TypeError),
    ("rsample_kl", {"balance": 1.0}, {"balance": True}, TypeError),
]


@pytest.mark.parametrize("case", CALLED_BEFORE, ids=lambda case: f"{case[0]}-{case[2]}")
def test_raises_after_a_call_that_was_right(case):
    op, right, wrong, error = case
    arguments = (M, M, S) if op == "log_prob" else (M, S, M, S) if "balance" in right else (M, S)
    function = getattr(fastelbo, f"gaussian_{op}")
    for _ in range(2):
        function(*arguments, **right)
        with pytest.raises(error, match=f"{next(iter(wrong))} must be"):
            function(*arguments, **wrong)


@pytest.mark.parametrize("op", ["rsample", "kl", "rsample_kl", "log_prob"])
def test_raises_for_tensors_of_another_kind_after_a_call_that_was_right(op):
    function, x = getattr(fastelbo, f"gaussian_{op}"), [M] if op == "log_prob" else []
    for _ in range(2):
        function(*x, M, S)
    others = [S.to_sparse(), S.to_sparse_csr(), S.to("meta"), S.long(), torch.zeros(8, 31), NESTED, JAGGED]
    for other in others:
        with pytest.raises((TypeError, ValueError), match="must "):
            function(*x, M, other)
        with pytest.raises((TypeError, ValueError), match="must "):
            function(*x, other, S)
