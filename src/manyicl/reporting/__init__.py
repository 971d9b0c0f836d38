"""Records -> what people read. Loads no torch."""
