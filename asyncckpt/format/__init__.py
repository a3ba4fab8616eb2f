"""What is stored, byte by byte: pure functions, no I/O, no torch. `FORMAT.md` is the specification."""
