"""TLS handshakes as jobs."""
