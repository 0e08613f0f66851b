"""The two errors with which a run ends early, each with a message that says what to change."""


class ConfigError(ValueError):
    """A setting, or a file that it names, cannot work: the message says which, what it is and what would be right.

    What can be checked before the model is loaded is checked then.  The command line ends with exit code 2.
    """


class RolloutError(RuntimeError):
    """A run cannot go on: answers must not be trained on, or a server, a process, a file or another rank has failed.

    No weight has been changed by what failed, which the message names.  The command line ends with exit code 1.
    """
