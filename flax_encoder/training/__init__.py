"""From a loss to a trained model: shardings, optimizer, step, checkpoints, metrics."""
