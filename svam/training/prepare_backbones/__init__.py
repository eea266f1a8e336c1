"""In-domain training, and import from published weights, of the frozen backbones: one module per kind."""
