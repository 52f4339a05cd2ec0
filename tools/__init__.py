"""Tools that contributors run on the project itself; they are not part of the package."""
