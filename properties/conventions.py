"""Units, and the conventions of spin Hamiltonians with their conversions."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from .errors import ConventionError

Array = NDArray[np.float64]

MEV = 1e-3
MICRO_EV = 1e-6
EV_IN_JOULE = constants.value("electron volt-joule relationship")
RYDBERG = constants.value("Rydberg constant times hc in eV")
BOLTZMANN = constants.value("Boltzmann constant in eV/K")
HBAR = constants.value("reduced Planck constant in eV s")
G_FACTOR = 2.0
GPA = EV_IN_JOULE * 1e21
"""GPa in one eV/Å³."""
MJ_PER_M3 = EV_IN_JOULE * 1e24
"""MJ/m³ in one eV/Å³."""

ENERGY_UNITS: dict[str, float] = {
    "eV": 1.0,
    "meV": MEV,
    "mRy": RYDBERG * 1e-3,
    "J": 1.0 / EV_IN_JOULE,
}
"""Energy units in eV (CODATA values of scipy.constants)."""

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""Cartesian pairs of the Voigt components xx, yy, zz, yz, xz, xy."""


@dataclass(frozen=True)
class SpinConvention:
    """How a program writes a spin Hamiltonian, with conversions between two of them.

    ``E = exchange Σ S_i·J_ij·S_j + dmi Σ D_ij·(S_i×S_j) + onsite Σ S_i·A_i·S_i``. A field that is None
    is not defined, and a conversion that needs it raises: nothing is guessed.

    Parameters
    ----------
    name : the program or paper.
    exchange : factor of the exchange sum.
    dmi : factor of the Dzyaloshinskii-Moriya sum.
    onsite : factor of the single-ion sum.
    double_counting : True where both ij and ji are in the pair sums.
    normalised : True where S is a unit vector, False where S = m / (g µB) with g = 2.
    unit : energy unit of the parameters, a key of `ENERGY_UNITS`.
    """

    name: str
    exchange: float | None = None
    dmi: float | None = None
    onsite: float | None = None
    double_counting: bool | None = None
    normalised: bool | None = None
    unit: str | None = None

    def _required(self, field: str) -> float | bool | str:
        value = getattr(self, field)
        if value is None:
            raise ConventionError(f"the convention '{self.name}' does not define '{field}'; set it before converting")
        return value

    def _energy_per_parameter(self, term: str) -> float:
        """Energy in eV of one pair (or site) with unit parameter and unit S."""
        unit = str(self._required("unit"))
        if unit not in ENERGY_UNITS:
            raise ConventionError(f"the convention '{self.name}' has the unknown energy unit '{unit}'")
        factor = float(self._required(term)) * ENERGY_UNITS[unit]
        if term != "onsite" and self._required("double_counting"):
            factor *= 2.0
        return factor

    def convert(
        self,
        values: Array,
        to: "SpinConvention",
        term: str = "exchange",
        moments: tuple[Array | float, Array | float] | None = None,
    ) -> Array:
        """Rewrite parameters for another convention, the energy of every state unchanged.

        Parameters
        ----------
        values : parameters in this convention's unit, any shape.
        to : the convention to write them in.
        term : ``"exchange"``, ``"dmi"`` or ``"onsite"``.
        moments : |m_i| and |m_j| in µB, broadcastable to `values`; needed where one convention has unit
            vectors and the other has not.

        Returns
        -------
        Parameters in the unit of `to`, same shape.

        Raises
        ------
        ConventionError : where a field that the conversion needs is undefined.
        """
        if term not in ("exchange", "dmi", "onsite"):
            raise ConventionError(f"a spin Hamiltonian has no term '{term}'; known: exchange, dmi, onsite")
        scale = self._energy_per_parameter(term) / to._energy_per_parameter(term)
        result = np.asarray(values, dtype=float) * scale
        mine, theirs = bool(self._required("normalised")), bool(to._required("normalised"))
        if mine != theirs:
            if moments is None:
                raise ConventionError(
                    f"converting from '{self.name}' to '{to.name}' changes the length of the spins; "
                    "give |m_i| and |m_j|"
                )
            spins = np.asarray(moments[0], dtype=float) * np.asarray(moments[1], dtype=float) / G_FACTOR**2
            if np.any(spins <= 0.0):
                raise ConventionError("spins of zero length have no exchange parameters; leave those sites out")
            result = result / spins if mine else result * spins
        return result

    def with_(self, **changes: object) -> "SpinConvention":
        """Return the same convention with some fields set."""
        return replace(self, **changes)  # type: ignore[arg-type]


MMACE = SpinConvention("mmace", -1.0, -1.0, -1.0, True, True, "meV")
"""``E = -Σ_{i≠j} e_i·J_ij·e_j - Σ_i e_i·A_i·e_i``, unit vectors, meV: the convention of every dataset."""

CONVENTIONS: dict[str, SpinConvention] = {
    c.name: c
    for c in (
        MMACE,
        SpinConvention("tb2j", -1.0, -1.0, -1.0, True, True, "meV"),
        SpinConvention("vampire", -0.5, -0.5, -1.0, True, True, "J"),
        SpinConvention("spirit", -1.0, -1.0, -1.0, False, True, "meV"),
        SpinConvention("uppasd", -1.0, 1.0, None, True, True, "mRy"),
        SpinConvention("spinw", 1.0, 1.0, 1.0, False, False, "meV"),
    )
}
"""Conventions of the programs that results are written for."""

HAMILTONIAN = "E = -sum_{i!=j} e_i.J_ij.e_j, unit vectors, both ij and ji in the sum, J > 0 ferromagnetic, meV"
