"""The two ways in which a run ends early, each with a message that says what to change."""


class ConfigError(ValueError):
    """A setting that cannot work.  Raised before any model is loaded; names the key, the value and what would be right."""


class RolloutError(RuntimeError):
    """An engine or verifier answer that must not be trained on.  Names the prompt; no weight has been changed by it."""
