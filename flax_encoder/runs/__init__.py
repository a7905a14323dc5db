"""Run folders of this library: starting, training, loading, querying and exporting them."""
