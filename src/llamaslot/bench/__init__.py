"""``llamaslot bench``: a team's workload against any OpenAI base URL, two of them side by side, and a report."""
