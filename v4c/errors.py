"""Every error v4c raises on purpose. Each message is one line: the thing, what was expected, what was found."""


class Error(Exception):
    """Base of all of v4c's errors; the command line prints it as one line and exits with 2."""


class ConfigError(Error, ValueError):
    """A ``config.json`` (or preset) that does not describe a DeepSeek-V4 model v4c can build."""


class CheckpointError(Error):
    """Weights that are missing, damaged, of the wrong shape or dtype, or outside their folder."""


class UnsupportedError(Error, NotImplementedError):
    """A model, operator, target or option that v4c knows it cannot handle."""


class ArtifactError(Error):
    """An artifact that is incomplete, altered, of another format version, or for another machine."""


class InputError(Error, ValueError):
    """Bad arguments to a loaded model: token ids, shapes, lengths, capacity, sampling parameters."""


class OutputError(Error, OSError):
    """A destination that cannot be written: it exists and is not empty, or the disk is full."""
