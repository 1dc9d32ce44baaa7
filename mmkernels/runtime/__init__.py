"""Shared by all families: loading the native core, choosing a backend, registering an op."""
