"""Which parts of a model are trained, whole or by adapters."""
