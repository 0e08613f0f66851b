"""Trust regions for reinforcement learning with verifiable rewards: CPPO (arXiv 2606.10968) and its baselines, on Lightning.

Nothing heavy is imported here: verifier processes import this package, and they need no torch.
"""

__version__ = "0.1.0"
