"""What every family stands on: the native core, the choice of a backend, the registration of an op."""
