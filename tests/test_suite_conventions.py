"""Spin conventions: energies are the same in all of them, and nothing is guessed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmace_props.conventions import CONVENTIONS, ENERGY_UNITS, GPA, MJ_PER_M3, MMACE, SpinConvention
from mmace_props.errors import ConventionError

NAMES = sorted(CONVENTIONS)


def pair_energy(convention, term, tensor_or_vector, a, b, lengths):
    """Energy in eV of one pair of unit vectors, as a program with this convention computes it."""
    if not convention.normalised:
        a, b = a * lengths[0] / 2, b * lengths[1] / 2
    if term == "exchange":
        both = a @ tensor_or_vector @ b, b @ tensor_or_vector.T @ a
    else:
        both = tensor_or_vector @ np.cross(a, b), -tensor_or_vector @ np.cross(b, a)
    factor = getattr(convention, term) * ENERGY_UNITS[convention.unit]
    return factor * (sum(both) if convention.double_counting else both[0])


@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, 2**31))
def test_pair_energy_is_kept(source, target, seed):
    """A random tensor and a random D give the same energy of a random pair in both programs."""
    rng = np.random.default_rng(seed)
    a, b = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 3)))
    lengths = rng.uniform(0.5, 4, size=2)
    for term, shape in (("exchange", (3, 3)), ("dmi", (3,))):
        values = rng.normal(size=shape)
        old, new = CONVENTIONS[source], CONVENTIONS[target]
        converted = old.convert(values, new, term, moments=tuple(lengths))
        before = pair_energy(old, term, values, a, b, lengths)
        assert pair_energy(new, term, converted, a, b, lengths) == pytest.approx(before, rel=1e-12)
        np.testing.assert_allclose(new.convert(converted, old, term, moments=tuple(lengths)), values, rtol=1e-12)


def test_known_factors():
    """The factors of the programs, stated one by one: J of 1 meV between moments of 2 and 3 µB."""
    one = np.array(1.0)
    assert MMACE.convert(one, CONVENTIONS["vampire"]) == pytest.approx(2 * 1.602176634e-22, rel=1e-12, abs=0)
    assert MMACE.convert(one, CONVENTIONS["spirit"]) == pytest.approx(2.0, rel=1e-12)
    assert MMACE.convert(one, CONVENTIONS["uppasd"]) == pytest.approx(1 / 13.605693122990, rel=1e-9)
    assert MMACE.convert(one, CONVENTIONS["uppasd"], "dmi") == pytest.approx(-1 / 13.605693122990, rel=1e-9)
    assert MMACE.convert(one, CONVENTIONS["spinw"], moments=(2.0, 3.0)) == pytest.approx(-2 / 1.5, rel=1e-12)
    assert MMACE.convert(one, CONVENTIONS["tb2j"]) == pytest.approx(1.0, rel=1e-12)
    assert pytest.approx(160.2176634) == GPA
    assert pytest.approx(160217.6634) == MJ_PER_M3


def test_spinw_chain():
    """The ferromagnetic chain of SpinW's own tests, S = 1 and J = -1 meV a bond: 4 meV at the zone boundary."""
    moment, top = 2.0, 4.0
    # Magnons are (4/m)[J(0) - J(q)], here (4/m) 4 J at the zone boundary of a chain with neighbours at ±a.
    ours = top * moment / 16
    assert MMACE.convert(ours, CONVENTIONS["spinw"], moments=(moment, moment)) == pytest.approx(-1.0, rel=1e-12)


def test_undefined_is_an_error():
    """A missing field, a missing length, an unknown term or unit: never a guess."""
    open_ = SpinConvention("paper", exchange=-1.0, unit="meV", normalised=True)
    with pytest.raises(ConventionError, match="'paper' does not define 'double_counting'"):
        MMACE.convert(np.ones(2), open_)
    assert MMACE.convert(np.ones(2), open_.with_(double_counting=False))[0] == pytest.approx(2.0)
    with pytest.raises(ConventionError, match=r"give \|m_i\|"):
        MMACE.convert(np.ones(2), CONVENTIONS["spinw"])
    with pytest.raises(ConventionError, match="zero length"):
        MMACE.convert(np.ones(2), CONVENTIONS["spinw"], moments=(0.0, 1.0))
    with pytest.raises(ConventionError, match="does not define 'onsite'"):
        MMACE.convert(np.ones(2), CONVENTIONS["uppasd"], "onsite")
    with pytest.raises(ConventionError, match="no term 'biquadratic'"):
        MMACE.convert(np.ones(2), MMACE, "biquadratic")
    with pytest.raises(ConventionError, match="unknown energy unit"):
        MMACE.convert(np.ones(2), MMACE.with_(unit="kcal"))
