"""Networks. Only `foresight` and `svam` assemble siblings."""
