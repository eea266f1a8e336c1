"""Networks. Only `generator`, `foresight`, `svam` and `control` assemble siblings.

"S-VAM section ..." cites Yan et al., arXiv 2603.16195.
"""
