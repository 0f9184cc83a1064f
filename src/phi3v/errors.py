"""The errors a user can meet. Each message says where, what was found, and what to do."""


class Phi3VError(Exception):
    """Base of every error that phi3v raises on purpose; the command line prints it without a traceback."""


class ConfigError(Phi3VError):
    """A run configuration holds an unknown key, a wrong type, or values that cannot go together."""


class DataError(Phi3VError):
    """A data file, a sample or an image cannot be used as it is."""


class CheckpointError(Phi3VError):
    """A model folder or a training checkpoint is missing, incomplete or does not match."""


class CapacityError(Phi3VError):
    """The work does not fit this machine: memory, disk or sequence length."""


class StoppedError(Phi3VError):
    """The run was asked to stop, did so, and can go on: not a failure."""
