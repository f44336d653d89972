"""The only place that changes slots."""
