"""Normal modes against closed forms: oscillators, spin waves, unstable forms."""

import numpy as np
import pytest
from mmace_props.bosons import normal_modes
from mmace_props.errors import PropertyError

PAIR = np.array([[0.0, 1.0], [-1.0, 0.0]])


def tilts(*moments):
    """The bracket of the tilts (x, y) of moments in µB, each about its own direction."""
    bracket = np.zeros((2 * len(moments), 2 * len(moments)))
    for k, m in enumerate(moments):
        bracket[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = -2 / m * PAIR
    return bracket


def paraunitary(modes, bracket, form):
    """Check norms, the equation of motion, and that modes of different frequency do not overlap."""
    metric = np.linalg.inv(1j * np.asarray(bracket))
    v = modes.vectors
    overlaps = v.conj().swapaxes(-1, -2) @ metric @ v
    np.testing.assert_allclose(overlaps, np.broadcast_to(np.eye(v.shape[-1]), overlaps.shape), atol=1e-9)
    np.testing.assert_allclose(1j * np.asarray(bracket) @ form @ v, v * modes.energies[..., None, :], atol=1e-9)


def test_coupled_oscillators():
    """Two masses between walls: ω² = k/m and (k + 2c)/m, energies ħω, ħ in the bracket."""
    k, c, mass, hbar = 2.0, 0.7, 3.0, 0.6582
    form = np.zeros((4, 4))
    form[:2, :2] = [[k + c, -c], [-c, k + c]]
    form[2:, 2:] = np.eye(2) / mass
    bracket = hbar * np.kron(PAIR, np.eye(2))
    modes = normal_modes(form, bracket)
    np.testing.assert_allclose(modes.energies, hbar * np.sqrt([k / mass, (k + 2 * c) / mass]), rtol=1e-12)
    np.testing.assert_array_equal(modes.growth, 0)
    assert modes.stable
    paraunitary(modes, bracket, form)


def test_ferromagnetic_chain():
    """ħω = (4/m) [J(0) - J(q)], and the moment turns counterclockwise about itself: y follows x by a quarter turn."""
    j, m = 1.3, 2.2
    q = np.linspace(0, 2 * np.pi, 9)
    gap = 2 * j * (1 - np.cos(q))
    # energy -Σ_{i≠j} J e_i·e_j expanded to second order in the tilts: ½ z†Hz with H = 2 [J(0) - J(q)]
    form = 2 * gap[:, None, None] * np.eye(2)
    modes = normal_modes(form, tilts(m))
    np.testing.assert_allclose(modes.energies[:, 0], 4 / m * gap, atol=1e-14)
    assert np.all(modes.stable)
    paraunitary(modes, tilts(m), form)
    # ħė = (2/m) e × ∂E/∂e turns x towards y: x = cos ωt, y = sin ωt are the real parts of (1, i) exp(-iωt)
    v = modes.vectors[3, :, 0]
    np.testing.assert_allclose(v[1] / v[0], 1j, atol=1e-12)


def test_complex_forms_tell_q_from_minus_q():
    """A Dzyaloshinskii-Moriya term i d adds to one sense of rotation: ħω = (2/m)(a ± d), the sign by the sense."""
    a, d, m = 1.0, 0.3, 2.0
    form = np.array([[[a, 1j * s * d], [-1j * s * d, a]] for s in (1, -1)])
    modes = normal_modes(form, tilts(m))
    # on (1, i) the form [[a, isd], [-isd, a]] gives a - s d
    np.testing.assert_allclose(modes.energies[:, 0], [2 / m * (a - d), 2 / m * (a + d)], rtol=1e-12)
    paraunitary(modes, tilts(m), form)


def test_antiferromagnet_with_anisotropy():
    """ħω = (2/m) sqrt(H_A (2 H_E + H_A)) at q = 0, twice, and the zero mode at H_A = 0."""
    m, exchange = 2.5, 0.08
    # sublattice B points down: its frame (x, y) -> (x, -y), so that x × y = e for both
    bracket = tilts(m, m)
    flip = np.diag([1.0, -1.0])
    for anisotropy in (0.002, 0.0):
        own = (exchange + anisotropy) * np.eye(2)
        form = np.block([[own, exchange * flip], [exchange * flip, own]])
        modes = normal_modes(form, bracket)
        expected = 2 / m * np.sqrt(anisotropy * (2 * exchange + anisotropy))
        np.testing.assert_allclose(modes.energies, expected, rtol=1e-10, atol=1e-12)
        assert modes.stable
        if anisotropy:
            paraunitary(modes, bracket, form)
    assert modes.lowest == pytest.approx(0.0, abs=1e-15)
    np.testing.assert_allclose(form @ modes.vectors, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(modes.vectors, axis=0), 1)


def test_rounding_of_a_zero_mode_is_no_gap():
    """Without care an error of 1e-15 in a form becomes sqrt(1e-15) in the frequency of an antiferromagnet."""
    flip = np.diag([1.0, -1.0])
    form = np.block([[np.eye(2), flip], [flip, np.eye(2)]])
    noise = np.random.default_rng(1).normal(size=(50, 4, 4)) * 1e-15
    modes = normal_modes(form + noise + noise.swapaxes(1, 2), tilts(2, 2))
    assert modes.energies.shape == (50, 2)
    np.testing.assert_allclose(modes.energies, 0, atol=1e-12)
    assert np.all(np.abs(modes.lowest) < 1e-14)
    assert np.any(modes.lowest != 0)


def test_rounding_is_measured_against_the_terms():
    """A ferromagnet's form at q = 0 is a difference of large terms and itself nothing but rounding."""
    modes = normal_modes(-3e-17 * np.eye(2), tilts(2.0), scale=0.1)
    assert modes.stable
    assert modes.energies == pytest.approx([0.0], abs=0)
    assert modes.lowest == pytest.approx(-3e-17)
    assert not normal_modes(-3e-17 * np.eye(2), tilts(2.0)).stable


def test_soft_oscillator_grows():
    """k < 0: ω² < 0 is no frequency but a rate, and a stable neighbour keeps its own."""
    form = np.diag([-2.0, 3.0, 1.0, 1.0])
    modes = normal_modes(form, np.kron(PAIR, np.eye(2)))
    np.testing.assert_allclose(modes.energies, [0, np.sqrt(3)], atol=1e-12)
    np.testing.assert_allclose(modes.growth, [np.sqrt(2), 0], atol=1e-12)
    assert not modes.stable
    assert modes.lowest == pytest.approx(-2.0)
    grown = 1j * np.kron(PAIR, np.eye(2)) @ form @ modes.vectors[:, 0]
    np.testing.assert_allclose(grown, 1j * np.sqrt(2) * modes.vectors[:, 0], atol=1e-12)


def test_reversed_moment_has_a_negative_frequency():
    """On top of a maximum the precession is reversed: no growth, but exciting it lowers the energy."""
    field, m = 0.4, 2.0
    modes = normal_modes(-field * np.eye(2), tilts(m))
    np.testing.assert_allclose(modes.energies, [-2 / m * field])
    np.testing.assert_array_equal(modes.growth, 0)
    assert not modes.stable
    # two of them at the same frequency, one up and one down, keep one positive and one negative
    both = normal_modes(np.diag([field, field, -field, -field]), tilts(m, m))
    np.testing.assert_allclose(both.energies, [-2 / m * field, 2 / m * field], rtol=1e-12)


def test_zero_modes_beside_an_unstable_one():
    """Free motion stays at zero to rounding where another mode of the same form grows."""
    form = np.diag([0.0, -1.0, 2.0, 1.0, 1.0, 1.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn = np.kron(np.eye(2), turn)
    modes = normal_modes(turn @ form @ turn.T, np.kron(PAIR, np.eye(3)))
    np.testing.assert_allclose(modes.energies, [0, 0, np.sqrt(2)], atol=1e-12)
    np.testing.assert_allclose(np.sort(modes.growth), [0, 0, 1], atol=1e-12)


def test_slow_mode_beside_an_unstable_one():
    """A restoring force that is no rounding, but a frequency below what an indefinite form resolves: energy zero."""
    slow = 1e-8
    form = np.diag([-1.0, slow, 1.0, slow])
    bracket = np.kron(PAIR, np.eye(2))
    modes = normal_modes(form, bracket, zero=1e-12)
    assert not modes.stable
    np.testing.assert_allclose(modes.growth.max(), 1.0, rtol=1e-9)
    np.testing.assert_allclose(modes.energies, 0, atol=2 * slow)
    assert np.isfinite(modes.vectors).all()
    k = int(modes.growth.argmin())
    assert np.abs(modes.vectors[[1, 3], k]).max() > 0.5


def test_random_forms_against_the_plain_eigenvalues():
    """Positive forms at many q: the positive eigenvalues of iΓH, whatever the bracket."""
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(2, 5, 6, 6)) + 1j * rng.normal(size=(2, 5, 6, 6))
    form = raw @ raw.conj().swapaxes(-1, -2) + 0.1 * np.eye(6)
    bracket = rng.normal(size=(6, 6))
    bracket = bracket - bracket.T
    modes = normal_modes(form, bracket)
    plain = np.sort(np.linalg.eigvals(1j * bracket @ form).real, axis=-1)[..., 3:]
    np.testing.assert_allclose(modes.energies, plain, rtol=1e-9)
    np.testing.assert_allclose(modes.lowest, np.linalg.eigvalsh(form)[..., 0])
    paraunitary(modes, bracket, form)


def test_refusals():
    """What is no quadratic form, or no bracket."""
    with pytest.raises(PropertyError, match="do not fit"):
        normal_modes(np.eye(4), PAIR)
    with pytest.raises(PropertyError, match="not Hermitian"):
        normal_modes([[1.0, 0.5], [0.0, 1.0]], PAIR)
    with pytest.raises(PropertyError, match="bracket"):
        normal_modes(np.eye(2), np.ones((2, 2)))
    with pytest.raises(PropertyError, match="not finite"):
        normal_modes([[np.nan, 0.0], [0.0, 1.0]], PAIR)
