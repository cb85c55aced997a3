"""audit_omitted_mass: exact over all rows, an interval that holds over a sample of them."""

from __future__ import annotations

import functools
import math

import condensate_ext
import pytest
import torch
from condensate_ext import audit_omitted_mass, omitted_mass
from condensate_ext.audit import mean_interval

from tests.testkit import oracle
from tests.testkit.cases import Case

ROWS = 300


def make_call(device: str, **changes: object):
    """query, key and the log-sum-exp of attention over lists of the caller."""
    options = {"batch": 2, "kv_heads": 2, "group": 2, "query_len": ROWS, "kv_len": 700}
    case = Case(device, **{**options, **changes})  # type: ignore[arg-type]
    query, key, value = case.tensors()
    _, lse = condensate_ext.block_sparse_attention(
        query, key, value, *case.lists(), **case.attention_args
    )
    return query, key, lse


def seeded(device: str, number: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(number)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_len, kv_len", [(ROWS, 700), (130, 70), (1, 5)])
def test_all_rows_are_the_definition(device, causal, query_len, kv_len):
    """130 queries of 70 keys: the first 60 see none when causal, and count as 0."""
    call = make_call(device, causal=causal, query_len=query_len, kv_len=kv_len)
    options = {"causal": causal, "scale": 0.2}
    found = audit_omitted_mass(*call, **options)
    assert torch.equal(found.rows, torch.arange(query_len, device=device))
    assert torch.equal(found.omitted_mass, omitted_mass(*call, **options))
    visible = Case(
        device, query_len=query_len, kv_len=kv_len, window=0, anchors=0, causal=causal
    ).ranges.visible()
    expected = oracle.omitted_mass(*call, visible, scale=0.2)
    torch.testing.assert_close(found.omitted_mass.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mean, expected.mean(-1), atol=1e-5, rtol=0)
    assert found.mean.dtype == torch.float64
    assert torch.equal(found.lower, found.mean) and torch.equal(found.upper, found.mean)
    assert query_len == 1 or found.mean.max() > 0.05


def test_a_sample_of_every_row_is_exact(device):
    call = make_call(device)
    found, exact = audit_omitted_mass(*call, sample=ROWS), audit_omitted_mass(*call)
    for name in ("rows", "omitted_mass", "mean", "lower", "upper"):
        assert torch.equal(getattr(found, name), getattr(exact, name))


def test_samples_hold_the_mean_of_all_rows(device):
    query, key, lse = call = make_call(device)
    every = omitted_mass(query, key, lse)
    mean = every.double().mean(-1)
    assert mean.max() - mean.min() > 0.01
    for number in range(40):
        found = audit_omitted_mass(*call, sample=100, generator=seeded(device, number))
        assert found.rows.shape == (100,) and found.rows.dtype == torch.int64
        assert (found.rows.diff() > 0).all() and 0 <= found.rows[0] <= found.rows[-1] < ROWS
        assert torch.equal(found.omitted_mass, every[..., found.rows])
        torch.testing.assert_close(found.mean, found.omitted_mass.double().mean(-1))
        assert ((found.lower <= mean) & (mean <= found.upper)).all()
        assert (found.upper - found.lower < 0.3).all()


def test_every_row_is_drawn_as_often_and_by_the_generator_alone(device):
    query, key, lse = make_call(device, query_len=40, kv_len=40, batch=1, kv_heads=1, group=1)

    def draw(generator):
        return audit_omitted_mass(query, key, lse, sample=10, generator=generator).rows

    generator = seeded(device)
    drawn = [draw(generator) for _ in range(400)]
    assert torch.equal(drawn[0], draw(seeded(device)))
    assert not torch.equal(drawn[0], drawn[1])
    counts = torch.cat(drawn).bincount(minlength=40)
    assert ((counts - 100).abs() < 5 * math.sqrt(400 * 0.25 * 0.75)).all()


def test_no_queries(device):
    found = audit_omitted_mass(*make_call(device, query_len=0))
    assert found.rows.shape == (0,) and found.omitted_mass.shape == (2, 4, 0)
    assert found.mean.shape == (2, 4) and found.mean.isnan().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sample": 1}, r"sample is 1, expected 2 <= sample <= 300, .* pass None to audit all"),
        ({"sample": -3}, r"sample is -3, expected 2 <= sample <= 300"),
        ({"sample": 301}, r"sample is 301, expected 2 <= sample <= 300"),
        ({"confidence": 0.0}, r"confidence is 0.0, expected a probability between 0 and 1, .*0.95"),
        ({"confidence": 1.0}, r"confidence is 1.0, expected"),
        ({"confidence": 95}, r"confidence is 95, expected"),
        ({"confidence": float("nan")}, r"confidence is nan, expected"),
    ],
)
def test_what_is_refused(device, arguments, message):
    with pytest.raises(ValueError, match=f"audit_omitted_mass: {message}"):
        audit_omitted_mass(*make_call(device), **arguments)


