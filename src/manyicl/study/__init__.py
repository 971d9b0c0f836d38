"""The paper's comparison end to end: every method tuned with the same budget, evaluated, and put side by side; resumable."""
