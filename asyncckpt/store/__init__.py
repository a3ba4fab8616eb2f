"""Where bytes live: put, get, list, delete. `base` is the contract, `opening` makes a store of a URL."""
