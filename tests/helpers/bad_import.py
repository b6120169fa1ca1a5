"""A module of environments with a mistake in it."""

undefined  # noqa: B018, F821
