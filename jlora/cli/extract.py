"""wip."""
def extract() -> None:
    """wip."""
