"""asyncckpt beside its peers: the same state, the same store, one run. README.md says what each scenario measures."""
