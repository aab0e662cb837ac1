"""One file for each backbone family and each set of scorers. `common.load_model` and
`scoring.ScorerSet` import a file only when a run needs it (docs/adapters.md)."""
