"""The one family of errors that a user may see."""


class TinychatError(Exception):
    """A user's mistake, in one sentence that names the value and the remedy.

    The command line prints it in one panel and ends with exit code 2; nothing else is caught.
    """


class ConfigError(TinychatError):
    """An option, preset or setting that cannot work."""


class DataError(TinychatError):
    """A data file or folder that is missing, unreadable or not what it should be."""


class CheckpointError(TinychatError):
    """A checkpoint or training state that is missing, damaged, unknown or cannot be written."""
