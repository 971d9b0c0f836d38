"""The service: tasks are posted as examples, prepared once, and called by name over HTTP."""
