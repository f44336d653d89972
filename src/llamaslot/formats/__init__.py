"""The bodies and answers of the client APIs."""
