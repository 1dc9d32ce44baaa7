"""How streams meet."""

__all__: list[str] = []
