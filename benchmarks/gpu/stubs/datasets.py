"""As much of `datasets` as importing TRL's losses takes, for a machine that has none."""


class IterableDataset:
    """For an isinstance of which nothing is an instance."""
