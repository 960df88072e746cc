"""The PyTorch twin's energy distances against loops over pairs, and against themselves in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pf_torch.distances import energy_distance, energy_distance_grouped, sliced_energy_distance  # noqa: E402


def case(n=11, m=7, d=3, seed=1):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), 0.5 + 1.3 * rng.standard_normal((m, d))
    return x, y, rng.uniform(0, 1, n), rng.uniform(0, 1, m)


def loops(x, y, wx=None, wy=None, estimator="v", power=1, smoothing=0.0):
    """The definition, pair by pair."""
    wx, wy = (np.ones(len(p)) if w is None else w for p, w in ((x, wx), (y, wy)))
    wx, wy = wx / wx.sum(), wy / wy.sum()

    def mean(a, wa, b, wb, own):
        total = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if not (own and estimator == "u" and i == j):
                    total += wa[i] * wb[j] * math.sqrt(((a[i] - b[j]) ** 2).sum() + smoothing) ** power
        return total / (1 - (wa**2).sum()) if own and estimator == "u" else total

    return 2 * mean(x, wx, y, wy, False) - mean(x, wx, x, wx, True) - mean(y, wy, y, wy, True)


def value_and_gradients(x, y, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = energy_distance(x, y, **options)
    return value.detach(), *torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize("method", ["tiled", "plain"])
@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
def test_energy_distance_is_the_sum_over_pairs(method, estimator, weighted, smoothing):
    x, y, wx, wy = case()
    weights = {"wx": wx, "wy": wy} if weighted else {}
    want = loops(x, y, **weights, estimator=estimator, smoothing=smoothing)
    options = {"estimator": estimator, "smoothing": smoothing, "method": method}
    given = {key: torch.tensor(w) for key, w in weights.items()}
    for tile in (3, 512):
        got = energy_distance(torch.tensor(x), torch.tensor(y), **given, **options, tile=tile)
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_distances_need_no_pairs(estimator, weighted):
    x, y, wx, wy = case()
    weights = {"wx": wx, "wy": wy} if weighted else {}
    want = loops(x, y, **weights, estimator=estimator, power=2)
    given = {key: torch.tensor(w) for key, w in weights.items()}
    got = energy_distance(torch.tensor(x), torch.tensor(y), **given, estimator=estimator, power=2)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    if estimator == "v":
        gap = np.average(x, 0, weights.get("wx")) - np.average(y, 0, weights.get("wy"))
        np.testing.assert_allclose(got, 2 * (gap**2).sum(), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
def test_energy_distance_has_all_derivatives_forward_backward_and_second(estimator, power, smoothing):
    x, y, wx, wy = (torch.tensor(a) for a in case(5, 4, 2))
    options = {"wx": wx, "wy": wy, "estimator": estimator, "power": power, "smoothing": smoothing}
    function = lambda x, y: energy_distance(x, y, **options, tile=3)
    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_is_the_closed_form():
    x, y, *_ = case()
    _, gx, _ = value_and_gradients(torch.tensor(x), torch.tensor(y), tile=4)

    def pull(cell, others):
        units = [(cell - o) / np.linalg.norm(cell - o) for o in others if np.any(o != cell)]
        return np.sum(units, axis=0)

    for got, cell in zip(gx, x, strict=True):
        want = 2 / (len(x) * len(y)) * pull(cell, y) - 2 / len(x) ** 2 * pull(cell, x)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-14)


def test_hessian_vector_product_is_the_same_forward_over_reverse():
    x, y, *_ = (torch.tensor(a) for a in case(5, 4, 2))
    function = lambda x: energy_distance(x, y, tile=3)
    direction = torch.ones_like(x) * torch.arange(5.0)[:, None]
    _, forward = torch.func.jvp(torch.func.grad(function), (x,), (direction,))
    numeric = [torch.func.grad(function)(x + s * 1e-5 * direction) for s in (1, -1)]
    np.testing.assert_allclose(forward, (numeric[0] - numeric[1]) / 2e-5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["tiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_distance_gradient_is_finite_at_coincident_cells(method, dtype):
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]], dtype=dtype)
    y = torch.tensor([[1.0, 2.0], [9.0, 9.0]], dtype=dtype)
    value, gx, gy = value_and_gradients(x, y, method=method)
    np.testing.assert_allclose(value, loops(x.double().numpy(), y.double().numpy()), rtol=1e-6)
    u, w = np.array([4.0, 3.0]) / 5, np.array([8.0, 7.0]) / math.sqrt(113)
    np.testing.assert_allclose(gx[0], -2 / 6 * w + 2 / 9 * u, rtol=1e-5)  # pulled by (9, 9), pushed by (5, 5)
    assert torch.isfinite(gy).all()


@pytest.mark.parametrize("method", ["tiled", "plain"])
def test_identical_sets_have_distance_zero_and_collapsed_sets_gradient_zero(method):
    x = torch.tensor(case()[0], dtype=torch.float32)
    assert abs(value_and_gradients(x, x, method=method)[0]) < 1e-6
    value, gx, gy = value_and_gradients(torch.full((5, 3), 0.1), torch.full((7, 3), 0.1), method=method)
    assert value == 0
    assert not gx.any()
    assert not gy.any()


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("d", [1, 2, 31])
def test_float32_holds_far_from_the_origin(estimator, offset, d):
    rng = np.random.default_rng(5)
    x = torch.tensor(offset + rng.standard_normal((701, d)), dtype=torch.float32)
    y = torch.tensor(offset + 0.5 + 1.2 * rng.standard_normal((587, d)), dtype=torch.float32)
    value, *gradients = value_and_gradients(x, y, estimator=estimator)
    want, *want_gradients = value_and_gradients(x.double(), y.double(), estimator=estimator, method="plain")
    assert abs(value - want) <= 1e-5 * want.abs()
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_float32_holds_for_tight_clusters_far_apart():
    rng = np.random.default_rng(6)
    centres = 1e3 * rng.standard_normal((5, 7))
    x = torch.tensor(np.repeat(centres, 23, 0) + 1e-2 * rng.standard_normal((115, 7)), dtype=torch.float32)
    y = torch.tensor(np.repeat(centres + 1, 19, 0) + 1e-2 * rng.standard_normal((95, 7)), dtype=torch.float32)
    value, *gradients = value_and_gradients(x, y, tile=32)
    want, *want_gradients = value_and_gradients(x.double(), y.double(), method="plain")
    assert abs(value - want) <= 1e-7 * 3 * np.linalg.norm(centres, axis=1).mean()  # three means of far distances cancel
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_v_statistic_is_never_negative_and_u_statistic_is_unbiased():
    rng = np.random.default_rng(7)
    draws = torch.tensor(rng.standard_normal((401, 2, 5, 3)))
    v = [energy_distance(x, y) for x, y in draws]
    u = torch.stack([energy_distance(x, y, estimator="u") for x, y in draws])
    assert min(v) > 0
    assert abs(u.mean()) < 4 * u.std() / math.sqrt(401)
    assert u.min() < 0


def test_memory_kept_for_the_backward_pass_grows_with_cells_not_pairs():
    kept = []
    x, y = (torch.zeros(n, 3).normal_(generator=torch.Generator().manual_seed(1)) for n in (1009, 997))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t)
    with hooks:
        energy_distance(x.requires_grad_(), y)
    assert sum(kept) <= 10 * (1009 + 997) * 3


def test_grouped_distances_are_those_of_each_group_without_its_padding():
    rng = np.random.default_rng(8)
    x, y = 50 + rng.standard_normal((3, 11, 5)), 50.3 + rng.standard_normal((3, 7, 5))
    wx, wy = np.ones((3, 11)), rng.uniform(0.1, 1, (3, 7))
    wx[0, 6:], wy[1, 5:] = 0, 0
    x[0, 6:], y[1, 5:] = 0, -1e4  # padding may hold anything finite
    for estimator in ("v", "u"):
        x_ = torch.tensor(x, requires_grad=True)
        weights = {"wx": torch.tensor(wx), "wy": torch.tensor(wy)}
        got = energy_distance_grouped(x_, torch.tensor(y), **weights, estimator=estimator)
        for p in range(3):
            keep_x, keep_y = wx[p] > 0, wy[p] > 0
            want = loops(x[p][keep_x], y[p][keep_y], wx[p][keep_x], wy[p][keep_y], estimator)
            np.testing.assert_allclose(got[p].item(), want, rtol=1e-10)
        (grad,) = torch.autograd.grad(got.sum(), x_)
        assert not grad[0, 6:].any()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("side", ["wx", "wy"])
@pytest.mark.parametrize("estimator", ["v", "u"])
def test_a_group_without_weight_has_distance_and_gradient_exactly_zero(power, side, estimator):
    rng = np.random.default_rng(9)
    x, y = (torch.tensor(rng.standard_normal((2, n, 3)), requires_grad=True) for n in (5, 7))
    weights = {"wx": torch.ones(2, 5).double(), "wy": torch.ones(2, 7).double()}
    weights[side][1] = 0
    got = energy_distance_grouped(x, y, **weights, power=power, estimator=estimator)
    gx, gy = torch.autograd.grad(got.sum(), (x, y))
    assert got[0] != 0
    assert got[1] == 0
    assert gx[0].any()
    assert not gx[1].any()
    assert not gy[1].any()


def test_u_statistic_of_a_single_weighted_cell_has_no_own_term():
    x, y = torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[3.0], [4.0]]])
    got = energy_distance_grouped(x, y, wx=torch.tensor([[2.0, 0.0]]), wy=torch.ones(1, 2), estimator="u")
    np.testing.assert_allclose(got, [2 * 3.5 - 0 - 1], rtol=1e-6)


def sliced_by_loops(x, y, directions, estimator):
    d = x.shape[1]
    c = math.sqrt(math.pi) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    return c * np.mean([loops((x @ w)[:, None], (y @ w)[:, None], estimator=estimator) for w in directions])


@pytest.mark.parametrize("estimator", ["v", "u"])
def test_sliced_distance_is_the_mean_of_one_dimensional_ones(estimator):
    x, y, *_ = case(d=5)
    x[3], y[2] = x[4], x[5]  # ties within and between
    w = np.random.default_rng(2).standard_normal((13, 5))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, y)]
    got = sliced_energy_distance(*inputs, torch.tensor(w), estimator=estimator)
    np.testing.assert_allclose(got.item(), sliced_by_loops(x, y, w, estimator), rtol=1e-12)


def test_sliced_gradient_matches_differences_and_ties_have_slope_zero():
    x, y, *_ = case(d=5)
    w = np.random.default_rng(2).standard_normal((13, 5))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, y)]
    assert torch.autograd.gradcheck(
        lambda x, y: sliced_energy_distance(x, y, torch.tensor(w)), inputs, check_forward_ad=True
    )
    a, b = torch.tensor([[1.0], [1.0]], requires_grad=True), torch.tensor([[1.0], [2.0]])
    value = sliced_energy_distance(a, b, torch.tensor([[1.0]]))
    # against y = 1 and the twin x = 1 the slope is 0; y = 2 pulls with 2/4
    np.testing.assert_allclose(torch.autograd.grad(value, a)[0], [[-0.5], [-0.5]], rtol=1e-6)


def test_sliced_distance_estimates_the_energy_distance():
    x, y, *_ = (torch.tensor(a) for a in case(31, 29, 3))
    w = torch.tensor(np.random.default_rng(3).standard_normal((20_011, 3)))
    got = sliced_energy_distance(x, y, w / w.norm(dim=1, keepdim=True))
    np.testing.assert_allclose(got, energy_distance(x, y), rtol=2e-2)


def test_wrong_shapes_and_options_are_named():
    x, y = torch.zeros(5, 3), torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"shapes \(5, 3\) and \(7, 2\)"):
        energy_distance(x, y[:, :2])
    with pytest.raises(ValueError, match=r"wx has shape \(4,\)"):
        energy_distance(x, y, wx=torch.ones(4))
    with pytest.raises(ValueError, match="estimator is 'unbiased'"):
        energy_distance(x, y, estimator="unbiased")
    with pytest.raises(ValueError, match="power is 3"):
        energy_distance(x, y, power=3)
    with pytest.raises(ValueError, match="method is 'fast'"):
        energy_distance(x, y, method="fast")
    with pytest.raises(ValueError, match="1 cells are too few"):
        energy_distance(x[:1], y, estimator="u")
    with pytest.raises(ValueError, match=r"\(n_directions, 3\) was wanted"):
        sliced_energy_distance(x, y, torch.ones(2, 2))
