"""Errors of the potential. Each message says what is wrong, where, and what to do."""


class MMACEError(ValueError):
    """Base of every error that the potential raises on purpose."""


class UnknownElementError(MMACEError):
    """A structure holds an element that the model was not trained on."""


class MomentError(MMACEError):
    """Moments are missing, have the wrong shape, or are not finite."""


class StructureError(MMACEError):
    """A structure cannot be evaluated: overlapping atoms, positions that are not finite, no cell."""


class ModelFileError(MMACEError):
    """A model file is missing, damaged, or not one of ours."""


class LabelError(MMACEError):
    """A label file breaks the label contract."""


class ConvergenceError(MMACEError):
    """A relaxation did not reach its tolerance; the message holds the residual."""


class MissingProgramError(MMACEError):
    """A program or data set that a command needs is not installed."""


class MomentRangeWarning(UserWarning):
    """A moment lies beyond the range the model was trained on."""
