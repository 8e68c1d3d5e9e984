"""Spin-lattice Hamiltonians with closed forms, as ASE calculators of the suite's protocol.

A toy is a sum of terms, each a torch function of positions, cell and moments, so that every derivative is exact.
`Toy` is a bare ASE calculator; `CapableToy` adds the optional capabilities of the protocol.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from matscipy.neighbours import neighbour_list

F64 = torch.float64
KAPPA = 160.21766208


def as_tensor(x):
    return torch.tensor(np.asarray(x), dtype=F64)


def unit(v):
    return v / torch.linalg.norm(v, dim=-1, keepdim=True)


@dataclass
class System:
    """Positions (N, 3), cell (3, 3), moments (B, N, 3), numbers, and neighbour pairs within a cut-off."""

    positions: torch.Tensor
    cell: torch.Tensor
    moments: torch.Tensor
    numbers: np.ndarray
    fixed_cell: np.ndarray
    fixed_positions: np.ndarray
    waves: torch.Tensor | None = None
    axis: torch.Tensor | None = None

    def neighbours(self, j, shift):
        """Moments (B, P, 3) of the neighbours, turned by 2π q·S about the axis where there is a spiral."""
        m = self.moments[:, j]
        if self.waves is None:
            return m
        angle = 2 * np.pi * (self.waves @ as_tensor(shift).T)[..., None]
        along = (m @ self.axis)[..., None] * self.axis
        across = torch.linalg.cross(self.axis.expand_as(m), m)
        return along + torch.cos(angle) * (m - along) + torch.sin(angle) * across

    def pairs(self, cutoff):
        i, j, shift = neighbour_list(
            "ijS", positions=self.fixed_positions, cell=self.fixed_cell, pbc=[True] * 3, cutoff=float(cutoff)
        )
        r = self.positions[j] + as_tensor(shift) @ self.cell - self.positions[i]
        return torch.as_tensor(i), torch.as_tensor(j), r, shift

    def magnetic(self):
        """Mask of sites that carry a moment, shape (N,)."""
        return (torch.linalg.norm(self.moments.detach(), dim=-1) > 1e-9).any(dim=0)

    def volume(self):
        return torch.abs(torch.linalg.det(self.cell))


def scatter(values, index, n):
    """Sum (B, P) over pairs into sites (B, n)."""
    return torch.zeros(values.shape[0], n, dtype=F64).index_add(1, index, values)


@dataclass
class Heisenberg:
    """``-Σ_{i≠j} J(r) m_i·m_j`` with ``J(r) = J exp(-decay (r - r0))`` inside the cut-off."""

    J: float
    cutoff: float
    decay: float = 0.0
    r0: float = 2.5
    soc = False

    def sites(self, s):
        i, j, r, shift = s.pairs(self.cutoff)
        strength = self.J * torch.exp(-self.decay * (torch.linalg.norm(r, dim=1) - self.r0))
        return scatter(-strength * (s.moments[:, i] * s.neighbours(j, shift)).sum(-1), i, len(s.positions))


@dataclass
class PseudoDipolar:
    """``-Σ_{i≠j} D exp(-decay (r - r0)) (m_i·r̂)(m_j·r̂)``, the two-ion anisotropy."""

    D: float
    cutoff: float
    decay: float = 1.0
    r0: float = 2.5
    soc = True

    def sites(self, s):
        i, j, r, _ = s.pairs(self.cutoff)
        d = torch.linalg.norm(r, dim=1)
        e = r / d[:, None]
        strength = self.D * torch.exp(-self.decay * (d - self.r0))
        return scatter(-strength * (s.moments[:, i] * e).sum(-1) * (s.moments[:, j] * e).sum(-1), i, len(s.positions))


@dataclass
class Biquadratic:
    """``-Σ_{i≠j} B (e_i·e_j)²`` inside the cut-off, e unit vectors."""

    B: float
    cutoff: float
    soc = False

    def sites(self, s):
        i, j, _, shift = s.pairs(self.cutoff)
        cosine = (unit(s.moments[:, i]) * unit(s.neighbours(j, shift))).sum(-1)
        return scatter(-self.B * cosine**2, i, len(s.positions))


@dataclass
class DMI:
    """``-Σ_{i≠j} D r̂_ij·(m_i×m_j)``, the interaction of a chiral cubic magnet."""

    D: float
    cutoff: float
    soc = True

    def sites(self, s):
        i, j, r, _ = s.pairs(self.cutoff)
        cross = torch.linalg.cross(s.moments[:, i], s.moments[:, j])
        return scatter(-self.D * (cross * unit(r)).sum(-1), i, len(s.positions))


@dataclass
class Uniaxial:
    """``Σ_i K1 sin²θ + K2 sin⁴θ + K3 sin⁶θ (+ in-plane)`` about the third cell vector, for chosen atomic numbers."""

    K1: float
    K2: float = 0.0
    K3: float = 0.0
    K4phi: float = 0.0
    K6phi: float = 0.0
    numbers: tuple = ()
    soc = True

    def sites(self, s):
        c = unit(s.cell[2])
        a = unit(s.cell[0])
        b = torch.linalg.cross(c, a)
        safe = torch.where(s.magnetic()[:, None], s.moments, torch.ones(3, dtype=F64))
        e = unit(safe)
        x, y = (e * a).sum(-1), (e * b).sum(-1)
        sin2 = x**2 + y**2
        value = self.K1 * sin2 + self.K2 * sin2**2 + self.K3 * sin2**3
        value = value + self.K4phi * (x**4 - 6 * x**2 * y**2 + y**4)
        value = value + self.K6phi * (x**6 - 15 * x**4 * y**2 + 15 * x**2 * y**4 - y**6)
        chosen = torch.as_tensor(np.isin(s.numbers, self.numbers) if self.numbers else np.ones(len(s.numbers), bool))
        return value * (chosen & s.magnetic())


@dataclass
class Cubic:
    """``Σ_i K1 (α1²α2² + …) + K2 α1²α2²α3²`` with α along the cell vectors, made orthogonal in their order."""

    K1: float
    K2: float = 0.0
    soc = True

    def sites(self, s):
        x = unit(s.cell[0])
        y = unit(s.cell[1] - (s.cell[1] @ x) * x)
        e = unit(s.moments) @ torch.stack([x, y, torch.linalg.cross(x, y)]).T
        a, b, c = (e**2).unbind(-1)
        return self.K1 * (a * b + b * c + c * a) + self.K2 * a * b * c


@dataclass
class Orthorhombic:
    """``Σ_i A x² + B y²`` with x, y along the first two (orthogonal) cell vectors."""

    A: float
    B: float
    soc = True

    def sites(self, s):
        e = unit(s.moments) @ unit(s.cell).T
        return self.A * e[..., 0] ** 2 + self.B * e[..., 1] ** 2


@dataclass
class Landau:
    """``Σ_i -a m² + b m⁴`` with the minimum of every lone moment at ``sqrt(a / 2b)``."""

    a: float
    b: float
    numbers: tuple = ()
    soc = False

    def sites(self, s):
        m2 = (s.moments**2).sum(-1)
        chosen = torch.as_tensor(np.isin(s.numbers, self.numbers) if self.numbers else np.ones(len(s.numbers), bool))
        return torch.where(chosen, -self.a * m2 + self.b * m2**2, 0.5 * m2)


@dataclass
class Zeeman:
    """``-Σ_i B m_z``."""

    B: float
    soc = True

    def sites(self, s):
        return -self.B * s.moments[..., 2]


@dataclass
class Tether:
    """``Σ_i k/2 |u_i|² - g_i u_x m_z²`` with u the displacement from a home and g alternating in sign."""

    home: np.ndarray
    k: float
    g: float = 0.0
    soc = False

    def sites(self, s):
        u = s.positions - as_tensor(self.home)
        signs = torch.tensor([1.0, -1.0], dtype=F64).repeat(len(self.home))[: len(self.home)]
        return self.k / 2 * (u**2).sum(-1) - self.g * signs * u[:, 0] * s.moments[..., 2] ** 2


@dataclass
class AnisotropicLength:
    """``Σ_i g (|m|² - m0²) sin²θ`` about the third cell vector: the anisotropy changes with |m|."""

    g: float
    m0: float
    soc = True

    def sites(self, s):
        c = unit(s.cell[2])
        m2 = (s.moments**2).sum(-1)
        along = (s.moments * c).sum(-1)
        return self.g * (m2 - self.m0**2) * (1 - along**2 / m2)


@dataclass
class Magnetoelastic:
    """Cubic elasticity and magnetoelastic coupling per volume of a reference cell (eV/Å³)

    The strain is that from the reference cell, which the crystal must not be turned against.
    """

    reference: np.ndarray
    C11: float
    C12: float
    C44: float
    B1: float
    B2: float
    soc = True

    def sites(self, s):
        ref = as_tensor(self.reference)
        deformation = torch.linalg.inv(ref) @ s.cell
        strain = (deformation + deformation.T) / 2 - torch.eye(3, dtype=F64)
        volume = torch.abs(torch.linalg.det(ref))
        axes = unit(ref)
        strain = axes @ strain @ axes.T
        e = unit(s.moments) @ axes.T
        d, o = torch.diagonal(strain), torch.stack([strain[1, 2], strain[0, 2], strain[0, 1]])
        elastic = (
            0.5 * self.C11 * (d**2).sum()
            + self.C12 * (d[0] * d[1] + d[1] * d[2] + d[0] * d[2])
            + 2 * self.C44 * (o**2).sum()
        )
        products = torch.stack([e[..., 1] * e[..., 2], e[..., 0] * e[..., 2], e[..., 0] * e[..., 1]], dim=-1)
        coupling = self.B1 * (e**2 * d).sum(-1) + 2 * self.B2 * (products * o).sum(-1)
        return volume * (elastic + coupling) / len(s.positions)


def birch_murnaghan(v, e0, v0, b0, b1):
    """Birch-Murnaghan energy, eV, Å³ and eV/Å³."""
    x = (v0 / v) ** (2 / 3)
    return e0 + 9 * v0 * b0 / 16 * ((x - 1) ** 3 * b1 + (x - 1) ** 2 * (6 - 4 * x))


def vinet(v, e0, v0, b0, b1):
    """Vinet energy, eV, Å³ and eV/Å³."""
    eta = (v / v0) ** (1 / 3)
    k = 1.5 * (b1 - 1)
    exp = torch.exp if isinstance(v, torch.Tensor) else np.exp
    return e0 + 9 * b0 * v0 / k**2 * (1 - (1 - k * (1 - eta)) * exp(k * (1 - eta)))


@dataclass
class MagneticEquationOfState:
    """Energy per atom on the exact curve of the order, each with its own parameters and |m|.

    ``nm`` + depth(V) f(|m|, order): the ferromagnet's and antiferromagnet's minimum over |m| lies on the curves
    given, at ``|m| = m0 + slope (V - v0)``.
    """

    curves: dict
    m0: float = 2.2
    slope: float = 0.1
    v0: float = 11.0
    form: object = staticmethod(birch_murnaghan)
    soc = False

    def moment(self, volume):
        return self.m0 + self.slope * (volume - self.v0)

    def sites(self, s):
        n = len(s.positions)
        v = s.volume() / n
        m = self.moment(v)
        nm, fm, afm = (self.form(v, *self.curves[k]) for k in ("nm", "fm", "afm"))
        u = s.moments / m
        square = (u**2).sum(-1)
        shape = 2 * square - square**2
        mean = u.mean(dim=1)
        order = (mean**2).sum(-1, keepdim=True)
        share = torch.where(
            square.mean(1, keepdim=True) > 0, order / square.mean(1, keepdim=True).clamp(min=1e-12), 0.0
        )
        return nm + shape * ((fm - nm) * share + (afm - nm) * (1 - share))


@dataclass
class Springs:
    """``½ Σ_{i≠j} k/2 (|r_ij| - r0)²`` inside the cut-off, without moments."""

    k: float
    r0: float
    cutoff: float
    soc = False

    def sites(self, s):
        i, _, r, _ = s.pairs(self.cutoff)
        energy = self.k / 4 * (torch.linalg.norm(r, dim=1) - self.r0) ** 2
        return scatter(energy.expand(s.moments.shape[0], -1), i, len(s.positions))


@dataclass
class Hole:
    """``-½ Σ_{i≠j} depth exp(-(|r_ij| - r0)²/width²)``: the false well of a potential that saw no such distances."""

    depth: float
    r0: float
    width: float
    soc = False

    def sites(self, s):
        i, _, r, _ = s.pairs(self.r0 + 4 * self.width)
        energy = -self.depth / 2 * torch.exp(-(((torch.linalg.norm(r, dim=1) - self.r0) / self.width) ** 2))
        return scatter(energy.expand(s.moments.shape[0], -1), i, len(s.positions))


@dataclass
class Options:
    """Everything that makes a toy, so that a copy with options changed can be made."""

    terms: list
    soc: bool = True
    moments: str = "fixed"
    elements: tuple | None = ("Fe", "Al", "Cr", "N")
    default_moments: dict | None = field(default_factory=lambda: {"Fe": 2.2, "Al": 0.0, "Cr": 2.8, "N": 0.0})
    name: str = "toy"


class Toy(Calculator):
    """The sum of terms as a bare ASE calculator: no optional capability."""

    implemented_properties = ("energy", "energies", "forces", "stress", "magnetic_forces")

    def __init__(self, *terms, gives=None, **options):
        super().__init__()
        self.options = Options(list(terms), **options)
        if gives is not None:
            self.implemented_properties = tuple(gives)

    def evaluate(self, atoms, moments, waves=None, axis=None):
        """Return site energies (B, N) and the leaves they were computed from."""
        positions, cell = as_tensor(atoms.positions), as_tensor(atoms.cell[:])
        strain = torch.zeros(3, 3, dtype=F64, requires_grad=True)
        positions = positions.clone().requires_grad_()
        m = as_tensor(moments).clone().requires_grad_()
        deform = torch.eye(3, dtype=F64) + strain
        fixed = (atoms.numbers, atoms.cell[:], atoms.positions)
        system = System(positions @ deform.T, cell @ deform.T, m, *fixed, waves, axis)
        sites = torch.zeros(m.shape[0], len(atoms), dtype=F64)
        for term in self.options.terms:
            if self.options.soc or not term.soc:
                sites = sites + term.sites(system)
        return sites, positions, strain, m

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.options.elements is not None:
            for symbol in atoms.get_chemical_symbols():
                if symbol not in self.options.elements:
                    raise ValueError(f"the model does not know {symbol}")
        moments = atoms.get_initial_magnetic_moments()
        if moments.ndim == 1:
            moments = moments[:, None] * np.array([0.0, 0.0, 1.0])
        sites, positions, strain, m = self.evaluate(atoms, moments[None])
        energy = sites.sum()
        grads = torch.autograd.grad(energy, [positions, strain, m], allow_unused=True, materialize_grads=True)
        stress = (grads[1] + grads[1].T).numpy() / 2 / atoms.get_volume()
        found = {
            "energy": energy.item(),
            "energies": sites[0].detach().numpy(),
            "forces": -grads[0].numpy(),
            "stress": stress.ravel()[[0, 4, 8, 5, 2, 1]],
            "magnetic_forces": -grads[2][0].numpy(),
        }
        self.results = {k: v for k, v in found.items() if k in self.implemented_properties}

    def get_property(self, name, atoms=None, allow_calculation=True):
        if name not in self.implemented_properties:
            raise PropertyNotImplementedError(name)
        return super().get_property(name, atoms, allow_calculation)


class CapableToy(Toy):
    """A toy with the optional capabilities: spin batches, exact Hessians, spirals, options, provenance."""

    @property
    def soc(self):
        return self.options.soc

    @property
    def moments(self):
        return self.options.moments

    @property
    def elements(self):
        return self.options.elements

    @property
    def default_moments(self):
        return self.options.default_moments

    def replace(self, **changes):
        known = {k: v for k, v in vars(self.options).items() if k != "terms"}
        return type(self)(*self.options.terms, **{**known, **changes})

    def provenance(self):
        return {"name": self.options.name, "hash": hashlib.sha256(repr(self.options.terms).encode()).hexdigest()[:16]}

    def evaluate_spins(self, atoms, moments, magnetic_forces=True):
        sites, _, _, m = self.evaluate(atoms, moments)
        if not magnetic_forces:
            return {"energy": sites.sum(1).detach().numpy()}
        grad = torch.autograd.grad(sites.sum(), m, allow_unused=True, materialize_grads=True)[0]
        return {
            "energy": sites.sum(1).detach().numpy(),
            "energies": sites.detach().numpy(),
            "magnetic_forces": -grad.numpy(),
        }

    def evaluate_spirals(self, atoms, q, axis=(0.0, 0.0, 1.0), moments=None):
        if self.soc:
            raise ValueError("a spiral in the primitive cell needs spin-orbit coupling off")
        waves = as_tensor(np.atleast_2d(q))
        home = atoms.get_initial_magnetic_moments() if moments is None else moments
        home = np.broadcast_to(home, (len(waves), len(atoms), 3))
        sites, _, _, m = self.evaluate(atoms, home, waves, unit(as_tensor(axis)))
        grad = torch.autograd.grad(sites.sum(), m, allow_unused=True, materialize_grads=True)[0]
        return {"energy": sites.sum(1).detach().numpy(), "magnetic_forces": -grad.numpy()}

    def hessian(self, atoms, blocks=("rr", "rm", "mm"), rows=None):
        n = len(atoms)
        if tuple(blocks) == ("mm",):
            return {"mm": self._moment_rows(atoms, range(n) if rows is None else rows)}
        sizes = {"r": 3 * n, "m": 3 * n, "e": 6}
        full = torch.autograd.functional.hessian(
            lambda x: self._energy_of(atoms, x), torch.zeros(6 * n + 6, dtype=F64)
        ).numpy()
        start = {"r": 0, "m": 3 * n, "e": 6 * n}
        out = {}
        for block in blocks:
            lines, columns = (slice(start[c], start[c] + sizes[c]) for c in block)
            shapes = {"r": (n, 3), "m": (n, 3), "e": (6,)}
            out[block] = full[lines, columns].reshape(*shapes[block[0]], *shapes[block[1]])
            if rows is not None and block[0] != "e":
                out[block] = out[block][list(rows)]
        return out

    def _moment_rows(self, atoms, rows):
        sites, _, _, m = self.evaluate(atoms, atoms.get_initial_magnetic_moments()[None])
        slope = torch.autograd.grad(sites.sum(), m, create_graph=True, allow_unused=True, materialize_grads=True)[0][0]
        if not slope.requires_grad:
            return np.zeros((len(rows), 3, len(atoms), 3))
        found = [
            torch.autograd.grad(slope[i, a], m, retain_graph=True, allow_unused=True, materialize_grads=True)[0][0]
            for i in rows
            for a in range(3)
        ]
        return torch.stack(found).numpy().reshape(len(rows), 3, len(atoms), 3)

    def _energy_of(self, atoms, x):
        n = len(atoms)
        e = x[6 * n :]
        strain = torch.stack(
            [
                torch.stack([e[0], e[5] / 2, e[4] / 2]),
                torch.stack([e[5] / 2, e[1], e[3] / 2]),
                torch.stack([e[4] / 2, e[3] / 2, e[2]]),
            ]
        )
        deform = torch.eye(3, dtype=F64) + strain
        positions = (as_tensor(atoms.positions) + x[: 3 * n].reshape(n, 3)) @ deform.T
        moments = as_tensor(atoms.get_initial_magnetic_moments()) + x[3 * n : 6 * n].reshape(n, 3)
        system = System(
            positions, as_tensor(atoms.cell[:]) @ deform.T, moments[None], atoms.numbers, atoms.cell[:], atoms.positions
        )
        active = [t for t in self.options.terms if self.options.soc or not t.soc]
        return sum(t.sites(system).sum() for t in active)


class CommitteeToy(CapableToy):
    """Several toys that answer as one."""

    def __init__(self, toys):
        super().__init__(*toys[0].options.terms, soc=toys[0].soc, moments=toys[0].moments)
        self.members = list(toys)

    def replace(self, **changes):
        return CommitteeToy([t.replace(**changes) for t in self.members])


def from_options(model="toy", soc=True, moments="fixed", device="cpu", dtype="float64"):
    """The factory that command-line tests name: uniaxial anisotropy, exchange, Landau moments, springs."""
    if model == "broken":
        raise ValueError("the model file broken is damaged; fetch it again")
    terms = [
        Landau(0.05, 0.005, (26, 24)),
        Heisenberg(2e-3, 3.3, 1.0),
        Uniaxial(4e-4, -5e-5, numbers=(26, 24)),
        Springs(3.0, 2.5, 3.3),
    ]
    if model == "committee":
        return CommitteeToy(
            [CapableToy(*terms, Uniaxial(k, numbers=(26,)), soc=soc, moments=moments) for k in (0.0, 1e-5, 2e-5)]
        )
    return CapableToy(*terms, soc=soc, moments=moments, name=model)


def bare_factory(model="toy", soc=True, moments="fixed", device="cpu", dtype="float64"):
    """The same Hamiltonian with energy and magnetic forces alone, so that everything else is a fallback."""
    full = from_options(model, soc)
    return Toy(*full.options.terms, soc=soc, gives=("energy", "magnetic_forces"), elements=None)
