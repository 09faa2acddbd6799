"""graphc: a deep-learning compiler in pure Python."""
