"""Networks. Only `foresight` and `svam` assemble siblings. "S-VAM section ..." cites Yan et al., arXiv 2603.16195."""
