"""The float64 oracle, the tolerance rule and the agreement of models, for our tests, the benchmark and yours."""
