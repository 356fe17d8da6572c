"""Numbers of many runs: rank correlations with intervals."""
