"""wip."""
def combine() -> None:
    """wip."""
