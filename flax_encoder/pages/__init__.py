"""HTML pages of one file each, which need no network: their frame, their charts, and what a run's page says."""
