"""Metrics of the tasks, each a plain function of predictions and labels."""
