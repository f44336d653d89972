"""llama-server's HTTP interface: routes, requests and answers, and the identity of its model."""
