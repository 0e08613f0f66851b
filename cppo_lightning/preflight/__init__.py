"""What a run would do, printed before it does anything: ``fit --dry_run``."""

from cppo_lightning.preflight.report import preflight

__all__ = ["preflight"]
