"""From a data set to batches for a model: tasks, columns, labels, encoders, media."""