def test_far_field_bounds_the_omitted_mass_from_below(device):
    """What docs/ablations.md says of the two log-sum-exps."""
    case = Case(device, query_len=200, kv_len=2000, topk=256, causal=True)
    query, key, value = case.tensors()
    key = key + key[:, :, ::64].repeat_interleave(64, 2)[:, :, :2000]  # blocks that differ
    call = (query, key, value, *case.lists())
    lse = condensate_ext.block_sparse_attention(*call, **case.range_args, far_field=False)[1]
    far = condensate_ext.block_sparse_attention(*call, **case.range_args)[1]
    bound, omitted = 1 - (lse - far).exp(), omitted_mass(query, key, lse)
    assert (bound <= omitted + 1e-5).all()
    assert bound.mean() > 0.5 * omitted.mean() > 0.05


# The interval by itself.

DRAWS = 400
POPULATION = 5000


def population(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(POPULATION, generator=generator, dtype=torch.float64)
    return {
        "rare ones": (uniform < 0.02).double(),
        "coins": (uniform < 0.5).double(),
        "uniform": uniform,
        "near zero": uniform**8,
        "near one": 1 - uniform**8,
        "constant": torch.full_like(uniform, 0.3),
    }[name]


@functools.cache
def orders() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(DRAWS, POPULATION, generator=generator).argsort(-1)


def draws(name: str, n: int) -> torch.Tensor:
    """``[DRAWS, n]``, each row drawn without replacement."""
    return population(name)[orders()[:, :n]]


def coverage(name: str, n: int, confidence: float, shrink: float = 1.0) -> float:
    mean, low, high = mean_interval(draws(name, n), POPULATION, confidence)
    low, high = mean - shrink * (mean - low), mean + shrink * (high - mean)
    true = population(name).mean()
    return ((low <= true + 1e-12) & (true - 1e-12 <= high)).double().mean().item()


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [2, 20, 200, 2400, 4000, 4990])
@pytest.mark.parametrize(
    "name", ["rare ones", "coins", "uniform", "near zero", "near one", "constant"]
)
def test_coverage_is_at_least_the_confidence(name, n, confidence):
    assert coverage(name, n, confidence) >= confidence


@pytest.mark.parametrize("n", [20, 200, 4000])
def test_coverage_would_show_an_interval_that_is_too_narrow(n):
    assert coverage("coins", n, 0.95, shrink=0.35) < 0.9


def by_formula(values: torch.Tensor, n: int, confidence: float) -> tuple[float, float]:
    """Both half widths, as Bardenet and Maillard write them (range 1, sampled fraction f)."""
    f = n / POPULATION
    rho = 1 - (n - 1) / POPULATION if n <= POPULATION / 2 else (1 - f) * (1 + 1 / n)
    one_sided = (1 - confidence) / 2 / 2  # half the risk to either inequality, half to a side
    deviation = math.sqrt(((values - values.mean()) ** 2).sum() / n)
    hoeffding = math.sqrt(rho * math.log(1 / one_sided) / (2 * n))
    risk = math.log(5 / one_sided)  # theorem 4.3 holds with probability 1 - 5 delta
    kappa = 7 / 3 + 3 / math.sqrt(2)
    return hoeffding, deviation * math.sqrt(2 * rho * risk / n) + kappa * risk / n


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(
    "name, n, better",
    [("coins", 100, 0), ("uniform", 4500, 0), ("rare ones", 2400, 1), ("constant", 4000, 1)],
)
def test_half_width_is_the_smaller_of_both_formulas(name, n, better, confidence):
    values = draws(name, n)[0]
    both = by_formula(values, n, confidence)
    assert min(both) == both[better]
    mean, low, high = (t.item() for t in mean_interval(values, POPULATION, confidence))
    assert mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert low == pytest.approx(max(0, mean - both[better]), abs=1e-12)
    assert high == pytest.approx(min(1, mean + both[better]), abs=1e-12)


def test_interval_stays_within_shares():
    for values, inside in ((torch.zeros(5), 0.0), (torch.ones(5), 1.0)):
        mean, low, high = mean_interval(values, POPULATION, 0.95)
        assert (mean, min(low, 1 - high)) == (inside, 0)
        assert 0 <= low < high <= 1
