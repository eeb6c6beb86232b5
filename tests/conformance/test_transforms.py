"""One table for all transforms: what every reward transform must satisfy."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
from scipy import integrate

import infalign as ia

TRANSFORMS = [
    ia.Identity(),
    ia.Log(),
    ia.Exponential(10.0),
    ia.Exponential(-10.0),
    ia.Exponential(1e-7),
    ia.Exponential(0.0),
    ia.Exponential(700.0),
    ia.Exponential(-5000.0),
    ia.Tabulated([0.0, 0.5, 1.0], [0.0, 0.1, 1.0]),
    ia.Tabulated([0.0, 0.2, 1.0], [1.0, 2.0, 2.0], [3.0, 0.0, 0.0], name="with slopes"),
    ia.optimal_transform(ia.BestOfN(4), 0.1).transform,
    ia.optimal_transform(ia.WorstOfN(8), 0.02).transform,
]
every = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.label)


@every
def test_increases(transform):
    u = np.unique(
        np.concatenate([np.linspace(0, 1, 2001), np.geomspace(1e-12, 0.1, 200), 1 - np.geomspace(1e-12, 0.1)])
    )
    values = transform(u)
    assert values.dtype == np.float64
    assert not np.isnan(values).any()
    assert (np.diff(values[1:]) >= 0).all()
    assert values[1] >= values[0]


@every
def test_keeps_the_shape_of_its_argument(transform):
    for u in (0.25, [0.25, 0.5], np.full((2, 3, 4), 0.25), np.empty(0)):
        assert transform(u).shape == np.shape(u)


@every
@pytest.mark.parametrize("bad", [-1e-9, 1.1, np.nan, [0.5, np.nan], "half", 0.5j])
def test_refuses_values_outside_the_unit_interval(transform, bad):
    with pytest.raises(ia.InputError, match=r"outside|real numbers"):
        transform(bad)


@every
@pytest.mark.parametrize("beta", [3.0, 0.2, 0.01])
def test_log_partition_agrees_with_quadrature(transform, beta):
    top = float(transform(1.0))
    knots = np.unique(
        np.concatenate([np.linspace(0, 1, 41), 1 - np.geomspace(1e-5, 0.02, 12), np.geomspace(1e-5, 0.02, 12)])
    )
    total = 0.0
    for low, high in itertools.pairwise(knots):
        x, w = np.polynomial.legendre.leggauss(60)
        u = low + (high - low) * (x + 1) / 2
        total += float((w * np.exp((transform(u) - top) / beta)).sum() * (high - low) / 2)
    assert transform.log_partition(beta) == pytest.approx(top / beta + np.log(total), abs=2e-6)


@every
def test_log_partition_and_density_do_not_overflow(transform):
    tilt = ia.TiltedPolicy(transform, 1e-3)
    assert np.isfinite(tilt.log_partition)
    assert np.isfinite(tilt.kl)
    assert np.isfinite(tilt.density([0.0, 0.3, 1.0])).all()


@every
@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf, None, "0.1", [0.1]])
def test_refuses_a_beta_that_is_not_positive(transform, beta):
    with pytest.raises(ia.InputError, match="beta"):
        transform.log_partition(beta)
    with pytest.raises(ia.InputError, match="beta"):
        ia.TiltedPolicy(transform, beta)


@every
def test_survives_json_pickle_and_a_file(transform, tmp_path):
    u = np.linspace(0, 1, 101)
    path = tmp_path / "transform.json"
    transform.save(path, about={"beta": 0.1})
    for copy in (
        ia.transform_from_dict(json.loads(json.dumps(transform.to_dict()))),
        pickle.loads(pickle.dumps(transform)),
        ia.RewardTransform.load(path),
    ):
        assert copy == transform
        assert hash(copy) == hash(transform)
        assert copy.label == transform.label
        np.testing.assert_array_equal(copy(u), transform(u))


@every
def test_expectations_under_the_tilt_agree_with_quad(transform):
    tilt = ia.TiltedPolicy(transform, 0.5)
    points = [0.001, 0.01, 0.2, 0.5, 0.9, 0.99, 0.999]
    mean, _ = integrate.quad(lambda u: u * float(tilt.density(u)), 0, 1, points=points, epsabs=1e-11, limit=1000)
    assert tilt.win_rate(ia.Standard()) == pytest.approx(mean, abs=1e-8)
