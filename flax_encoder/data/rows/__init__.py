"""Documents to rows: packing, order, targets and batches, each a function of seed and number."""
