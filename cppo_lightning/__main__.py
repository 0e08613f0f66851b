"""``python -m cppo_lightning``."""

from cppo_lightning.cli import main

if __name__ == "__main__":
    main()
