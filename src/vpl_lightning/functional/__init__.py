"""Pure functions on tensors: no modules, no files, no choice of device."""
