"""Data: random-access sources and the Grain pipelines over them."""
