"""Where documents come from: files, TensorFlow Datasets, Hugging Face `datasets`."""
