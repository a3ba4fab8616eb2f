"""Every stage of a save and of a restore alone, on this machine, beside the limit that it cannot pass."""
