"""What is measured: a file per family, with `cases(settings)`."""
