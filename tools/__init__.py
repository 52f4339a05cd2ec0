"""What contributors run on the project itself; no part of the package."""
