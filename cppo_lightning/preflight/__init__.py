"""What a run would do, printed before it does anything (``fit --dry_run``), and what it would stumble over later."""

from cppo_lightning.preflight.before_loading import check_before_loading
from cppo_lightning.preflight.report import preflight

__all__ = ["check_before_loading", "preflight"]
