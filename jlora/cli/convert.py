"""wip."""
def convert() -> None:
    """wip."""
