"""Pictures of a run: each is a pure function from a small dataclass of numbers to a matplotlib figure.

Nothing here knows of tensors, trainers or log files, and nothing touches pyplot or matplotlib's global settings.  ``numbers``
imports no matplotlib; the other modules do, and are imported where a picture is drawn.
"""
