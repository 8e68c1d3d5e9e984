"""What a user of the benchmark can mend, said in one sentence."""

from mmace_props.errors import PropertyError


class BenchmarkError(PropertyError):
    """A system, a file of the benchmark, or a result cannot be used."""


class BeyondVolumesError(BenchmarkError):
    """A number is asked at a volume that the calculator's curve does not reach."""
