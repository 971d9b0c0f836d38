"""What a study found: its files, intervals over tasks and queries, and the claims. Loads no torch."""
